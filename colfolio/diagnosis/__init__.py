"""What a run will be compared with, what it did and why: ledger, log, curves, report."""

from colfolio.diagnosis.ledgers.ledger import Ledger, check_reachable, make_ledger
from colfolio.diagnosis.ledgers.lines import ledger_lines
from colfolio.diagnosis.ledgers.text import TextLedger, make_text_ledger
from colfolio.diagnosis.reporting.report import (
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
    "Ledger",
    "LoggedEvaluation",
    "LoggedStep",
    "MetricTable",
    "PageHit",
    "RankedImage",
    "ReportData",
    "TextLedger",
    "TrainingLog",
    "check_reachable",
    "ledger_lines",
    "make_ledger",
    "make_text_ledger",
    "read_log",
    "render_report",
    "write_report",
]
