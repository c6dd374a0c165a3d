"""A ledger in words: the lines of a terminal, and the same as rows of a table."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from colfolio.diagnosis.ledgers.counts import MASKED
from colfolio.diagnosis.ledgers.ledger import Ledger, Range, counted
from colfolio.diagnosis.ledgers.text import TextLedger, text_ledger_rows
from colfolio.diagnosis.training_log import LoggedStep

_COLUMNS = 80
_ROUNDING = 1e-6  # of a level in float32


def ledger_lines(ledger: Ledger | TextLedger) -> list[str]:
    """What a terminal of 80 columns shows before the first step."""
    rows = text_ledger_rows(ledger) if isinstance(ledger, TextLedger) else ledger_rows(ledger)
    width = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, text in rows:
        first, *others = textwrap.wrap(text, _COLUMNS - width)
        lines += [f"{name:<{width}}{first}", *(" " * width + other for other in others)]
    return lines


def ledger_rows(ledger: Ledger) -> list[tuple[str, str]]:
    """Name and text of each line; numbers that stand without their range are means."""
    computed = ", ".join(f"{name} {value}" for name, value in ledger.computed_with.items())
    rows = [
        ("batch", _batch(ledger)),
        ("step", _step(ledger)),
        ("documents", f"{_range(ledger.documents)} in a batch"),
        ("brought", _brought(ledger)),
        ("candidates", _candidates(ledger)),
        ("asked for", _asked_for(ledger)),
        ("masked", _left_out(ledger, [why for why in ledger.left_out if why in MASKED])),
        ("copies", _copies(ledger)),
        ("left out", _left_out(ledger, [why for why in ledger.left_out if why not in MASKED])),
        ("sitting out", _sitting_out(ledger)),
        ("loss", f"{ledger.loss}: chance {ledger.chance:.3f}, floor {_short(ledger.floor)}"),
        ("validation", ledger.validation),
        ("trains", ledger.trains),
        ("computed", computed),
        ("counted", f"in {counted(ledger.batches, 'batch', 'batches')}, without reading an image"),
    ]
    return [(name, text) for name, text in rows if text]


def compared_line(steps: Sequence[LoggedStep]) -> str:
    """What queries were compared with while a run went on; empty if its log does not say."""
    candidates = [step.candidates for step in steps if step.candidates is not None]
    if not candidates:
        return ""
    masked = [step.masked for step in steps if step.masked is not None]
    ignored = f", and {_mean(masked):.2f} were masked for it" if masked else ""
    skipped = sum(step.is_skipped for step in steps)
    overflow = f" Skipped, for gradients overflowed: {_steps(skipped)}." if skipped else ""
    return (
        f"In {_steps(len(steps))} a query was compared with "
        f"{_mean(candidates):.1f} documents on average ({min(candidates):.1f} to "
        f"{max(candidates):.1f} in a step){ignored}.{overflow}"
    )


def _batch(ledger: Ledger) -> str:
    queries = counted(ledger.rows, "query", "queries")
    if ledger.ranks == 1:
        return f"{queries} in 1 rank"
    least, most = ledger.rows_of_rank
    each = f"{least} each" if least == most else f"{least} or {most} each"
    return f"{queries}, shared by {ledger.ranks} ranks: {each}"


def _step(ledger: Ledger) -> str:
    queries = counted(ledger.rows * ledger.accumulation, "query", "queries")
    if ledger.accumulation == 1:
        return f"{queries}: 1 batch"
    return (
        f"{queries}: {ledger.accumulation} batches of {ledger.rows:,}, each compared within itself"
    )


def _brought(ledger: Ledger) -> str:
    text = counted(ledger.rows, "positive", "positives")
    if ledger.hard_negatives:
        text += f" + {ledger.rows * ledger.hard_negatives:,.1f} hard negatives"
        if ledger.with_hard_negatives < 1:
            text += f" ({ledger.with_hard_negatives:.0%} of queries have any)"
    return f"{text} - {ledger.twice:,.1f} brought twice" if ledger.twice else text


def _candidates(ledger: Ledger) -> str:
    at_most = "" if ledger.copies == "none" else "at most "
    return f"{at_most}{_range(ledger.candidates)} for a query, an answer among them"


def _asked_for(ledger: Ledger) -> str:
    if ledger.wanted is None:
        return ""
    fewer = f"; {ledger.short_of_wanted:.1%} of queries get fewer" if ledger.short_of_wanted else ""
    return f"{ledger.wanted:,} or more for the median query{fewer}"


def _left_out(ledger: Ledger, reasons: Sequence[str]) -> str:
    numbers = [(ledger.left_out[why], why) for why in reasons]
    return ", ".join(f"{number:,.2f} {why}" for number, why in numbers if number)


def _copies(ledger: Ledger) -> str:
    if ledger.copies == "none":
        return ""
    return (
        f"{ledger.copies} copies of an answer are masked too, but known only once images are read"
    )


def _sitting_out(ledger: Ledger) -> str:
    if not ledger.sitting_out:
        return ""
    return (
        f"{ledger.sitting_out:.2%} of queries, with nothing to be told from in their batch; their "
        "documents are candidates of the others"
    )


def _range(numbers: Range) -> str:
    if numbers.least == numbers.most:
        return _plain(numbers.median)
    least, most = _plain(numbers.least), _plain(numbers.most)
    return f"median {_plain(numbers.median)} ({least} to {most})"


def _plain(number: float) -> str:
    return f"{number:,.1f}".removesuffix(".0")


def _steps(number: int) -> str:
    return counted(number, "step", "steps")


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _short(level: float) -> str:
    return f"{level:.1e}" if _ROUNDING < level < 0.001 else f"{max(0.0, level):.3f}"
