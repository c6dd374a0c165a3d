"""What a recipe's checks are made on: its state before step 1, a few rows, and one small batch.

Nothing here, and nothing that is done within `as_found`, leaves a trace in the state.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from colfolio.batch import ContrastiveBatch, MultiVectors, Packed
from colfolio.data.collate import Collator, Pixels
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.sampler import SamplerPosition, draws
from colfolio.diagnosis.signals import Probe, ProbeBatch
from colfolio.errors import DatasetError, DocumentError
from colfolio.maxsim import maxsim
from colfolio.models.precision import Precision, SettledPrecision
from colfolio.models.retriever import Retriever
from colfolio.training import TrainingState
from colfolio.training.exact_batch import ExactBatch
from colfolio.training.losses import check_masks
from colfolio.training.retrieval_objective import retrieval_source

MOST_ROWS = 16
_MOST_PAGES = 4
_TRIED_PAGES = 16
_TRIED_BATCHES = 4
CHUNK_TOKENS = 4096  # where the recipe sets none
_START = SamplerPosition()


@dataclass(frozen=True, slots=True)
class Trial:
    """A run before its first step.

    Args:
        state: of a retriever; the same again after every check.
        dataset: the training split.
        rows: a few queries of it, each with its answer, the same on all ranks.
        batch: at most 16 rows as the run draws them; of several ranks this one's share.
    """

    state: TrainingState
    dataset: RetrievalDataset
    rows: ProbeBatch
    batch: ContrastiveBatch

    @property
    def retriever(self) -> Retriever:
        """The model that is to be trained."""
        return self.state.retriever

    @property
    def exact(self) -> ExactBatch:
        """What gives the run its gradients."""
        assert isinstance(self.state.exact, ExactBatch)
        return self.state.exact


def make_trial(state: TrainingState, dataset: RetrievalDataset) -> Trial:
    """Draw rows and a batch from the run's first batches; all ranks call it.

    Raises:
        DatasetError: images cannot be read, or batches teach nothing.
    """
    with state.world.together():
        rows = _rows(state, dataset)
    return Trial(state, dataset, rows, _batch(state, dataset))


def paired_rows(collator: Collator, pages: Sequence[Pixels], texts: Sequence[str]) -> ProbeBatch:
    """Texts, each asking for the page at its place."""
    number = torch.arange(len(pages))
    own = torch.eye(len(pages), dtype=torch.bool)
    inputs = collator.queries(texts), collator.documents(pages)
    return ProbeBatch(*inputs, own, torch.zeros_like(own), own, number, number, tuple(texts))


def settled(trial: Trial) -> SettledPrecision:
    """The precision that the run computes in."""
    precision = trial.state.settings.precision
    assert precision != "auto", "a state's precision is settled"
    return precision


def encoded(trial: Trial, packed: Packed, precision: Precision | None = None) -> MultiVectors:
    """Vectors of packed rows in evaluation mode, some rows at a time.

    Args:
        precision: of the arithmetic; None is the run's.
    """
    settings = trial.state.settings
    probe = Probe(trial.rows, settings.memory.chunk_tokens or CHUNK_TOKENS)
    return probe.vectors(trial.retriever, packed, precision or settings.precision)


def scores_of(
    trial: Trial, precision: Precision | None = None
) -> Float[Tensor, "queries documents"]:
    """Scores of the batch, float32 at least; see `encoded`."""
    sides = trial.batch.queries, trial.batch.documents
    queries, documents = (encoded(trial, side, precision) for side in sides)
    return maxsim(queries, documents)


@contextmanager
def as_found(trial: Trial) -> Iterator[dict[str, Tensor]]:
    """Weights that train, gradients, contract and generators are again what they were, after it.

    Yields:
        A copy of each weight that trains, by name.
    """
    model = trial.retriever
    contract = model.contract
    open_ones = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    copies = {name: weight.detach().clone() for name, weight in open_ones.items()}
    gpus = [model.device] if model.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(gpus):
            yield copies
    finally:
        with torch.no_grad():
            for name, copy in copies.items():
                open_ones[name].copy_(copy)
        model.zero_grad(set_to_none=True)
        model.contract = contract


def _rows(state: TrainingState, dataset: RetrievalDataset) -> ProbeBatch:
    """The first queries of a run whose images can be read."""
    settings, corpus = state.settings, dataset.corpus
    weights = [settings.batch.kind_weights.get(query.kind, 1.0) for query in dataset.queries]
    draw = next(draws(weights, settings.batch.rows, settings.seed, _START))
    pages: list[Pixels] = []
    texts: list[str] = []
    error: DocumentError | None = None
    for query in map(dataset.queries.__getitem__, draw.queries[:_TRIED_PAGES]):
        try:
            pages.append(corpus.image(corpus.ids.index(dataset.positives(query.id)[0])))
            texts.append(query.text)
        except DocumentError as failure:
            error = failure
        if len(pages) == _MOST_PAGES:
            break
    if not pages:
        raise DatasetError(f"{dataset.name}: none of the first images can be read: {error}")
    return paired_rows(state.retriever.collator, pages, texts)


def _batch(state: TrainingState, dataset: RetrievalDataset) -> ContrastiveBatch:
    """The first small batch that teaches something; where none does, the run's own first one.

    Raises:
        DatasetError: that teaches nothing either.
    """
    own = state.settings.batch
    small = min(own.rows, max(MOST_ROWS, state.world.size))
    drawn = islice(_batches(state, dataset, small), _TRIED_BATCHES)
    teaching = next(filter(_teaches, drawn), None)
    batch = teaching or next(_batches(state, dataset, own.rows))
    check_masks(batch.positives, batch.ignored, batch.teacher)
    return batch


def _batches(
    state: TrainingState, dataset: RetrievalDataset, rows: int
) -> Iterator[ContrastiveBatch]:
    """Batches of so many rows, this rank's share of each with the masks of all."""
    world = state.world
    source = retrieval_source(state, dataset, rows, uses_features=False)
    drawn = source.batches(_START)
    while True:
        with world.together():
            share = next(drawn)
        yield source.of_all_ranks(share)


def _teaches(batch: ContrastiveBatch) -> bool:
    """Whether any query has an answer, and something to tell it from."""
    negatives = ~(batch.positives | batch.ignored)
    return bool((batch.positives.any(dim=1) & negatives.any(dim=1)).any())
