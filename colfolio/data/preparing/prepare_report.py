"""What preparing a dataset found, dropped and wrote; kept in the dataset's manifest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class SplitCounts:
    """What one split holds."""

    documents: int
    families: int
    corpus: int
    queries: int
    headings: int
    seen: int | None


@dataclass(frozen=True, slots=True)
class PrepareReport:
    """What was found, dropped and written.

    Args:
        entries: outline entries of the documents.
        located: entries found on their page; `entries - located` were dropped.
        strips: strips of words cut.
        exact_removed: training images equal to one of validation or test, and validation images
            equal to one of test.
        near_removed: likewise, nearly equal.
        merged: images equal to another of their split, made one row with it.
        skipped: files that could not be read, with the reason.
        splits: what each split holds.
    """

    documents: int
    families: int
    pages: int
    entries: int
    located: int
    strips: int
    exact_removed: int
    near_removed: int
    merged: int
    skipped: tuple[tuple[str, str], ...]
    splits: dict[str, SplitCounts]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PrepareReport:
        """The report that `to_dict` gave."""
        splits = {split: SplitCounts(**counts) for split, counts in values["splits"].items()}
        skipped = tuple((name, reason) for name, reason in values["skipped"])
        return cls(**{**values, "splits": splits, "skipped": skipped})
