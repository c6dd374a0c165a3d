"""What a run's probe shows: scores of answers and others, ranks, and what vectors span."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from matplotlib.ticker import MaxNLocator

from colfolio.diagnosis.evidence import ProbeSignals
from colfolio.diagnosis.reporting.drawing import (
    ACCENT,
    MUTED,
    SMOOTH_POINTS,
    Chart,
    Course,
    binned,
    drawing,
    short,
)

_SHOWN = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the probes: a model learns most at first
_SHARES = frozenset({"accuracy", "same_winner"})


@dataclass(frozen=True, slots=True)
class ProbeRow:
    """A number of the probe in words: what, in which unit, and in the first and last probe."""

    name: str
    unit: str
    first: str
    last: str


def probe_rows(probes: Sequence[ProbeSignals]) -> list[ProbeRow]:
    """What can be told in numbers, beside chance where it has a level."""
    if not probes:
        return []
    first, last = probes[0], probes[-1]
    documents = last.documents
    by_rank = f"1 to {documents}, chance {short((documents + 1) / 2)}"
    table = {
        "rank": ("rank of the answer", by_rank),
        "accuracy": ("answers ranked first", f"of all queries, chance {1 / documents:.1%}"),
        "margin": ("answer less the best other document", "score"),
        "mean_margin": ("answer less the mean other document", "score"),
        "spread": ("spread of a query's scores", "score, standard deviation"),
        "query_rank": ("effective rank of query vectors", f"1 to {last.dim}"),
        "document_rank": ("effective rank of document vectors", f"1 to {last.dim}"),
        "query_cosine": ("vectors of different queries", "cosine, mean"),
        "document_cosine": ("vectors of different documents", "cosine, mean"),
        "same_winner": ("same document token wins everywhere", "of all query tokens"),
    }
    return [
        ProbeRow(told, unit, _told(name, first), _told(name, last))
        for name, (told, unit) in table.items()
    ]


def probe_charts(probes: Sequence[ProbeSignals], course: Course) -> list[Chart]:
    """Each curve over the probes; none for fewer than two."""
    if len(probes) < 2:
        return []
    documents = probes[-1].documents
    rank = f"Rank of the answer among {documents}"
    spans = f"Effective rank of the vectors, of {probes[-1].dim}"
    return [
        _chart(probes, rank, {"rank": ""}, course, chance=(documents + 1) / 2),
        _chart(probes, "Spread of a query's scores", {"spread": ""}, course),
        _chart(probes, spans, {"query_rank": "queries", "document_rank": "documents"}, course),
    ]


def score_histograms(probes: Sequence[ProbeSignals]) -> list[Chart]:
    """The scores at several steps: of answers, and of all other documents, as shares of each."""
    measured = [probe for probe in probes if sum(map(sum, probe.histogram)) > 0]
    if not measured:
        return []
    places = sorted({round(share * (len(measured) - 1)) for share in _SHOWN})
    return [_histogram(measured[place]) for place in places]


def _told(name: str, probe: ProbeSignals) -> str:
    value = float(getattr(probe, name))
    if not isfinite(value):
        return "not finite"
    return f"{value:.1%}" if name in _SHARES else short(value)


def _histogram(probe: ProbeSignals) -> Chart:
    low, high = probe.edges
    with drawing() as drawn:
        axes = drawn.axes
        # the answers' line is the thicker one: it is seen below that of the others
        for counts, colour, name, width in zip(
            probe.histogram, (ACCENT, MUTED), ("answers", "others"), (2.4, 1.0), strict=True
        ):
            edges = np.linspace(low, high, len(counts) + 1)
            shares = np.array(counts) / max(1, sum(counts))
            axes.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
            label = f"{name} ({sum(counts):,})"
            axes.stairs(shares, edges, color=colour, linewidth=width, label=label)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter(lambda share, _: f"{100 * share:.3g}%")
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
        axes.set(xlabel="score", ylabel="share of each")
        above = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": 2}
        axes.legend(frameon=False, labelcolor=MUTED, handlelength=1.2, borderaxespad=0, **above)
    return Chart(f"Scores after step {probe.step:,}", drawn.svg)


def _chart(
    probes: Sequence[ProbeSignals],
    title: str,
    lines: dict[str, str],
    course: Course,
    chance: float | None = None,
) -> Chart:
    """A curve for each of one or two numbers, and a dashed chance level.

    Args:
        lines: what is written at the end of the curve of each number.
    """
    steps = [probe.step for probe in probes]
    with drawing(course) as drawn:
        for (number, name), colour in zip(lines.items(), (ACCENT, MUTED), strict=False):
            values = [getattr(probe, number) for probe in probes]
            if not np.isfinite(values).any():
                continue
            curve = binned(steps, values, SMOOTH_POINTS)
            drawn.draw_curve(*curve, name, colour, solid_capstyle="round")
        if chance is not None:
            drawn.draw_constant("chance", course, chance)
        drawn.axes.set_ylim(bottom=0)
    return Chart(title, drawn.svg)
