"""What one training step did, as plain numbers: for the terminal, the log and the curves."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class PartReport:
    """What one step did to one part of the model, as far as the part trains.

    Args:
        lr: the highest learning rate of its parameters.
        gradient_norm: of its parameters together, before clipping.
        update_ratio: norm of the change of its weights over the norm of those weights.
        trains: number of parameters.
        lr_least: the lowest learning rate of its parameters.
        dead: share of its gradient that is exactly 0; of an embedding most is, for a batch has few
            of the tokens.
    """

    lr: float
    gradient_norm: float
    update_ratio: float
    trains: int
    lr_least: float
    dead: float


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one step did.

    Args:
        step: counted from 1; so many steps are done.
        loss, chance, floor, margin, spread, candidates, masked, accuracy: see `ScoreSummary`.
        gradient_norm: of all parameters together, before clipping.
        skipped: gradients overflowed in half precision, and the weights stayed as they were.
        lr: the learning rate of the step.
        seconds: of the step, waiting for its batch included.
        rows_per_second: queries, each with its document.
        parts: of each part that trains, from the lowest to the highest.
        opened: what began to train with this step.
    """

    step: int
    loss: float
    chance: float
    floor: float
    margin: float
    spread: float
    candidates: float
    masked: float
    accuracy: float
    gradient_norm: float
    skipped: bool
    lr: float
    seconds: float
    rows_per_second: float
    parts: dict[str, PartReport] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class GenerationReport:
    """What one step of the objective `generation` did.

    Args:
        loss, chance, accuracy, answer_tokens, tokens: see `TextSummary`; numbers of tokens are of
            all ranks and batches of the step.
        rows_per_second: conversations.
        others: as in `StepReport`.
    """

    step: int
    loss: float
    chance: float
    accuracy: float
    answer_tokens: float
    tokens: float
    gradient_norm: float
    skipped: bool
    lr: float
    seconds: float
    rows_per_second: float
    parts: dict[str, PartReport] = field(default_factory=dict)
    opened: list[str] = field(default_factory=list)

    @property
    def tokens_per_second(self) -> float:
        """All tokens of the step, what is seen and asked included."""
        return self.tokens / self.seconds


AnyReport = StepReport | GenerationReport
