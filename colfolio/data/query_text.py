"""When two texts are the same query, and the readable id that such a query gets."""

from __future__ import annotations

import hashlib
import re

from colfolio.data.pages.titles import clean_text, without_number

_LEAST_LETTERS = 4
_YEAR = re.compile(r"\d{4}\b")
_SLUG_LENGTH = 40


def text_key(text: str) -> str:
    """The text as it is compared: NFKC, case folded, whitespace collapsed, no section number.

    The number stays where fewer than four letters would be left, and where it looks like a year.

    >>> [text_key(text) for text in ("2.1  Getting STARTED", "3.1 FAQ", "1999 Budget")]
    ['getting started', '3.1 faq', '1999 budget']
    """
    folded = clean_text(text.casefold())
    rest = without_number(folded)
    if rest == folded or _YEAR.match(folded):
        return folded
    return rest if sum(letter.isalpha() for letter in rest) >= _LEAST_LETTERS else folded


def query_id(key: str) -> str:
    """A readable id for a query: words of its key, and eight digits of the key's hash.

    >>> query_id("getting started")
    'getting-started-0faf7da3'
    """
    slug = re.sub(r"[^\w]+", "-", key).strip("-")[:_SLUG_LENGTH].rstrip("-")
    digits = hashlib.sha256(key.encode()).hexdigest()[:8]
    return f"{slug}-{digits}" if slug else digits
