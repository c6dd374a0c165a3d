"""`colfolio diagnose`: why a run does not learn, from its folder or from another trainer's log."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from colfolio.commands.console import console, print_wrapped
from colfolio.commands.findings import print_diagnosis
from colfolio.commands.run_folder import LOG_FILE, RECIPE_FILE
from colfolio.diagnosis.causes import HEALTHY, Diagnosis, diagnose
from colfolio.diagnosis.evidence import Evidence
from colfolio.diagnosis.foreign.diagnosis import diagnose_log
from colfolio.diagnosis.foreign.files import STATE_FILE
from colfolio.diagnosis.foreign.log import ForeignLoss, read_foreign_log
from colfolio.diagnosis.run_evidence import read_run
from colfolio.errors import ColfolioError

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


class Log(NamedTuple):
    """How a log of another trainer is to be read; see `read_foreign_log`."""

    loss: ForeignLoss
    batch: int
    temperature: float | None = None


def diagnose_command(source: Path, log: Log | None = None, *, as_json: bool = False) -> bool:
    """Print what keeps a run from learning, what else is the matter, and what is not.

    Args:
        source: the folder of a run; with `log` a `trainer_state.json`, its checkpoint's folder, the
            folder of all checkpoints, or a CSV with the columns step and loss.

    Returns:
        Whether the run is healthy.

    Raises:
        ColfolioError: there is no such run or log, or it cannot be read.
    """
    if not source.exists():
        raise ColfolioError(f"{source}: there is no such run folder or log")
    run = None
    if log is None:
        run = _run_folder(source)
        evidence, notes = read_run(run)
        diagnosis = diagnose(evidence)
    else:
        source = _log_file(source)
        read = read_foreign_log(source, *log)
        evidence, notes = read.evidence, read.notes
        diagnosis = diagnose_log(read)
    is_healthy = diagnosis.first.cause == HEALTHY
    if as_json:
        plain = _as_json(source, evidence, diagnosis, notes)
        console().print(json.dumps(plain, indent=2), markup=False)
    else:
        out = console()
        print_wrapped(out, f"{source}: {_what(evidence)}", style="dim")
        for note in notes:
            print_wrapped(out, note, style="dim")
        print_diagnosis(out, diagnosis, run)
    return is_healthy


def _run_folder(source: Path) -> Path:
    if source.is_dir():
        if not any((source / name).exists() for name in (LOG_FILE, RECIPE_FILE)):
            is_foreign = _state_file(source) is not None
            told = f", but a {STATE_FILE}: say --loss and --batch" if is_foreign else ""
            raise ColfolioError(
                f"{source}: holds no run: neither {LOG_FILE} nor {RECIPE_FILE} is there{told}"
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
    found = _state_file(source)
    if found is None:
        raise ColfolioError(
            f"{source}: holds no {STATE_FILE}, and no folder checkpoint-N with one; --loss and "
            "--batch are for a log of another trainer"
        )
    return found


def _state_file(folder: Path) -> Path | None:
    """The state in a folder, or in the newest checkpoint in it; None if there is none."""
    if (folder / STATE_FILE).is_file():
        return folder / STATE_FILE
    states = [
        (int(named[1]), path / STATE_FILE)
        for path in folder.iterdir()
        if (named := _CHECKPOINT.fullmatch(path.name)) and (path / STATE_FILE).is_file()
    ]
    return max(states, default=(0, None))[1]


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
