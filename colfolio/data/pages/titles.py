"""Where an outline title stands on the page to which its entry points."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from colfolio.data.documents import OutlineEntry
from colfolio.data.pages.ink import BoxF
from colfolio.data.pages.text_layer import Words, joined_box

_LEAST_LETTERS = 4
_NEAR_DESTINATION = 0.08
_TITLE_SHARE = 0.7
_SPELLINGS = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032`\u00b4", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u2033\u00ab\u00bb", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212", "-"),
        "\u00ad": "",
        "\u200b": "",
    }
)
_PART_NAME = re.compile(
    r"^(chapter|appendix|part|section|annex)\s+([0-9]+|[a-z]|[ivxlc]+)\b\s*[.:-]?\s+", re.IGNORECASE
)
_NUMBER = re.compile(
    r"^(([0-9]+|[a-z])(\.[0-9]+)+[.:]?|[0-9]+[.:]?|[a-z][.)]|[ivx]+[.)])\s+", re.IGNORECASE
)
_LEADER = re.compile(r"(\.\s?){3,}|\s[0-9ivxl]+$")


@dataclass(frozen=True, slots=True)
class TitlePlace:
    """A title as the page spells it, and the box of its first line there, with its number."""

    text: str
    box: BoxF


def clean_text(text: str) -> str:
    """Text with ligatures taken apart, plain quotes and dashes, and single spaces."""
    plain = unicodedata.normalize("NFKC", text).translate(_SPELLINGS).replace("''", '"')
    return " ".join(plain.split())


def without_number(title: str) -> str:
    """A title without its leading section number.

    >>> [without_number(t) for t in ("2.3 Aim", "A.1 Scope", "Chapter 4: Use", "3D plots", "Aim")]
    ['Aim', 'Scope', 'Use', '3D plots', 'Aim']
    """
    return _NUMBER.sub("", _PART_NAME.sub("", title))


def locate_titles(words: Words, entries: Sequence[OutlineEntry]) -> list[TitlePlace]:
    """The places of outline titles among the words of their page; titles not found are left out.

    A title is looked for whole, then without its number, whatever the spaces. Of several
    occurrences the one close to the entry's destination counts, else the tallest; one in a table of
    contents never does. Of a title over several lines the first is taken if it holds at least half
    the letters.
    """
    keys = [_key(text) for text in words.texts]
    places = (_located(words, keys, entry) for entry in entries)
    return list(dict.fromkeys(place for place in places if place is not None))


def _located(words: Words, keys: list[str], entry: OutlineEntry) -> TitlePlace | None:
    whole = clean_text(entry.title)
    for title in dict.fromkeys((whole, without_number(whole))):
        if _letters(title) < _LEAST_LETTERS:
            continue
        places = [
            (first, end)
            for first, end in _occurrences(keys, _key(title))
            if not _is_contents_line(words, end)
        ]
        place = _first_line(words, *_best(words, places, entry.top_fraction)) if places else None
        if place is not None:
            return place
    return None


def _key(text: str) -> str:
    return "".join(clean_text(text).casefold().split())


def _letters(text: str) -> int:
    return sum(character.isalpha() for character in text)


def _occurrences(keys: list[str], key: str) -> Iterator[tuple[int, int]]:
    """Runs of whole words that, written without spaces, are the key."""
    starts = np.concatenate([[0], np.cumsum([len(text) for text in keys])]).astype(int).tolist()
    first_of = {place: row for row, place in reversed(list(enumerate(starts[:-1])))}
    row_of = {place: row for row, place in enumerate(starts)}
    joined, place = "".join(keys), -1
    while (place := joined.find(key, place + 1)) >= 0:
        end = place + len(key)
        if place in first_of and end in row_of:
            yield first_of[place], row_of[end]


def _is_contents_line(words: Words, end: int) -> bool:
    """Whether dots or a page number follow on the level of the title's last word."""
    _, top, right, bottom = words.boxes[end - 1].tolist()
    rest = []
    for text, box in zip(words.texts[end:], words.boxes[end:].tolist(), strict=True):
        if box[0] < right or box[1] > bottom or box[3] < top:
            break
        rest.append(text)
    return bool(_LEADER.search(" " + " ".join(rest)))


def _best(
    words: Words, places: list[tuple[int, int]], top_fraction: float | None
) -> tuple[int, int]:
    def rank(place: tuple[int, int]) -> tuple[bool, float]:
        boxes = words.boxes[place[0] : place[1]]
        height = float(np.median(boxes[:, 3] - boxes[:, 1]))
        if top_fraction is None:
            return False, height
        distance = float(boxes[0, 1]) - top_fraction
        return -0.02 < distance < _NEAR_DESTINATION, height

    return max(places, key=rank)


def _first_line(words: Words, first: int, end: int) -> TitlePlace | None:
    same = words.lines[first:end] == words.lines[first]
    end_of_line = first + int(np.argmin(same)) if not same.all() else end
    text = clean_text(" ".join(words.texts[first:end_of_line]))
    whole = clean_text(" ".join(words.texts[first:end]))
    if _letters(text) < max(_LEAST_LETTERS, 0.5 * _letters(whole)):
        return None
    return TitlePlace(text, _box_of_line(words, first, end_of_line))


def _box_of_line(words: Words, first: int, end: int) -> BoxF:
    """The whole line where it is little more than the title: its number belongs to the heading."""
    line = np.flatnonzero(words.lines == words.lines[first])
    letters = _letters("".join(words.texts[row] for row in line))
    is_heading = _letters("".join(words.texts[first:end])) >= _TITLE_SHARE * letters
    return joined_box(words.boxes[line] if is_heading else words.boxes[first:end])
