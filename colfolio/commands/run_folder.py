"""The folder of a training run: recipe, log, checkpoints, and the model that came out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from colfolio.config import Settings, load_settings, to_yaml
from colfolio.errors import CheckpointError, RecipeError
from colfolio.training import FREE_SETTINGS, TrainSettings

RECIPE_FILE = "recipe.yaml"
LOG_FILE = "log.jsonl"
CHECKPOINTS = "checkpoints"
MODEL = "model"
FEATURES = "features"
TENSORBOARD = "tensorboard"
REPORT_FILE = "report.html"


class ValidationSettings(Settings):
    """Evaluation during training.

    Args:
        split: of the dataset; None for no evaluation.
        every: steps between two evaluations; the last step is always evaluated.
        pool: negatives of each query, drawn once from the whole split, over which the validation
            loss is taken, so that runs of any batch size can be compared; None: 64, or as many as
            every query has.
    """

    split: str | None = "validation"
    every: int = Field(default=500, ge=1)
    pool: int | None = Field(default=None, ge=1)


class CheckpointSettings(Settings):
    """Saving during training: every so many steps, of which the newest `keep` stay."""

    every: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)


class TrainRecipe(Settings):
    """A training run from beginning to end.

    Args:
        model: the base, a checkpoint folder or hub id.
        dataset: a dataset folder, hub id, CSV or JSONL file.
        split: of the dataset, to train on.
        out: the run folder.
        train: what determines the weights that come out.
    """

    model: str
    dataset: str
    split: str = "train"
    out: str
    train: TrainSettings
    validation: ValidationSettings = ValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run, and its log."""

    path: Path

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.path / CHECKPOINTS

    @property
    def model(self) -> Path:
        """Where the model stands when the run is done."""
        return self.path / MODEL

    @property
    def features(self) -> Path:
        """Where the output of frozen layers is kept across epochs, if it is."""
        return self.path / FEATURES

    @property
    def tensorboard(self) -> Path:
        """Where event files for TensorBoard are, if the recipe asks for them."""
        return self.path / TENSORBOARD

    @property
    def report(self) -> Path:
        """What the run came to, to be read in a browser."""
        return self.path / REPORT_FILE

    @property
    def log(self) -> Path:
        """One JSON object a line: steps and evaluations."""
        return self.path / LOG_FILE

    def check_free(self) -> None:
        """Refuse a folder that already holds a run.

        Raises:
            RecipeError: it does.
        """
        if (self.path / RECIPE_FILE).exists():
            raise RecipeError(
                f"{self.path} already holds a run; continue it with --resume, or choose another out"
            )

    def begin(self, recipe: TrainRecipe) -> None:
        """Make the folder and keep the recipe in it.

        Raises:
            RecipeError: the folder already holds a run.
        """
        self.check_free()
        if self.path.exists():
            self.keep(recipe)
            return
        # a run that is killed leaves a folder that says what it was to be, or none
        aside = self.path.with_name(f".{self.path.name}")
        aside.mkdir(parents=True, exist_ok=True)
        RunFolder(aside).keep(recipe)
        aside.replace(self.path)

    def keep(self, recipe: TrainRecipe) -> None:
        """Write the recipe that the run goes on with."""
        aside = self.path / f".{RECIPE_FILE}"
        aside.write_text(to_yaml(recipe), encoding="utf-8")
        aside.replace(self.path / RECIPE_FILE)

    def rewind(self, step: int) -> None:
        """Leave in the log what was written up to a step; a line cut short by a kill goes too.

        So does what ended the run, for the step that failed is done again.

        Raises:
            CheckpointError: the folder holds no run.
        """
        if not (self.path / RECIPE_FILE).exists():
            raise CheckpointError(f"{self.path}: holds no run to resume")
        if not self.log.exists():
            return
        kept = []
        for line in self.log.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
                is_kept = row["kind"] != "fault" and row["step"] <= step
            except (ValueError, TypeError, KeyError, RecursionError):
                continue
            if is_kept:
                kept.append(line + "\n")
        aside = self.log.with_name(f".{LOG_FILE}")
        aside.write_text("".join(kept), encoding="utf-8")
        aside.replace(self.log)

    def last(self, kind: str) -> dict[str, Any] | None:
        """The last line of a kind in the log, which `rewind` has left whole."""
        if not self.log.exists():
            return None
        rows = map(json.loads, self.log.read_text(encoding="utf-8").splitlines())
        return next((row for row in reversed(list(rows)) if row["kind"] == kind), None)

    def metrics(self) -> dict[str, float]:
        """What the last evaluation of the run came to, by split and metric."""
        row = self.last("evaluation") or {}
        about = ("kind", "step", "split", "loss", "chance", "negatives")
        return {f"{row['split']} {name}": row[name] for name in row if name not in about}

    def append(self, kind: str, values: dict[str, Any]) -> None:
        """Write one line of the log; it is on its way to the disk when this returns.

        A number that is not finite is written as null, for JSON has none.
        """
        line = json.dumps(_finite({"kind": kind} | values), allow_nan=False)
        with self.log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def told_recipe(recipe: TrainRecipe) -> dict[str, Any]:
    """What a model's contract tells of its recipe: folders by name, as paths are of one machine."""
    values = recipe.model_dump(mode="json", exclude={"out"})
    return values | {"model": _name(recipe.model), "dataset": dataset_name(recipe)}


def dataset_name(recipe: TrainRecipe) -> str:
    """A hub id, or the name of a folder or file."""
    return _name(recipe.dataset)


def recipe_of(run: Path, overrides: Sequence[str] = ()) -> TrainRecipe:
    """The recipe that a run folder was made with, to go on with.

    Args:
        overrides: `key=value`, of settings that change no gradient.

    Raises:
        RecipeError: of other settings, or a value does not fit.
    """
    recipe = load_settings(run / RECIPE_FILE, TrainRecipe, overrides)
    free = [f"train.{name}" for name in FREE_SETTINGS]
    for override in overrides:
        key = override.partition("=")[0]
        if ".".join(key.split(".")[:2]) not in free:
            raise RecipeError(
                f"{key} cannot be changed while a run goes on: only what changes no gradient can, "
                f"which is {', '.join(free)}; start a new run"
            )
    return recipe


def _finite(value: Any) -> Any:
    """A value of a log's line, with None for each number in it that is not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return [_finite(inner) for inner in value] if isinstance(value, list | tuple) else value


def _name(path_or_id: str) -> str:
    path = Path(path_or_id)
    return path.name if path.is_absolute() or path.exists() else path_or_id
