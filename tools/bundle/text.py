"""Measures of text: titles as they stand on a page, English prose, copies, copyright holders."""

from __future__ import annotations

import re
import unicodedata
import zlib
from collections.abc import Iterable

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        the of and to in is a for that be this are it with as on by can if or not you an which
        from will use used at have has when may should all your there then its but one these we
        they was were more into only also such than each so other about how what
        """,
    )
)
FOREIGN_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        der die und das von mit nicht ist eine les des une est dans pour que le la del los para
        il che di een het van je nie jest i w z o do na com um uma
        """,
    )
)
_NOTICE = re.compile(
    r"(?:copyright|\u00a9|\(c\))[ \t:,]*(?:\(c\)|\u00a9)?[ \t]*(?:\d{4}[-\u2013, \t\d]*)"
    r"(?:by |,)?[ \t]*([A-Z\u00c0-\u017e][^\n<(|\\{]{3,70})",
    re.IGNORECASE,
)
_AFTER_NAME = re.compile(
    r"[`%#_;]|(?<=[a-z]{2})\. |,? \S*@|, \(| and others|all rights|this "
    r"|permission|license| in \d| \d{4}",
    re.IGNORECASE,
)


def normalise(text: str) -> str:
    """Text in a form in which a title and its heading on the page are the same."""
    text = re.sub(r"[\x02\ufffe\u00ad]\s*", "", text)
    text = unicodedata.normalize("NFKC", text).lower()
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("`", "'")
    text = re.sub(r"[\u201c\u201d]|''", '"', text)
    text = re.sub(r"[\u2010-\u2015\u2212]|--+", "-", text)
    return re.sub(r"\s+", " ", text).strip()


def bare_title(title: str) -> str:
    """A normalised title without its section number."""
    text = normalise(title)
    text = re.sub(r"^(chapter|appendix|part|section)\s+([0-9]+|[a-z]|[ivxlc]+)\b[.:]?\s+", "", text)
    return re.sub(r"^(([0-9]+|[a-z])(\.[0-9]+)+\.?|[0-9]+\.?|[a-zivx]+[.)])\s+", "", text)


def num_letters(text: str) -> int:
    """How many letters the text has."""
    return sum(character.isalpha() for character in text)


def english_share(text: str) -> float:
    """The share of frequent English words among the words, less foreign ones."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    if not words:
        return 0.0
    score = sum((word in STOP_WORDS) - (word in FOREIGN_WORDS) for word in words)
    return score / len(words)


def listing_share(text: str) -> float:
    """The share of characters that are typical of code rather than of prose."""
    signs = sum(character in "\\{}[]$#@|<>=_^&*+/~%;" for character in text)
    return signs / max(1, len(text))


def text_marks(text: str) -> list[int]:
    """A sample of hashes of the text's runs of eight words, to find copies of one text."""
    words = re.findall(r"[a-z]{2,}", normalise(text))
    runs = (" ".join(words[start : start + 8]) for start in range(len(words) - 7))
    hashes = {zlib.crc32(run.encode()) for run in runs}
    return sorted(number for number in hashes if number % 16 == 0)


def copyright_holders(texts: Iterable[str]) -> str:
    """Who the first copyright notice with a year names, or ""."""
    for text in texts:
        match = _NOTICE.search(text)
        if match:
            name = re.sub(r"\s+", " ", _AFTER_NAME.split(match[1])[0]).strip(" .,;:-*\u00a9(")
            if num_letters(name) >= 6 and not is_placeholder(name):
                return name
    return ""


def is_placeholder(name: str) -> bool:
    """Whether a copyright holder is only a word to be replaced by a name."""
    return bool(re.search(r"(?i)your name|^the authors?$", name))
