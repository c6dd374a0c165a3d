"""Questions that have an answer before a run: passed or failed, each with its number."""

from colfolio.diagnosis.preflight.check import Check, failures
from colfolio.diagnosis.preflight.measured import Measured, measure_run
from colfolio.diagnosis.preflight.model_checks import check_model
from colfolio.diagnosis.preflight.recipe_checks import check_first, check_run

__all__ = [
    "Check",
    "Measured",
    "check_first",
    "check_model",
    "check_run",
    "failures",
    "measure_run",
]
