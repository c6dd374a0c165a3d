"""What the losses of another trainer are evidence of: their chance level, and the floor they show.

Such a log says neither how many documents a query was compared with, nor whether scores are summed
over a query's tokens or divided by their number, nor how losses of accumulated batches were added.
Where the losses themselves tell, they are believed, and a note says so.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from colfolio.diagnosis.evidence import Evidence, Fault, Settled
from colfolio.diagnosis.foreign.files import ForeignRows, read_foreign_rows
from colfolio.diagnosis.foreign.level import LEAST_ROWS, Standing, standing
from colfolio.diagnosis.foreign.rows import ForeignRow
from colfolio.diagnosis.training_log import LoggedEvaluation, LoggedStep
from colfolio.errors import ColfolioError

ForeignLoss = Literal["pairwise", "info_nce", "sigmoid"]
_BELOW = 0.003  # of a floor, that a loss may seem to be below it
_MOST_SUMMED = 64  # accumulated batches
_NEAR_FLOOR = 0.25  # of the way from floor to chance
_FLOOR_SHOWN = 0.05  # of chance
_LEAP = 0.01  # of chance, from which a loss does not fall to exactly 0 by itself


@dataclass(frozen=True, slots=True)
class ForeignLog:
    """Evidence from a log of losses.

    Args:
        notes: what had to be assumed, in sentences.
        rows: whose loss is a number, as it was understood.
    """

    evidence: Evidence
    notes: tuple[str, ...]
    rows: tuple[ForeignRow, ...] = ()


def read_foreign_log(
    path: Path, loss: ForeignLoss, batch: int, temperature: float | None = None
) -> ForeignLog:
    """What a `trainer_state.json` or a CSV of step and loss says of a run.

    Args:
        loss: that was minimised: `pairwise` against the hardest negative.
        batch: documents that a query is compared with, its own among them.
        temperature: that scores are divided by; None: not known.

    Raises:
        ColfolioError: names file and line, and what was expected there.
    """
    if batch < 1 or (temperature is not None and not 0 < temperature < math.inf):
        raise ColfolioError(
            f"expected at least 1 document and a temperature above 0, not {batch}, {temperature}"
        )
    found = read_foreign_rows(path)
    notes = list(found.notes)
    found = _without_zeros(path, found, loss, batch, notes)
    rows, chance, batch = _believed(found, loss, batch, notes)
    floor = _floor(rows, loss, batch, chance, temperature, notes)
    rates = [row.lr for row in rows if row.lr is not None and math.isfinite(row.lr)]
    settled = Settled(
        loss,
        1.0 if temperature is None else temperature,
        lr=max(rates, default=None),
        steps=found.steps,
        rows=batch,
    )
    fault = _fault(found.rows)
    evidence = Evidence(
        settled,
        tuple(_step(row, chance, floor, batch) for row in rows),
        _evaluations(found, chance),
        fault=fault,
        skipped=_skipped(found.rows, fault),
        candidates=float(batch),
    )
    return ForeignLog(evidence, tuple(notes), tuple(rows))


def _without_zeros(
    path: Path, found: ForeignRows, loss: ForeignLoss, batch: int, notes: list[str]
) -> ForeignRows:
    """The rows with NaN where a log ends with zeros that no loss can have come to."""
    most = max((row.loss for row in found.rows if math.isfinite(row.loss)), default=0.0)
    if batch == 1:
        if loss == "info_nce" and most < _LEAP:
            return found  # of its own document alone
        raise ColfolioError(
            f"{path}: the loss comes to {most:.3g}, but a query that is compared with its own "
            "document alone has nothing to be told from; --batch counts all documents that a "
            "query is compared with, its own among them"
        )
    end = len(found.rows)
    while end and found.rows[end - 1].loss == 0:
        end -= 1
    before = found.rows[end - 1].loss if end else math.inf
    if end == len(found.rows) or before <= _LEAP * math.log(2):
        return found  # a loss that has nearly gone may be rounded to 0
    where = f"from step {found.rows[end].step} on, after {before:.3g}" if end else "in every row"
    notes.append(
        f"The loss is exactly 0 {where}, which no such loss comes to: some trainers write 0 in "
        "place of a loss that is no number, so it is taken for one."
    )
    lost = [replace(row, loss=math.nan) for row in found.rows[end:]]
    return replace(found, rows=(*found.rows[:end], *lost))


def _believed(
    found: ForeignRows, loss: ForeignLoss, batch: int, notes: list[str]
) -> tuple[list[ForeignRow], float, int]:
    """Rows with a mean loss each, their chance level, and the documents that it is of.

    A loss that stands still does so at a chance level, or at a multiple of one if losses of
    accumulated batches were added up: which one tells how many documents there are.
    """
    rows = [row for row in found.rows if math.isfinite(row.loss)]
    chance = _chance(rows, loss, batch, notes)
    if found.device_rows and found.device_rows != batch:
        notes.append(
            f"The log says that a device has {found.device_rows} rows at a time, not {batch}. "
            "Accumulated batches and other devices add no candidates, unless the trainer gathers "
            "their documents."
        )
    still = standing([row.loss for row in rows])
    if still is None or not chance:
        return rows, chance, batch
    times = round(still.level / chance)
    if 1 < times <= _MOST_SUMMED and still.is_at(times * chance):
        notes.append(
            f"Losses stand at {times} times the chance level, as where those of {times} "
            f"accumulated batches are added up; they are divided by {times}."
        )
        return [replace(row, loss=row.loss / times) for row in rows], chance, batch
    size = _fewer(still, batch) if loss == "info_nce" else None
    if size is None:
        return rows, chance, batch
    notes.append(
        f"The loss stands still at {still.level:.4f}, and {math.log(size):.4f} is ln {size}: a "
        f"query seems to be compared with {size} documents, not {batch}. Each device and each "
        "accumulated batch has its own, unless the trainer gathers them."
    )
    return rows, math.log(size), size


def _fewer(still: Standing, batch: int) -> int | None:
    """The documents whose chance level a loss stands at, if a batch is so many times them."""
    if still.level >= math.log(batch):
        return None
    like = math.exp(still.level)
    parts = round(batch / like)
    fewer = {round(like), batch // parts}  # where few or where many are meant
    sizes = (size for size in sorted(fewer) if 1 < size < batch and batch % size == 0)
    return next((size for size in sizes if still.is_at(math.log(size))), None)


def _chance(rows: Sequence[ForeignRow], loss: ForeignLoss, batch: int, notes: list[str]) -> float:
    """The loss of scores without information."""
    if loss == "pairwise":
        return math.log(2)
    if loss == "info_nce":
        return math.log(batch)
    share = 1 / batch
    others = 1 - share
    mean = -share * math.log(share) - (others * math.log(others) if others else 0.0)
    is_summed = bool(rows) and rows[0].loss > batch * mean
    notes.append(
        f"The loss begins at {rows[0].loss:.3g}, so it is taken for the "
        f"{'sum' if is_summed else 'mean'} over a query's {batch} pairs; the mean's chance level "
        f"is {mean:.4f}, the sum's {batch * mean:.3f}."
        if rows
        else "No loss is a number, so whether it is a sum or a mean over pairs is not known."
    )
    return batch * mean if is_summed else mean


def _floor(
    rows: Sequence[ForeignRow],
    loss: ForeignLoss,
    batch: int,
    chance: float,
    temperature: float | None,
    notes: list[str],
) -> float | None:
    """The least that the loss can be, where the losses show which it is; else None.

    Scores that are divided by a query's length lie between 0 and 1 in practice, and have a floor
    well above 0 at a high temperature; sums of scores have one near 0.
    """
    if loss == "sigmoid" or not rows or batch < 2:
        return None
    floor = _normalised_floor(loss, batch, temperature or 1.0)
    is_low = floor < _FLOOR_SHOWN * chance
    if temperature is None and is_low:
        return None
    level = _mean_loss(rows[-max(LEAST_ROWS, len(rows) // 10) :])
    if is_low or level < floor * (1 - _BELOW):
        return None if temperature is None else 0.0
    is_near = level - floor < _NEAR_FLOOR * (chance - floor)
    if temperature is None:
        if is_near:
            notes.append(
                "If scores are divided by the query's length and the temperature is 1, the loss "
                f"cannot go below {floor:.3f}, and is nearly there: give --temperature 1 if so."
            )
        return None
    if is_near:
        notes.append(
            f"The loss stands close to {floor:.3f}, the floor of scores that are divided by the "
            "query's length, and not below it: such scores are assumed."
        )
        return floor
    notes.append(
        "Whether scores are divided by the query's length is not known. If they are, the floor is "
        f"{floor:.3f}, and the loss has gone {(chance - level) / (chance - floor):.0%} of the way "
        f"from chance; if they are summed, the floor is near 0, and it is {1 - level / chance:.0%}."
    )
    return None


def _normalised_floor(loss: ForeignLoss, batch: int, temperature: float) -> float:
    """The loss where the positive scores 1 and each negative 0."""
    others = 1 if loss == "pairwise" else batch - 1
    return math.log1p(others * math.exp(-1 / temperature))


def _mean_loss(rows: Sequence[ForeignRow]) -> float:
    return math.fsum(row.loss for row in rows) / len(rows)


def _step(row: ForeignRow, chance: float, floor: float | None, batch: int) -> LoggedStep:
    return LoggedStep(
        row.step, row.loss, chance, None, row.lr, None, candidates=float(batch), floor=floor
    )


def _evaluations(found: ForeignRows, chance: float) -> tuple[LoggedEvaluation, ...]:
    return tuple(
        LoggedEvaluation(step, "eval", {"loss": loss, "chance": chance})
        for step, loss in found.evaluations
        if math.isfinite(loss)
    )


def _fault(rows: Sequence[ForeignRow]) -> Fault | None:
    """Numbers that stopped being numbers and stayed so until the log ends.

    A trainer may write another loss in place of NaN (0, or the mean of those before), so the
    gradient is looked at as well.
    """
    fault = None
    for row in reversed(rows):
        if not _is_broken(row):
            break
        fault = Fault(row.step - 1, "gradient" if math.isfinite(row.loss) else "loss")
    return fault


def _skipped(rows: Sequence[ForeignRow], fault: Fault | None) -> float:
    """Share of rows that were broken and followed by sound ones: half precision skipped them."""
    before = [row for row in rows if fault is None or row.step <= fault.step]
    return sum(map(_is_broken, before)) / max(1, len(before))


def _is_broken(row: ForeignRow) -> bool:
    norm = row.gradient_norm
    return not math.isfinite(row.loss) or (norm is not None and not math.isfinite(norm))
