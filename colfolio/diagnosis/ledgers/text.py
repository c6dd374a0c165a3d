"""What a run of the objective `generation` learns from, said before its first step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from colfolio.data.chat import ChatCollator
from colfolio.data.conversations import ConversationDataset
from colfolio.diagnosis.ledgers.ledger import Range, counted
from colfolio.training import TrainSettings


@dataclass(frozen=True, slots=True)
class TextLedger:
    """A run's batches and the answers in them.

    Args:
        conversations: of the training split.
        ranks: that share each batch.
        rows: conversations of a batch, of all ranks together.
        accumulation: batches of an optimiser step, whose answer tokens count as one batch's.
        epochs: of the whole run.
        answer_tokens: of a conversation, the token that ends an answer included.
        mean_answer_tokens: likewise.
        chance: the loss of a guess that knows nothing.
        computed_with: precision, attention and the like, by name.
        trains: which parameters, and which later.
    """

    conversations: int
    ranks: int
    rows: int
    accumulation: int
    epochs: float
    answer_tokens: Range
    mean_answer_tokens: float
    chance: float
    computed_with: dict[str, str]
    trains: str


def make_text_ledger(
    dataset: ConversationDataset,
    settings: TrainSettings,
    ranks: int,
    chat: ChatCollator,
    vocabulary: int,
    computed_with: Mapping[str, str],
    trains: str,
) -> TextLedger:
    """The ledger of a run; answers are cut into tokens, and no image is read."""
    tokens = np.array(chat.num_answer_tokens(dataset.answers))
    rows, accumulation = settings.batch.rows, settings.accumulation
    steps_an_epoch = max(1, len(dataset) // rows) / accumulation
    return TextLedger(
        conversations=len(dataset),
        ranks=ranks,
        rows=rows,
        accumulation=accumulation,
        epochs=settings.steps / steps_an_epoch,
        answer_tokens=Range(float(tokens.min()), float(np.median(tokens)), float(tokens.max())),
        mean_answer_tokens=float(tokens.mean()),
        chance=math.log(vocabulary),
        computed_with=dict(computed_with),
        trains=trains,
    )


def text_ledger_rows(ledger: TextLedger) -> list[tuple[str, str]]:
    """Name and text of each line."""
    answers, shared = ledger.answer_tokens, f", shared by {ledger.ranks} ranks"
    batches = counted(ledger.accumulation, "batch", "batches")
    computed = ", ".join(f"{name} {value}" for name, value in ledger.computed_with.items())
    return [
        ("batch", f"{counted(ledger.rows, 'conversation')}{shared if ledger.ranks > 1 else ''}"),
        ("step", f"{batches}; every answer token of a step weighs the same"),
        ("split", f"{counted(ledger.conversations, 'conversation')}: {ledger.epochs:.1f} epochs"),
        (
            "answers",
            f"{ledger.mean_answer_tokens:.1f} tokens on average ({answers.least:g} to "
            f"{answers.most:g}), their end included",
        ),
        ("loss", f"next token of answers: chance {ledger.chance:.3f}, ln of the vocabulary"),
        ("trains", ledger.trains),
        ("computed", computed),
    ]
