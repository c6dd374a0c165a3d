"""Which batches teach nothing, and are refused before they cost anything."""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from colfolio.errors import DatasetError


def check_masks(
    positives: Bool[Tensor, "queries documents"],
    ignored: Bool[Tensor, "queries documents"],
    teacher: Float[Tensor, "rows columns"] | None = None,
) -> None:
    """Refuse a batch in which a query has nothing to find or nothing to tell it from.

    A query whose every document is ignored sits out; one at least takes part. Meant for masks on
    the CPU: on a device it waits for them.

    Args:
        teacher: `[queries, documents]`: what distillation follows, NaN where there is nothing.

    Raises:
        DatasetError: names the first such query.
    """
    takes_part = ~ignored.all(dim=1)
    if not takes_part.any():
        raise DatasetError(
            f"a batch in which every query sits out teaches nothing: none of its queries "
            f"({len(positives)}) has an answer and something to tell it from among its documents "
            f"({positives.shape[1]}); raise batch.rows"
            + (" or batch.hard_negatives" if teacher is not None else "")
        )
    if (row := _first(takes_part & ~positives.any(dim=1))) is not None:
        raise DatasetError(f"query {row} of the batch has no positive document")
    if (row := _first((positives & ignored).any(dim=1))) is not None:
        columns = (positives & ignored)[row].nonzero().flatten().tolist()
        raise DatasetError(f"query {row} of the batch both wants and ignores documents {columns}")
    negatives = ~(positives | ignored)
    if (row := _first(takes_part & ~negatives.any(dim=1))) is not None:
        raise DatasetError(
            f"query {row} of the batch has no negative among its documents ({positives.shape[1]}): "
            "its loss is always 0 and teaches nothing; let it sit out, all documents ignored, or "
            "raise batch.rows"
        )
    if teacher is not None:
        _check_teacher(teacher, ignored, takes_part)


def _check_teacher(teacher: Tensor, ignored: Tensor, takes_part: Tensor) -> None:
    if teacher.shape != ignored.shape:
        raise DatasetError(
            f"teacher scores are [queries, documents]: expected {list(ignored.shape)}, found "
            f"{list(teacher.shape)}"
        )
    if (row := _first((teacher.isinf() & ~ignored).any(dim=1))) is not None:
        raise DatasetError(f"query {row} of the batch has an infinite teacher score")
    num_scored = (~(ignored | teacher.isnan())).sum(dim=1)
    if (row := _first(takes_part & (num_scored < 2))) is not None:
        raise DatasetError(
            f"query {row} of the batch has a teacher score for {int(num_scored[row])} of its "
            f"documents ({ignored.shape[1]}), and distillation compares at least 2: raise "
            "batch.hard_negatives, so that it brings more of them"
        )


def _first(rows: Bool[Tensor, " queries"]) -> int | None:
    """The first true row."""
    return int(rows.nonzero()[0]) if rows.any() else None
