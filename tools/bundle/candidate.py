"""What is known of a PDF: where it comes from, its outline, and the extract made of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Source:
    """Where a PDF comes from, and under which licence.

    Args:
        family: documents of one origin; the demo splits by it. Folder of the extract.
        name: file name of the extract, without its suffix.
        original: file name of the PDF in its package.
        package: Debian package.
        project: TeX package inside a package of TeX Live, else "".
        version: of the Debian package.
        licence: SPDX-like expression.
        holders: of the copyright; "" where not yet known.
    """

    family: str
    name: str
    original: str
    package: str
    project: str
    version: str
    licence: str
    holders: str

    @property
    def key(self) -> str:
        """Family and name, which no two sources share."""
        return f"{self.family}/{self.name}"


@dataclass(frozen=True, slots=True)
class Entry:
    """One outline entry: where it points to and whether its title stands there.

    Args:
        level: 0 for a chapter, 1 for what stands below it, and so on.
        page: of the original, from 0.
        top: height on the page in points from below; None where the entry names the page only.
        found: the title is part of the page's text.
        heading: the title stands on a line of its own.
    """

    title: str
    level: int
    page: int
    top: float | None
    found: bool
    heading: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A staged extract.

    Args:
        total_pages: of the original.
        pages: chosen pages of the original, from 0, rising.
        entries: outline entries that point to these pages.
        marks: sample of hashes of the whole original's text (`text_marks`).
        fonts: base names of the fonts in the extract.
        size: bytes of the extract.
        staged: file name in the staging folder.
    """

    source: Source
    total_pages: int
    pages: list[int]
    entries: list[Entry]
    marks: list[int]
    fonts: list[str]
    size: int
    staged: str


def candidate_from_json(values: dict[str, Any]) -> Candidate:
    """The candidate of which `values` is `dataclasses.asdict`."""
    source = Source(**values["source"])
    entries = [Entry(**entry) for entry in values["entries"]]
    return Candidate(**{**values, "source": source, "entries": entries})
