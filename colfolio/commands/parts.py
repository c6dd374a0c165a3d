"""`colfolio parts`: a model by its named parts, what trains of each, and what that takes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, groupby
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

from colfolio.commands.console import console
from colfolio.commands.run_folder import TrainRecipe
from colfolio.config import load_settings
from colfolio.diagnosis.planning.fixed_memory import state_bytes
from colfolio.diagnosis.planning.numerics import WIDE
from colfolio.models.generator import Generator
from colfolio.models.generator_files import TiedHead
from colfolio.models.generator_outline import ModelOutline, model_outline_of
from colfolio.models.parts import Inventory, inventory, ranges
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.selectors import PARTS
from colfolio.training import TrainSettings
from colfolio.training.start import begin_policy, check_settings
from colfolio.training.thaw import openings

_MIB = 2**20
_SHORT = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
}


@dataclass(frozen=True, slots=True)
class _Row:
    """A part, or so many of its layers as are alike in dtype and in what trains.

    Args:
        layers: as in a selector; empty in parts without.
        dtype: of the files.
        trains: `yes`, `no` or `partly`, or the stage that opens all of it.
    """

    part: str
    layers: str
    dtype: str
    trains: str
    weights: tuple[Tensor, ...]


def parts_command(
    model: str, recipe_path: Path | None = None, overrides: Sequence[str] = ()
) -> None:
    """Print the parts of a model, what trains of each, and what that takes in memory.

    No weights are loaded, and of a model on the hub none are fetched.

    Args:
        model: checkpoint, adapter or generator, a folder or hub id.
        recipe_path: whose objective and settings of training hold for the model; None takes the
            model for what its folder says, and has all of it trained.

    Raises:
        ColfolioError: the model cannot be told without its weights, the recipe cannot be honoured,
            or it names parts that the model does not have.
    """
    settings, objective = TrainSettings(steps=1), None
    if recipe_path is not None:
        settings = load_settings(recipe_path, TrainRecipe, overrides).train
        objective = settings.objective
    outline = model_outline_of(model, objective)
    check_settings(settings)
    begin_policy(outline.model, settings)
    found = inventory(outline.model)
    console().print(_head(model, outline.model), markup=False)
    console().print(_table(outline, found, settings))
    state = settings.optimiser.state
    console().print(f"\nMiB while it trains: all in float32, the optimiser's state in {state}")
    if not outline.has_dtypes:
        console().print("dtypes are told by the files with weights, which are not on this machine")


def _head(name: str, model: ProjectedBackbone) -> str:
    trained = _count(weight for weight in model.parameters() if weight.requires_grad)
    total, kind = _count(model.parameters()), model.backbone.config.model_type
    if isinstance(model, Generator):
        is_tied = isinstance(model.projection, TiedHead)
        kind += ", a generator whose head is " + ("its embedding" if is_tied else "the projection")
    return f"{name}: {kind}\n{trained:,} of {total:,} parameters train\n"


def _table(outline: ModelOutline, found: Inventory, settings: TrainSettings) -> Table:
    model = outline.model
    everything = tuple(model.parameters())
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("part", "layers", "parameters", "share", "dtype", "trains"):
        table.add_column(name, justify="right" if name in ("parameters", "share") else "left")
    for name in ("weights", "gradient", "state"):
        table.add_column(name, justify="right")
    opened = _opened_by(model, settings)
    for row in (*_rows(model, found, opened), _Row("all", "", "", "", everything)):
        count = _count(row.weights)
        dtype = row.dtype if outline.has_dtypes or row.part == "adapters" else "?"
        table.add_row(
            row.part,
            row.layers,
            f"{count:,}",
            _share(count / _count(everything)),
            dtype if row.dtype else "",
            row.trains,
            _mib(count * WIDE),
            _mib(_count(weight for weight in row.weights if weight.requires_grad) * WIDE),
            _mib(state_bytes(model, settings, weights=row.weights)),
        )
    return table


def _opened_by(model: ProjectedBackbone, settings: TrainSettings) -> dict[str, str]:
    """The stage that opens each parameter, as errors call it."""
    return {
        name: f"thaw.{number}"
        for number, opening in enumerate(openings(model, settings.thaw))
        for name in opening.names
    }


def _rows(model: ProjectedBackbone, found: Inventory, opened: Mapping[str, str]) -> Iterator[_Row]:
    """The parts from the bottom up, each in as few rows as it has kinds of layers."""
    named = dict(model.named_parameters())

    def kind(item: tuple[int | None, list[str]]) -> tuple[str, str]:
        """Dtype, and whether they train."""
        dtypes = sorted({_SHORT[named[name].dtype] for name in item[1]})
        trains = {_trains(named[name], opened.get(name, "no")) for name in item[1]}
        return ", ".join(dtypes), trains.pop() if len(trains) == 1 else "partly"

    for part in PARTS:
        layers: dict[int | None, list[str]] = {}
        for name, place in found.places.items():
            if place.part == part:
                layers.setdefault(place.layer, []).append(name)
        for (dtype, trains), alike in groupby(layers.items(), kind):
            numbers, names = zip(*alike, strict=True)
            written = ranges(number for number in numbers if number is not None)
            weights = tuple(named[name] for name in chain(*names))
            yield _Row(part, ", ".join(written), dtype, trains, weights)


def _trains(weight: Tensor, otherwise: str) -> str:
    return "yes" if weight.requires_grad else otherwise


def _count(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() for weight in weights)


def _share(share: float) -> str:
    return "<0.1%" if share < 0.0005 else f"{share:.1%}"


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / _MIB:,.1f}"
