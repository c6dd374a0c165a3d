"""The commands of the demo, in order, and how far a demo folder has come."""

from __future__ import annotations

import hashlib
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from colfolio.errors import ColfolioError

QUERY = "installing the package"
_PROGRESS_FILE = "commands.json"


@dataclass(frozen=True, slots=True)
class DemoFolder:
    """Paths of everything that a demo makes."""

    path: Path

    def __truediv__(self, name: str) -> Path:
        return self.path / name


@dataclass(frozen=True, slots=True)
class Command:
    """One command line of the demo, and what it is for.

    Args:
        key: names it in the folder's progress.
        arguments: behind `colfolio`.
        why: a line for people.
    """

    key: str
    arguments: tuple[str, ...]
    why: str

    @property
    def line(self) -> str:
        """The command as one would type it."""
        return shlex.join(("colfolio", *self.arguments))


def bundled(name: str) -> Path:
    """A file or folder that ships with the demo."""
    return Path(str(files("colfolio.demo") / name))


def commands(folder: DemoFolder, seed: int, steps: int | None) -> list[Command]:
    """What the demo runs; each command is public and works alone."""
    documents, strips, pages = (
        str(bundled("documents")),
        str(folder / "strips"),
        str(folder / "pages"),
    )
    model, index = str(folder / "run" / "model"), str(folder / "index")
    base, run = str(folder / "base"), str(folder / "run")
    train = (
        *("train", str(bundled("recipe.yaml"))),
        *(f"model={base}", f"dataset={strips}", f"out={run}", f"train.seed={seed}"),
        *(() if steps is None else (f"train.steps={steps}",)),
    )
    return [
        Command(
            "prepare",
            ("prepare", documents, "--out", strips, "--view", "strip"),
            "cut headings and lines of text out of the documents",
        ),
        Command(
            "init",
            (
                *("init", str(bundled("shape.yaml")), "--dataset", strips),
                *("--out", base, "--seed", str(seed)),
            ),
            "make a tiny base from random weights, its vocabulary from the training split",
        ),
        Command("train", train, "learn to find a section by its title"),
        Command(
            "evaluate",
            ("evaluate", model, strips, "--json", str(folder / "headings.json")),
            "measure on documents of families that training never saw",
        ),
        Command(
            "pages",
            ("prepare", documents, "--out", pages, "--view", "page", "--split", "test"),
            "the same unseen documents as whole pages",
        ),
        Command(
            "index",
            ("index", model, pages, "--split", "test", "--out", index),
            "cut every page into its lines of text, found in the pixels, and index them",
        ),
        Command(
            "evaluate-pages",
            ("evaluate", index, pages, "--json", str(folder / "pages.json")),
            "find whole pages by section titles; nothing was trained for this",
        ),
        Command(
            "search",
            ("search", index, QUERY, "--top-k", "3", "--images", str(folder / "hits")),
            "search them",
        ),
    ]


class Progress:
    """Which commands of a demo folder are done, and the seconds that each took.

    Raises:
        ColfolioError: the folder holds a demo of another seed, length or version, or its file of
            progress is damaged.
    """

    def __init__(self, folder: DemoFolder, seed: int, steps: int | None) -> None:
        self._file = folder / _PROGRESS_FILE
        wish = {"seed": seed, "steps": steps, "made_of": _made_of()}
        known = _read(self._file) or {"wish": wish, "done": [], "seconds": {}}
        if known["wish"] != wish:
            raise ColfolioError(
                f"{folder.path} holds a demo of another seed, length or version "
                f"({known['wish']}, asked for is {wish}); choose another --out"
            )
        self._known = known
        folder.path.mkdir(parents=True, exist_ok=True)
        self._write()

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds spent on each command, interrupted attempts included."""
        return dict(self._known["seconds"])

    def is_done(self, key: str) -> bool:
        """Whether a command has ended well."""
        return key in self._known["done"]

    def spend(self, key: str, seconds: float, *, done: bool) -> None:
        """Note an attempt at a command."""
        before = self._known["seconds"].get(key, 0.0)
        self._known["seconds"][key] = round(before + seconds, 1)
        if done:
            self._known["done"].append(key)
        self._write()

    def _write(self) -> None:
        aside = self._file.with_name(f".{self._file.name}")
        aside.write_text(json.dumps(self._known, indent=2) + "\n", encoding="utf-8")
        aside.replace(self._file)


def run_commands(
    folder: DemoFolder, plan: list[Command], progress: Progress
) -> Iterator[tuple[Command, bool]]:
    """Run what is not done yet, in a process each; yields each command before it runs.

    Yields:
        The command, and whether it was already done by an earlier, interrupted demo.

    Raises:
        ColfolioError: a command failed; it has said why on the terminal.
    """
    for command in plan:
        done = progress.is_done(command.key)
        yield command, done
        if done:
            continue
        begin = time.monotonic()
        with _left_to_the_child():
            code = subprocess.call(
                [sys.executable, "-m", "colfolio.cli", *_arguments(command, folder)]
            )
        progress.spend(command.key, time.monotonic() - begin, done=code == 0)
        if code == 130:
            raise KeyboardInterrupt
        if code:
            raise ColfolioError(f"{command.line}\nended with exit code {code}")


@contextmanager
def _left_to_the_child() -> Iterator[None]:
    """Ctrl-C reaches the command, which saves first; waiting for it must not kill it."""
    before = signal.signal(signal.SIGINT, lambda *_: None)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _arguments(command: Command, folder: DemoFolder) -> tuple[str, ...]:
    """A run that was interrupted is resumed instead of begun."""
    if command.key == "train" and (folder / "run" / "recipe.yaml").exists():
        return ("train", "--resume", str(folder / "run"))
    return command.arguments


def _made_of() -> str:
    """A short hash of what ships with the demo and decides what comes out."""
    digest = hashlib.sha256()
    for name in ("recipe.yaml", "shape.yaml", "documents/SOURCES.md"):
        digest.update(bundled(name).read_bytes())
    return digest.hexdigest()[:12]


def _read(file: Path) -> dict[str, Any] | None:
    if not file.exists():
        return None
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        return {"wish": known["wish"], "done": known["done"], "seconds": known["seconds"]}
    except (ValueError, KeyError, TypeError):
        raise ColfolioError(
            f"{file}: damaged, or of another version; choose another --out"
        ) from None
