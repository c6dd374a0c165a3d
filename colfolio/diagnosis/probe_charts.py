"""What a run's probe shows: scores of answers and others, ranks, and what vectors span."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from colfolio.diagnosis.drawing import (
    ACCENT,
    MUTED,
    SMOOTH_POINTS,
    Mark,
    binned,
    draw_end,
    draw_level,
    drawing,
    short,
)
from colfolio.diagnosis.evidence import ProbeSignals

_SHOWN = (0.0, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)  # of the probes: a model learns most at first
_Measured = Callable[[ProbeSignals], float]


def probe_charts(probes: Sequence[ProbeSignals], marks: Sequence[Mark]) -> list[tuple[str, str]]:
    """Title and SVG of each curve over the probes; none for fewer than two.

    Args:
        marks: steps to mark.
    """
    if len(probes) < 2:
        return []
    documents = probes[-1].documents
    rank = _chart(
        probes,
        f"Rank of the answer among {documents}",
        {"rank": lambda probe: probe.rank},
        marks,
        chance=(documents + 1) / 2,
    )
    spread = _chart(probes, "Spread of a query's scores", {"": lambda probe: probe.spread}, marks)
    spanned = _chart(
        probes,
        f"Effective rank of the vectors, of {probes[-1].dim}",
        {
            "queries": lambda probe: probe.query_rank,
            "documents": lambda probe: probe.document_rank,
        },
        marks,
    )
    return [rank, spread, spanned]


def score_histograms(probes: Sequence[ProbeSignals]) -> list[tuple[str, str]]:
    """Title and SVG of the scores at several steps: of answers, and of all other documents."""
    measured = [probe for probe in probes if sum(map(sum, probe.histogram)) > 0]
    if not measured:
        return []
    places = sorted({round(share * (len(measured) - 1)) for share in _SHOWN})
    return [_histogram(measured[place]) for place in places]


def _histogram(probe: ProbeSignals) -> tuple[str, str]:
    low, high = probe.edges
    with drawing(across="score") as drawn:
        axes = drawn.axes
        for counts, colour, name in zip(
            probe.histogram, (ACCENT, MUTED), ("answers", "others"), strict=True
        ):
            edges = np.linspace(low, high, len(counts) + 1)
            shares = np.array(counts) / max(1, sum(counts))
            axes.stairs(shares, edges, color=colour, fill=True, alpha=0.25)
            axes.stairs(shares, edges, color=colour, linewidth=1.4, label=name)
        axes.set_ylim(bottom=0)
        axes.set_yticks([])
        axes.legend(frameon=False, loc="upper right", labelcolor=MUTED, handlelength=1.2)
    return f"Scores after step {probe.step:,}", drawn.svg


def _chart(
    probes: Sequence[ProbeSignals],
    title: str,
    lines: Mapping[str, _Measured],
    marks: Sequence[Mark],
    chance: float | None = None,
) -> tuple[str, str]:
    """A curve for each of one or two numbers, and a dashed chance level."""
    steps = [probe.step for probe in probes]
    with drawing(marks) as drawn:
        axes = drawn.axes
        for (name, measured), colour in zip(lines.items(), (ACCENT, MUTED), strict=False):
            curve = binned(steps, [measured(probe) for probe in probes], SMOOTH_POINTS)
            label = f"{name} {short(curve[1][-1])}"
            axes.plot(*curve, color=colour, linewidth=1.8, label=label, solid_capstyle="round")
            if len(lines) == 1:
                draw_end(axes, *curve, colour)
        if chance is not None:
            ends = np.array([steps[0], steps[-1]], dtype=np.float64)
            draw_level(axes, ends, np.array([chance, chance]), "chance")
        if len(lines) > 1:
            axes.legend(frameon=False, loc="best", labelcolor=MUTED, handlelength=1.2)
        axes.set_ylim(bottom=0)
    return title, drawn.svg
