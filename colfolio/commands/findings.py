"""How a diagnosis is printed: a cause, its evidence and its mend, and the command to try it."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from colfolio.commands.console import console, print_wrapped, program
from colfolio.commands.run_folder import RECIPE_FILE, RunFolder, TrainRecipe
from colfolio.config import load_settings
from colfolio.diagnosis.causes import HEALTHY, UNKNOWN, Diagnosis, Finding, diagnose
from colfolio.diagnosis.run_evidence import read_evidence
from colfolio.errors import RecipeError
from colfolio.training.start import check_settings

_INDENT = 2


def print_diagnosis(out: Console, diagnosis: Diagnosis, run: Path | None) -> None:
    """Print what was found, each part a paragraph, and what was ruled out.

    Args:
        run: folder of the run, for commands that begin again with its recipe; None: another
            trainer's.
    """
    is_healthy = diagnosis.first.cause == HEALTHY
    for number, finding in enumerate(diagnosis.findings):
        colour = "" if number else " green" if is_healthy else " yellow"
        _print_finding(out, finding, f"bold{colour}", run)
    out.print()
    if diagnosis.ruled_out:
        names = ", ".join(each.cause for each in diagnosis.ruled_out)
        print_wrapped(out, f"ruled out: {names} (--json has the numbers)", style="dim")
    if diagnosis.unasked:
        names = ", ".join(diagnosis.unasked)
        print_wrapped(out, f"not known from this log: {names}", style="dim")


def say_outcome(run: RunFolder) -> None:
    """Say what is the matter with a run that has ended, in a line, and where more stands."""
    finding = diagnose(read_evidence(run.path)).first
    if finding.cause != HEALTHY:
        print_wrapped(console(), _headline(finding), style="yellow")
    command = f"{program()} diagnose {shlex.quote(str(run.path))}"
    console().print(f"report {run.report}; {command}", markup=False)


def command_again(run: Path, change: Mapping[str, str], ranks: int = 1) -> str:
    """The command that trains a run's recipe again, changed, into a folder that is free."""
    settings = [f"{key}={value}" for key, value in change.items()]
    recipe = str(run / RECIPE_FILE)
    shared = ["--ranks", str(ranks)] if ranks > 1 else []
    words = [program(), "train", recipe, *settings, f"out={_free(run)}", *shared]
    return " ".join(map(shlex.quote, words))


def _print_finding(out: Console, finding: Finding, style: str, run: Path | None) -> None:
    out.print()
    print_wrapped(out, _headline(finding), style=style)
    if finding.evidence:
        print_wrapped(out, " ".join(finding.evidence), indent=_INDENT)
    has_recipe = run is not None and (run / RECIPE_FILE).is_file()
    refusal = _refusal(run / RECIPE_FILE, finding.change) if run is not None and has_recipe else ""
    can_begin_again = has_recipe and not refusal
    settings = ", ".join(f"{key}={value}" for key, value in finding.change.items())
    beside = f" ({settings})" if settings and not can_begin_again else ""
    print_wrapped(out, f"{finding.action}{beside}.", indent=_INDENT)
    if refusal:
        print_wrapped(out, f"The recipe does not take that as it is: {refusal}.", indent=_INDENT)
    if settings and run is not None and can_begin_again:
        command = command_again(run, finding.change, read_evidence(run).settled.ranks)
        out.print(f"{' ' * 2 * _INDENT}{command}", markup=False, style="cyan")


def _refusal(recipe: Path, change: Mapping[str, str]) -> str:
    """Why a recipe takes no such change, for what else it says; empty if it does.

    A recipe that is wrong without the change says nothing of it.
    """
    settings = [f"{key}={value}" for key, value in change.items()]
    refused = []
    for overrides in ([], settings):
        try:
            check_settings(load_settings(recipe, TrainRecipe, overrides).train)
        except RecipeError as error:
            refused.append(str(error))
        else:
            refused.append("")
    as_it_is, changed = refused
    return "" if as_it_is else changed


def _headline(finding: Finding) -> str:
    """What is the matter, its name, and how sure that is."""
    title = finding.title[0].upper() + finding.title[1:]
    if finding.cause in (HEALTHY, UNKNOWN):
        return f"{title} ({finding.cause})"
    return f"{title} ({finding.cause}, {finding.sureness})"


def _free(run: Path) -> Path:
    """A folder beside a run's that is not there: `run-2`, and after that `run-3`."""
    folder = run if run.name not in ("", "..") else run.resolve()
    stem, _, number = folder.name.rpartition("-")
    is_again = bool(stem) and number.isdecimal() and folder.with_name(stem).exists()
    name, counted = (stem, int(number)) if is_again else (folder.name, 1)
    while True:
        counted += 1
        free = folder.with_name(f"{name}-{counted}")
        if not free.exists():
            return free
