"""From what was measured to why a model does not learn: named causes, with evidence and mend."""

from colfolio.diagnosis.causes.finding import HEALTHY, UNKNOWN, Diagnosis, Finding, RuledOut
from colfolio.diagnosis.causes.table import diagnose

__all__ = ["HEALTHY", "UNKNOWN", "Diagnosis", "Finding", "RuledOut", "diagnose"]
