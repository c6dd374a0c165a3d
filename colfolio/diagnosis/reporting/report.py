"""The report of a run: one HTML file that holds everything it shows and needs no network.

It is rendered from plain values (`ReportData`); every text in it is escaped. Images lie in the file
as data URIs, curves as inline SVG.
"""

from __future__ import annotations

import base64
import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jinja2
import numpy as np
from jaxtyping import UInt8
from PIL import Image

from colfolio.diagnosis.causes import HEALTHY, Diagnosis, diagnose
from colfolio.diagnosis.ledgers.lines import compared_line, ledger_rows
from colfolio.diagnosis.ledgers.text import text_ledger_rows
from colfolio.diagnosis.reporting.charts import run_course, training_charts
from colfolio.diagnosis.reporting.drawing import short, stretch_size
from colfolio.diagnosis.reporting.heat_examples import HeatExample
from colfolio.diagnosis.reporting.part_charts import part_charts, part_rows, zero_gradients
from colfolio.diagnosis.reporting.probe_charts import probe_charts, probe_rows, score_histograms
from colfolio.diagnosis.run_evidence import evidence_of_log
from colfolio.diagnosis.training_log import TrainingLog

MAX_REPORT_BYTES = 3_000_000

_PAGE_WIDTHS = (900, 700, 520, 380, 260)  # the first at which the file is small enough


@runtime_checkable
class MetricLike(Protocol):
    """A mean with its interval beside chance and a baseline; `evaluation.Metric` is one."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def value(self) -> float: ...  # noqa: D102
    @property
    def low(self) -> float: ...  # noqa: D102
    @property
    def high(self) -> float: ...  # noqa: D102
    @property
    def chance(self) -> float: ...  # noqa: D102
    @property
    def baseline(self) -> float: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Highlight:
    """A number at the top of the report, ready to print, and what it stands beside.

    Args:
        is_validation: it was measured on the run's validation split: where the diagnosis finds that
            this measures nothing, the number says so.
    """

    label: str
    value: str
    note: str = ""
    is_validation: bool = False


@dataclass(frozen=True, slots=True)
class CommandRun:
    """A command as typed, and how long it took."""

    command: str
    seconds: float | None = None


@dataclass(frozen=True, slots=True)
class MetricTable:
    """An evaluation: its metrics, and the same ones over queries unseen in training if known."""

    title: str
    metrics: Sequence[MetricLike]
    unseen: Sequence[MetricLike] = ()
    caption: str = ""


@dataclass(frozen=True, slots=True)
class RankedImage:
    """A candidate among the top of a query."""

    image: UInt8[np.ndarray, "height width 3"]
    score: float
    caption: str
    is_right: bool


@dataclass(frozen=True, slots=True)
class Example:
    """A query, the image that answers it with its rank, and the images ranked first."""

    query: str
    rank: int
    answer: UInt8[np.ndarray, "height width 3"]
    top: Sequence[RankedImage]
    caption: str = ""


@dataclass(frozen=True, slots=True)
class PageHit:
    """A page found for a query, its heat map drawn in; `is_right` is None where nobody knows."""

    query: str
    image: UInt8[np.ndarray, "height width 3"]
    caption: str
    score: float
    is_right: bool | None = None


@dataclass(frozen=True, slots=True)
class ReportData:
    """All that a report shows; a part that is empty is left out.

    Args:
        title: the heading.
        summary: a sentence or two below it.
        highlights: the numbers that matter.
        commands: what was run, in order.
        recipe: the training recipe as YAML.
        log: the training run's log.
        chance_ndcg: nDCG@5 of a random order of the validation candidates.
        tables: evaluations.
        hits: queries whose answer came first.
        misses: queries whose answer did not.
        page_hits: answers on whole pages.
        heat: where the scores of hits and misses come from.
        notes: what the reader should know, a paragraph each.
        environment: name and value: machine, versions, seed.
    """

    title: str
    summary: str = ""
    highlights: Sequence[Highlight] = ()
    commands: Sequence[CommandRun] = ()
    recipe: str = ""
    log: TrainingLog | None = None
    chance_ndcg: float | None = None
    tables: Sequence[MetricTable] = ()
    hits: Sequence[Example] = ()
    misses: Sequence[Example] = ()
    page_hits: Sequence[PageHit] = ()
    heat: Sequence[HeatExample] = ()
    notes: Sequence[str] = ()
    environment: Sequence[tuple[str, str]] = ()


def write_report(report: ReportData, path: Path) -> None:
    """Write the report, aside first and then renamed, so that no half-written file is left."""
    aside = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        aside.write_text(render_report(report), encoding="utf-8")
        aside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            aside.unlink()


def render_report(report: ReportData) -> str:
    """The report as HTML; pages are shown at the largest width that keeps it below 3 MB."""
    template = _environment().get_template("report.html")
    training = _training_of(report)
    html = ""
    for width in _PAGE_WIDTHS:
        html = template.render(report=report, page_width=width, **training)
        if len(html.encode()) <= MAX_REPORT_BYTES:
            break
    return html


def image_uri(image: UInt8[np.ndarray, "height width 3"], max_width: int) -> str:
    """The image as a WebP data URI, scaled down to a width."""
    picture = Image.fromarray(image)
    if picture.width > max_width:
        height = max(1, round(picture.height * max_width / picture.width))
        picture = picture.resize((max_width, height), Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    picture.save(stream, format="WEBP", quality=75, method=4)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _training_of(report: ReportData) -> dict[str, Any]:
    """What the report says of the training run, by the template's names."""
    log = report.log or TrainingLog((), ())
    evidence, course = evidence_of_log(log), run_course(log)
    probes = evidence.probes
    diagnosis = diagnose(evidence) if log.steps or log.facts else None
    doubt, parts = _doubt_of_validation(diagnosis), part_rows(log.steps)
    return {
        "diagnosis": diagnosis,
        "healthy": HEALTHY,
        "doubt": doubt,
        "curves": training_charts(log, report.chance_ndcg, doubt),
        "stretch": stretch_size(len(log.steps)),
        "parts": parts,
        "has_dead": any(part.last.dead is not None for part in parts),
        "zero_gradients": zero_gradients(parts),
        "part_curves": part_charts(log.steps, course),
        "probe": probe_rows(probes),
        "probe_steps": [probe.step for probe in (*probes[:1], *probes[1:][-1:])],
        "probe_curves": probe_charts(probes, course),
        "histograms": score_histograms(probes),
        "ledger": _ledger_of(log),
        "is_text": log.text_ledger is not None,
        "compared": compared_line(log.steps),
        "has_pool": any("negatives" in row.values for row in log.evaluations),
        "marks": course.marks,
    }


def _doubt_of_validation(diagnosis: Diagnosis | None) -> str:
    """Why numbers of the validation split measure nothing; empty where that is not known."""
    findings = diagnosis.findings if diagnosis else ()
    leaked = [finding for finding in findings if finding.cause == "leaked_split"]
    return f"Leaked: {' '.join(leaked[0].evidence)}" if leaked else ""


def _ledger_of(log: TrainingLog) -> list[tuple[str, str]]:
    if log.text_ledger is not None:
        return text_ledger_rows(log.text_ledger)
    return ledger_rows(log.ledger) if log.ledger else []


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("colfolio.diagnosis.reporting", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["image_uri"] = image_uri
    environment.filters["duration"] = _duration
    environment.filters["short"] = short
    return environment


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
