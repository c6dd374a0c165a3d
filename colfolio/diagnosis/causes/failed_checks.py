"""What failed before the first step of a run that was begun all the same."""

from __future__ import annotations

from collections.abc import Collection

from colfolio.diagnosis.causes.finding import Finding
from colfolio.diagnosis.causes.reading import Reading

FAILED_CHECK = "failed_check"


def failed_checks(
    reading: Reading, found: Collection[str], ruled_out: Collection[str]
) -> list[Finding]:
    """A finding for each cause that a check named and that is not found otherwise.

    What the run itself has ruled out since counts against the check where the run learns: it asked
    a few rows.

    Args:
        found, ruled_out: causes, by all that is known of the run beside its checks.
    """
    known = set(found) if reading.is_poor else {*found, *ruled_out}
    findings: dict[str, Finding] = {}
    for check in reading.evidence.checks:
        cause = check.cause or FAILED_CHECK
        if not check.passed and cause not in known:
            title = f'the check "{check.name}" failed before the first step, and was passed over'
            action = "Mend that and begin again; colfolio check makes all checks of a recipe"
            finding = Finding(cause, title, (_sentence(check.told),), "certain", action)
            findings.setdefault(cause, finding)
    return list(findings.values())


def _sentence(told: str) -> str:
    return told if told.endswith(".") else f"{told}."
