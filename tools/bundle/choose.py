"""Chooses candidates greedily: new titles and new fonts for few bytes, no text twice."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from tools.bundle.candidate import Candidate
from tools.bundle.sources import is_whole
from tools.bundle.text import bare_title

MOST_FILE_BYTES = 1_900_000
MOST_EXTRACT_BYTES = 200_000
# Fonts that are not free themselves; documents that embed them are left out.
UNFREE_FONTS = re.compile(
    r"^MT(EX|MI|SY)|Syntax"
    r"|Aldus|Hoefler|Lucida|Tiempos|^Unit[RS]|^Unit-"
    r"|Hira(Min|Kaku|gino)|Verdana|ZapfHumanist|Minion"
    r"|Myriad|^Arial|TimesNewRoman|Calibri|Cambria|Georgia|PalatinoLinotype|Optima|Zapfino|GillSans"
    r"|Futura|Trebuchet|Consolas|CourierNew|Univers|Frutiger|Garamond(Pro|Premier)|HelveticaN"
    r"|Tahoma|Menlo|Monaco|Baskerville-|Didot|Segoe|^Corbel|Candara|Constantia|MTPro|Adobe|^Bembo"
)


def choose(candidates: Sequence[Candidate], budget: int, most_a_family: int) -> list[Candidate]:
    """The chosen candidates by family and name; whole documents and non-TeX ones come first.

    Args:
        candidates: all.
        budget: bytes of all chosen extracts together.
        most_a_family: how many extracts of one family are taken.
    """
    chosen: list[Candidate] = []
    taken: Counter[str] = Counter()
    families: Counter[str] = Counter()
    titles = {item.staged: heading_titles(item) for item in candidates}
    fonts = {item.staged: {f"font {name}" for name in font_families(item)} for item in candidates}
    rest = [item for item in candidates if item.size <= MOST_FILE_BYTES]
    rest = [item for item in rest if not any(map(UNFREE_FONTS.search, item.fonts))]

    def rank(item: Candidate) -> tuple[bool, bool, float, str]:
        num_siblings = families[item.source.family]
        is_other = not item.source.package.startswith("texlive") and not num_siblings
        worth = _worth(titles[item.staged], fonts[item.staged], item, taken)
        return is_whole(item.source), is_other, worth / (1 + 3 * num_siblings), item.staged

    while rest:
        best = max(rest, key=rank)
        rest.remove(best)
        most = budget if is_whole(best.source) else min(budget, MOST_EXTRACT_BYTES)
        if families[best.source.family] >= most_a_family or best.size > most:
            continue
        if any(_is_same_text(best, item) for item in chosen):
            continue
        budget -= best.size
        chosen.append(best)
        families[best.source.family] += 1
        taken.update(titles[best.staged])
        taken.update(fonts[best.staged])
    return sorted(chosen, key=lambda item: (item.source.family, item.source.name))


def heading_titles(candidate: Candidate) -> set[str]:
    """The distinct titles of a candidate that stand as headings on their pages."""
    return {bare_title(entry.title) for entry in candidate.entries if entry.heading}


def font_families(candidate: Candidate) -> set[str]:
    """The names of a candidate's fonts without style and size, Computer Modern as one."""
    families = set()
    for font in candidate.fonts:
        name = re.match(r"[A-Za-z]+[a-z]{2,}|[A-Za-z]+", font)
        family = name[0] if name else font
        if re.match(r"(CM|SF|MS[AB]M|EUF|LCIRCLE|LASY|LINE)[A-Z]*\d", font):
            family = "CM"
        elif re.match(r"LM|LatinModern", font):
            family = "LM"
        families.add(re.split(r"(?<=[a-z])(?=Mono|Sans|Bold|Ital|Regu|Math|Obl)", family)[0])
    return families


def _worth(
    titles: Collection[str], fonts: Collection[str], item: Candidate, taken: Mapping[str, int]
) -> float:
    """What a candidate adds for its bytes: new titles first, then new fonts and pages."""
    fresh = sum(1 / (1 + taken[title]) for title in sorted(titles))
    news = sum(1 / (1 + taken[font]) for font in sorted(fonts))
    return (fresh + 2.0 * news + 0.4 * len(item.pages)) / (item.size + 15_000)


def _is_same_text(one: Candidate, other: Candidate) -> bool:
    """Whether two documents are versions of one text, or share much of it."""
    shared = len(set(one.marks) & set(other.marks))
    most = 0.25 if one.source.family == other.source.family else 0.06
    titles, others = heading_titles(one), heading_titles(other)
    if len(titles & others) > 0.5 * min(len(titles), len(others)):
        return True
    return shared > most * max(1, min(len(one.marks), len(other.marks)))
