"""A ledger in words: the lines of a terminal, and the same as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence

from colfolio.diagnosis.ledger import Ledger, Range
from colfolio.diagnosis.training_log import LoggedStep

_ROUNDING = 1e-6  # of a level in float32


def ledger_lines(ledger: Ledger) -> list[str]:
    """What a terminal shows before the first step."""
    rows = ledger_rows(ledger)
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def ledger_rows(ledger: Ledger) -> list[tuple[str, str]]:
    """Name and text of each line; numbers that stand without their range are means."""
    computed = ", ".join(f"{name} {value}" for name, value in ledger.computed_with.items())
    rows = [
        ("batch", _batch(ledger)),
        ("step", _step(ledger)),
        ("documents", f"{_range(ledger.documents)} in a batch"),
        ("brought", _brought(ledger)),
        ("candidates", _candidates(ledger)),
        ("left out", _left_out(ledger)),
        ("loss", f"{ledger.loss}: chance {ledger.chance:.3f}, floor {_short(ledger.floor)}"),
        ("computed", computed),
        ("counted", f"in {_count(ledger.batches, 'batch', 'batches')}, without reading an image"),
    ]
    return [(name, text) for name, text in rows if text]


def compared_line(steps: Sequence[LoggedStep]) -> str:
    """What queries were compared with while a run went on; empty if its log does not say."""
    candidates = [step.candidates for step in steps if step.candidates is not None]
    if not candidates:
        return ""
    masked = [step.masked for step in steps if step.masked is not None]
    ignored = f", and {_mean(masked):.2f} were ignored for it" if masked else ""
    skipped = sum(step.is_skipped for step in steps)
    overflow = f" Skipped, for gradients overflowed: {_steps(skipped)}." if skipped else ""
    return (
        f"In {_steps(len(steps))} a query was compared with "
        f"{_mean(candidates):.1f} documents on average ({min(candidates):.1f} to "
        f"{max(candidates):.1f} in a step){ignored}.{overflow}"
    )


def _batch(ledger: Ledger) -> str:
    queries = _count(ledger.rows, "query", "queries")
    if ledger.ranks == 1:
        return f"{queries} in 1 rank"
    least, most = ledger.rows_of_rank
    each = f"{least} each" if least == most else f"{least} or {most} each"
    return f"{queries}, shared by {ledger.ranks} ranks: {each}"


def _step(ledger: Ledger) -> str:
    queries = _count(ledger.rows * ledger.accumulation, "query", "queries")
    if ledger.accumulation == 1:
        return f"{queries}: 1 batch"
    return f"{queries}: {ledger.accumulation} batches of {ledger.rows}, each compared within itself"


def _brought(ledger: Ledger) -> str:
    text = f"{ledger.rows} positives"
    if ledger.hard_negatives:
        text += f" + {ledger.rows * ledger.hard_negatives:.1f} hard negatives"
        if ledger.with_hard_negatives < 1:
            text += f" ({ledger.with_hard_negatives:.0%} of queries have any)"
    return f"{text} - {ledger.twice:.1f} brought twice" if ledger.twice else text


def _candidates(ledger: Ledger) -> str:
    text = f"{_range(ledger.candidates)} for a query"
    if ledger.wanted is None:
        return text
    fewer = f", {ledger.short_of_wanted:.1%} of queries get fewer" if ledger.short_of_wanted else ""
    return f"{text}; the recipe asks for {ledger.wanted}{fewer}"


def _left_out(ledger: Ledger) -> str:
    parts = [f"{number:.2f} {why}" for why, number in ledger.left_out.items() if number]
    if ledger.copies != "none":
        parts.append(f"{ledger.copies} copies of an answer as they are seen")
    return ", ".join(parts) or "nothing"


def _range(numbers: Range) -> str:
    if numbers.least == numbers.most:
        return f"{numbers.median:g}"
    return f"median {numbers.median:g} ({numbers.least:g} to {numbers.most:g})"


def _count(number: int, one: str, several: str) -> str:
    return f"{number:,} {one if number == 1 else several}"


def _steps(number: int) -> str:
    return _count(number, "step", "steps")


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers)


def _short(level: float) -> str:
    return f"{level:.1e}" if _ROUNDING < level < 0.001 else f"{max(0.0, level):.3f}"
