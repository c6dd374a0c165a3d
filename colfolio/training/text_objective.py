"""What the loop asks of the objective `generation`: batches, gradient, and a held-out loss."""

from __future__ import annotations

import numpy as np
import torch

from colfolio.batch import TextBatch
from colfolio.data.conversation_batches import ConversationSource, in_order
from colfolio.data.conversations import ConversationDataset
from colfolio.training.generation import ExactText, TextSummary
from colfolio.training.state import TrainingState


def text_source(state: TrainingState, dataset: ConversationDataset) -> ConversationSource:
    """Batches of a split for the ranks of a state.

    Raises:
        DatasetError: a batch has more rows than the split, or fewer than there are ranks.
    """
    generator, settings = state.generator, state.settings
    rate = generator.contract.frame_rate
    rows, seed = settings.batch.rows, settings.seed
    return ConversationSource(dataset, generator.chat, rate, rows, seed, state.world)


def text_backward(state: TrainingState, batches: list[TextBatch]) -> TextSummary:
    """Add the gradient of a step's batches; what is drawn depends on (seed, step, batch)."""
    seeds = []
    for number in range(len(batches)):
        drawn = np.random.default_rng((state.settings.seed, 3, state.step, number))
        seeds.append(int(drawn.integers(2**63)))
    return _exact(state).backward(batches, seeds, state.scaler.scale)


def text_metrics(state: TrainingState, dataset: ConversationDataset) -> dict[str, float]:
    """Loss, its chance level and token accuracy over a whole split; all ranks get the same.

    Raises:
        DatasetError: an image or video cannot be read.
    """
    rows = max(state.settings.batch.rows, state.world.size)
    rate = state.generator.contract.frame_rate
    batches = in_order(dataset, state.generator.chat, rate, rows, state.world)
    summary = _exact(state).measure(batches)
    numbers = torch.stack([summary.loss, summary.chance, summary.accuracy]).tolist()
    return dict(zip(("loss", "chance", "token_accuracy"), numbers, strict=True))


def _exact(state: TrainingState) -> ExactText:
    assert isinstance(state.exact, ExactText)
    return state.exact
