"""What trains, from when, at which rate: parts frozen, adapted, and opened in stages.

A model without any of these settings trains in full. `frozen` parts do not train; with `lora` the
adapters do, and of the rest at most the projection. Each stage of `thaw` then opens parts before a
step, with a rate and a warm-up of its own, lower layers at smaller rates (ULMFiT, arXiv:1801.06146,
section 3.2). Opening a layer that has an adapter merges it first: the layer goes on from what it
computes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import AfterValidator, Field, model_validator

from colfolio.config import Settings
from colfolio.errors import RecipeError
from colfolio.models.adapters import LoraSettings, add_lora, has_adapter, merge_layers
from colfolio.models.checkpoint import cast_parameters
from colfolio.models.lora.placing import PROJECTION_NAME
from colfolio.models.parts import Inventory, inventory
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.selectors import ALL, parse_selector
from colfolio.training.optim import OptimiserSettings, ParameterGroup, split_by_decay

_LORA_KEYS = {"visual": "vision", "language_model": "text"}  # which adapt a tower
_STARTS = ("step", "epoch", "margin_flat", "at_chance")


def _checked(selector: str) -> str:
    parse_selector(selector)
    return selector


Selectors = tuple[Annotated[str, AfterValidator(_checked)], ...]


class ThawStage(Settings):
    """Parts that begin to train later than others. Stages open in their order.

    One of `step`, `epoch`, `margin_flat` and `at_chance` says when; the last two count from the
    opening of the stage before.

    Args:
        open: selectors of parts that are frozen until then; `all` is all that still is. Their
            adapters are merged and leave.
        step: opens before this step, counted from 0.
        epoch: opens before the first step that begins so far into the data; 0.5 is half an epoch.
        margin_flat: opens when the margin has had no upward trend over so many windows and the one
            before them, see `thaw_signals`.
        at_chance: opens when the loss was within 2 % of its chance level for so many steps in a
            row.
        lr: the highest learning rate of the topmost layer that opens; the run's one schedule, which
            falls to the run's end, is multiplied in.
        warmup: steps of linear rise, from the opening on.
        depth_decay: a layer's rate is `lr * depth_decay ** d` if it is d layers below the topmost
            that this stage opens. A later stage that opens lower layers begins anew at its own
            `lr`, so give it one below the rate of the lowest layer before it.
    """

    open: Annotated[Selectors, Field(min_length=1)]
    step: int | None = Field(default=None, ge=0)
    epoch: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    margin_flat: int | None = Field(default=None, ge=1)
    at_chance: int | None = Field(default=None, ge=1)
    lr: float = Field(gt=0, allow_inf_nan=False)
    warmup: int = Field(default=0, ge=0)
    depth_decay: float = Field(default=1.0, gt=0, le=1)

    @model_validator(mode="after")
    def _has_one_start(self) -> ThawStage:
        said = [name for name in _STARTS if getattr(self, name) is not None]
        if len(said) != 1:
            told = " and ".join(said) or "none of them"
            raise ValueError(f"a stage opens at one of {', '.join(_STARTS)}, and has {told}")
        return self

    @property
    def start(self) -> str:
        """Which key says when it opens."""
        return next(name for name in _STARTS if getattr(self, name) is not None)


@dataclass(frozen=True, slots=True)
class Opening:
    """What a stage does to a model.

    Args:
        names: parameters that begin to train, as they are called before adapters are merged.
        leaving: parameters of adapters that are merged.
        label: what opens, for a reader.
    """

    names: frozenset[str]
    leaving: frozenset[str]
    label: str


def apply_policy(
    model: ProjectedBackbone, frozen: Sequence[str], lora: LoraSettings | None, seed: int
) -> None:
    """Add adapters and freeze parts of a model, in place, as a run does before its first step.

    With adapters all weights are float32 after it.

    Args:
        seed: of the adapters.

    A model that came with an adapter is frozen but for what that adapter trains.

    Raises:
        ColfolioError: adapters cannot be added.
        RecipeError: a selector, or a name of an adapted layer, takes what the model does not have;
            a selector freezes nothing that would train; or the model came with an adapter, and
            another one is to be added.
    """
    if lora is not None:
        _adapt(model, lora, seed)
    found, trained = inventory(model), frozenset(trained_names(model))
    for selector in frozen:
        try:
            names = found.select([selector])
        except RecipeError as error:
            raise RecipeError(error, "frozen") from None
        if not names & trained:
            raise RecipeError(_frozen_anyway(found, selector, names, lora), "frozen")
        for name in names:
            model.get_parameter(name).requires_grad_(False)


def openings(
    model: ProjectedBackbone, stages: Sequence[ThawStage], first: int = 0
) -> list[Opening]:
    """What stages will do to a model, one after the other; nothing is changed.

    Args:
        first: number of the first of these stages, for errors.

    Raises:
        RecipeError: a stage opens what the model does not have, or what trains by then.
    """
    found = inventory(model)
    trained = frozenset(trained_names(model))
    there = frozenset(found.places)
    done: list[Opening] = []
    for number, stage in enumerate(stages, start=first):
        try:
            opening = _opening(found, stage, trained, there)
        except RecipeError as error:
            raise RecipeError(error, f"thaw.{number}.open") from None
        done.append(opening)
        trained = (trained | opening.names) - opening.leaving
        there -= opening.leaving
    return done


def trained_names(model: ProjectedBackbone) -> list[str]:
    """The parameters that train now."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def open_parts(model: ProjectedBackbone, opening: Opening) -> frozenset[str]:
    """Merge the adapters that leave, and let parameters train, in place; returns their names."""
    merge_layers(model, {_host(name) for name in opening.leaving})
    names = frozenset(name.replace(".base_layer.", ".") for name in opening.names)
    for name, parameter in model.named_parameters():
        if name in names:
            parameter.requires_grad_(True)
    return names


