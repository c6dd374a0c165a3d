"""`colfolio diagnose`: why a run does not learn, from its folder or from another trainer's log."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.text import Text

from colfolio.commands.console import console
from colfolio.commands.run_folder import LOG_FILE, RECIPE_FILE
from colfolio.diagnosis.causes import HEALTHY, Diagnosis, Finding, diagnose
from colfolio.diagnosis.evidence import Evidence
from colfolio.diagnosis.foreign_files import STATE_FILE
from colfolio.diagnosis.foreign_log import ForeignLoss, read_foreign_log
from colfolio.diagnosis.run_evidence import read_evidence
from colfolio.errors import ColfolioError

_NAME_WIDTH = 20


class Log(NamedTuple):
    """How a log of another trainer is to be read; see `read_foreign_log`."""

    loss: ForeignLoss
    batch: int
    temperature: float | None = None


def diagnose_command(source: Path, log: Log | None = None, *, as_json: bool = False) -> bool:
    """Print what keeps a run from learning, what else is the matter, and what is not.

    Args:
        source: the folder of a run; with `log` a `trainer_state.json`, its checkpoint's folder, or
            a CSV with the columns step and loss.

    Returns:
        Whether the run is healthy.

    Raises:
        ColfolioError: there is no such run or log, or it cannot be read.
    """
    if not source.exists():
        raise ColfolioError(f"{source}: there is no such run folder or log")
    if log is None:
        evidence, notes = read_evidence(_run_folder(source)), ()
        diagnosis = diagnose(evidence)
    else:
        read = read_foreign_log(_log_file(source), *log)
        evidence, notes = read.evidence, read.notes
        diagnosis = _without_settings(diagnose(evidence))
    is_healthy = diagnosis.first.cause == HEALTHY
    if as_json:
        plain = _as_json(source, evidence, diagnosis, notes)
        console().print(json.dumps(plain, indent=2), markup=False)
    else:
        _print(source, evidence, diagnosis, notes)
    return is_healthy


def _run_folder(source: Path) -> Path:
    if source.is_dir():
        if not any((source / name).exists() for name in (LOG_FILE, RECIPE_FILE)):
            raise ColfolioError(
                f"{source}: holds no run: neither {LOG_FILE} nor {RECIPE_FILE} is there"
            )
        return source
    if source.name == LOG_FILE:
        return source.parent
    raise ColfolioError(
        f"{source}: is no run folder; for a {STATE_FILE} or a CSV of another trainer say --loss "
        "and --batch"
    )


def _log_file(source: Path) -> Path:
    if not source.is_dir():
        return source
    if not (source / STATE_FILE).is_file():
        raise ColfolioError(
            f"{source}: holds no {STATE_FILE}; --loss and --batch are for a log of another trainer"
        )
    return source / STATE_FILE


def _without_settings(diagnosis: Diagnosis) -> Diagnosis:
    """The same, without the settings of recipes that another trainer does not have."""
    findings = tuple(replace(finding, change={}) for finding in diagnosis.findings)
    return replace(diagnosis, findings=findings)


def _print(source: Path, evidence: Evidence, diagnosis: Diagnosis, notes: Sequence[str]) -> None:
    out = console()
    out.print(f"{source}: {_what(evidence)}", style="dim", markup=False)
    for note in notes:
        out.print(note, style="dim", markup=False)
    colour = "green" if diagnosis.first.cause == HEALTHY else "yellow"
    _paragraph(out, diagnosis.first, f"bold {colour}")
    for finding in diagnosis.findings[1:]:
        _paragraph(out, finding, "bold")
    if diagnosis.ruled_out:
        out.print("\nruled out")
        for each in diagnosis.ruled_out:
            out.print(f"  {each.cause:<{_NAME_WIDTH}}  {each.why}", markup=False)
    if diagnosis.unasked:
        named = ", ".join(name.replace("_", " ") for name in diagnosis.unasked)
        out.print(f"\nnot known from this log: {named}", style="dim", markup=False)


def _paragraph(out: Console, finding: Finding, style: str) -> None:
    told = finding.paragraph()
    end = len(finding.title) + 1
    out.print()
    out.print(Text.assemble((told[:end], style), told[end:]))


def _what(evidence: Evidence) -> str:
    """How far the run came."""
    if not evidence.steps:
        return "no step yet"
    last = evidence.steps[-1]
    chance = "" if last.chance is None else f", chance {last.chance:.4f}"
    planned = f" of {evidence.settled.steps:,}" if evidence.settled.steps else ""
    return f"{evidence.settled.loss}, step {last.step:,}{planned}, loss {last.loss:.4f}{chance}"


def _as_json(
    source: Path, evidence: Evidence, diagnosis: Diagnosis, notes: Sequence[str]
) -> dict[str, Any]:
    findings = [asdict(finding) | {"told": finding.paragraph()} for finding in diagnosis.findings]
    return {
        "source": str(source),
        "cause": diagnosis.first.cause,
        "steps": evidence.steps[-1].step if evidence.steps else 0,
        "findings": findings,
        "ruled_out": [asdict(each) for each in diagnosis.ruled_out],
        "unasked": list(diagnosis.unasked),
        "notes": list(notes),
    }
