"""What a run did and why: its log, its curves, and a report that can be kept."""

from colfolio.diagnosis.report import (
    CommandRun,
    Example,
    Highlight,
    MetricTable,
    PageHit,
    RankedImage,
    ReportData,
    render_report,
    write_report,
)
from colfolio.diagnosis.training_log import LoggedEvaluation, LoggedStep, TrainingLog, read_log

__all__ = [
    "CommandRun",
    "Example",
    "Highlight",
    "LoggedEvaluation",
    "LoggedStep",
    "MetricTable",
    "PageHit",
    "RankedImage",
    "ReportData",
    "TrainingLog",
    "read_log",
    "render_report",
    "write_report",
]