def stage_groups(
    model: ProjectedBackbone,
    names: frozenset[str],
    stage: ThawStage,
    step: int,
    settings: OptimiserSettings,
) -> list[ParameterGroup]:
    """What a stage opened, by depth if that decides the rate.

    Args:
        step: with which it opens.
    """
    found = inventory(model)
    depths = {name: found.places[name].depth for name in names}
    top = max(depths.values())
    by_factor: dict[float, set[str]] = {}
    for name, depth in depths.items():
        by_factor.setdefault(stage.depth_decay ** (top - depth), set()).add(name)
    values = {"base_lr": stage.lr, "opened": step, "warmup": stage.warmup}
    return [
        group
        for factor in sorted(by_factor)
        for group in split_by_decay(
            model,
            by_factor[factor],
            settings,
            part=found.label(by_factor[factor]),
            depth_factor=factor,
            **values,
        )
    ]


def _adapt(model: ProjectedBackbone, lora: LoraSettings, seed: int) -> None:
    if has_adapter(model):
        raise RecipeError(
            "the model has an adapter already, which trains without this key; leave the key out, "
            "or name a whole model, which `colfolio export --merge` makes of an adapter",
            "lora",
        )
    cast_parameters(model, torch.float32)  # what adapters keep of the base is cast with it
    try:
        add_lora(model, lora, seed)
    except RecipeError as error:
        raise RecipeError(str(error).removeprefix(f"{error.key}: "), f"lora.{error.key}") from None


def _frozen_anyway(
    found: Inventory, selector: str, names: frozenset[str], lora: LoraSettings | None
) -> str:
    """Why a selector freezes nothing, and which key leaves out the adapters that lie there."""
    told = (
        f"{selector!r} freezes nothing: beside adapters only they train, and at most the "
        f"projection, so {found.label(names)} is frozen without it; leave it out"
    )
    if lora is None:
        return told
    hosts = {_host(name) for name in names if ".base_layer." in name}
    keys = sorted({_LORA_KEYS.get(host.partition(".")[0], "projection") for host in hosts})
    if keys:
        named = " and ".join(f"`lora.{key}`" for key in keys)
        told += f". The adapters in it train; {named} says which there are"
    return told


def _opening(
    found: Inventory, stage: ThawStage, trained: frozenset[str], there: frozenset[str]
) -> Opening:
    """What one stage does.

    Args:
        trained: what trains by then.
        there: without the adapters that earlier stages merged.
    """
    chosen = found.select(stage.open) & there
    hosts = {_host(name) for name in chosen if ".base_layer." in name}
    adapters = {name for name in there if found.places[name].part == "adapters"}
    leaving = frozenset(name for name in adapters if _host(name) in hosts)
    both = (chosen & trained) - leaving
    if both and ALL not in stage.open:
        raise RecipeError(
            f"{found.label(both)} trains by then already; a stage opens what is frozen, by "
            "`frozen` or beside `lora`, and each parameter once"
        )
    names = chosen - trained - leaving
    if not names:
        raise RecipeError("opens nothing: all of it trains by then already, or was merged")
    return Opening(names, leaving, found.label(names))


def _host(name: str) -> str:
    """The adapted layer of a tensor in it, as checkpoints call it.

    >>> _host("backbone.visual.merger.mlp.0.lora_A.default.weight")
    'visual.merger.mlp.0'
    """
    path = name.partition(".lora_")[0].partition(".base_layer.")[0].removeprefix("backbone.")
    return PROJECTION_NAME if path == "projection" else path
