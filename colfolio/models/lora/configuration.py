"""What an adapter's configuration asks for; an option that is not honoured is refused by name."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from torch import nn

from colfolio.config import Settings, validated
from colfolio.errors import CheckpointError, RecipeError
from colfolio.models.contract import PROJECTION
from colfolio.models.files import read_json
from colfolio.models.formats.layouts import Layout
from colfolio.models.formats.reading import ADAPTER_FILE
from colfolio.models.lora.placing import PROJECTION_NAME, LoraPlan, import_peft
from colfolio.models.weights import listed

# What means nothing once an adapter is trained, or is of a method that another key switches on.
_SAYS_NOTHING = {
    *("task_type", "auto_mapping", "peft_type", "peft_version", "inference_mode"),
    *("init_lora_weights", "megatron_core", "qalora_group_size"),
}
# With these alone the base stays what it was when the adapter was begun.
_HONEST_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")

_PATTERN_ERRORS = (re.error, OverflowError, RecursionError)  # of a pattern that is none

Names = str | list[str]


class AdapterConfig(Settings):
    """The fields of peft's `LoraConfig` that are honoured, by its names."""

    base_model_name_or_path: str | None = None
    revision: str | None = None
    r: int = Field(ge=1)
    lora_alpha: float = Field(gt=0)
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    use_rslora: bool = False
    target_modules: Names
    exclude_modules: Names | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: Names | None = None
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] = Field(default={})
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(default={})
    modules_to_save: list[str] | None = None


def read_adapter_config(folder: Path) -> AdapterConfig:
    """The configuration of an adapter folder.

    Raises:
        CheckpointError: it is missing, damaged, of another method than LoRA, or asks for an option
            that is not honoured here.
    """
    path = folder / ADAPTER_FILE
    values = read_json(path)
    if values.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type is {values.get('peft_type')!r}, not 'LORA'")
    known = {name: values[name] for name in AdapterConfig.model_fields if name in values}
    rest = {n: v for n, v in values.items() if n not in known and n not in _SAYS_NOTHING}
    asked = [f"{n} {v!r}" for n, v in rest.items() if v not in (None, False, "none", [], {})]
    start = values.get("init_lora_weights")
    if start not in _HONEST_STARTS:
        asked.append(f"init_lora_weights {start!r} (which changes the base)")
    if asked:
        raise CheckpointError(
            f"{path}: asks for what is not honoured here: {listed(asked)}; merge the adapter into "
            "its base with peft, and load the merged model"
        )
    try:
        return validated(known, AdapterConfig, str(path))
    except RecipeError as error:
        raise CheckpointError(str(error)) from None


def plan_hash(config: AdapterConfig) -> str:
    """SHA-256 of what a configuration asks for; where the base lies is no part of it."""
    # fields that a later version adds are at their default in an older file
    asked = config.model_dump(
        mode="json", exclude_defaults=True, exclude={"base_model_name_or_path", "revision"}
    )
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def plan_asked(config: AdapterConfig, root: nn.Module, layout: Layout, origin: str) -> LoraPlan:
    """The layers of a model that a configuration means, and what each gets.

    Args:
        layout: the names in which the configuration speaks of the model.

    Raises:
        CheckpointError: it means no layer, one that is not linear, or a pattern for rank or alpha
            fits none.
    """
    chosen = _targets(config, root, layout, origin)
    if not chosen:
        raise CheckpointError(
            f"{origin}: target_modules {config.target_modules!r} fits no layer of the base"
        )
    other = [name for name in chosen if not isinstance(root.get_submodule(name), nn.Linear)]
    if other:
        raise CheckpointError(f"{origin}: adapts layers that are not linear: {listed(other)}")
    trained = layout.theirs(PROJECTION).removesuffix(".")
    wrong = sorted(set(config.modules_to_save or ()) - {trained})
    if wrong:
        raise CheckpointError(
            f"{origin}: modules_to_save has {listed(wrong)}; beside adapters the projection "
            f"({trained}) alone is trained wholly"
        )
    return LoraPlan(
        _each(chosen, config.rank_pattern, config.r, f"{origin}: rank_pattern"),
        _each(chosen, config.alpha_pattern, config.lora_alpha, f"{origin}: alpha_pattern"),
        config.lora_dropout,
        config.use_rslora,
        trains_projection=bool(config.modules_to_save),
    )


def target_pattern(root: nn.Module, chosen: Iterable[str]) -> str | None:
    """A pattern of the chosen layers, shaped as colpali-engine's; None if it would fit others too.

    Args:
        root: with adapters in these layers.
    """
    wanted = set(chosen)
    kinds: dict[str, set[str]] = {}
    for name in wanted - {PROJECTION_NAME}:
        tower, *path = name.split(".")
        numbers = [place for place, part in enumerate(path[:-1]) if part.isdigit()]
        kind = path[numbers[0] + 1 :] if numbers else path
        kinds.setdefault(tower, set()).add(re.escape(".".join(kind)))
    parts = [rf".*({tower})\.(.*\.)?({'|'.join(sorted(kinds[tower]))})$" for tower in sorted(kinds)]
    if PROJECTION_NAME in wanted:
        parts.append(rf".*({PROJECTION_NAME})$")
    pattern = f"({'|'.join(parts)})"
    plain = {re.sub(r"\.(base_layer|lora_).*", "", name) for name, _ in root.named_modules()}
    return pattern if {name for name in plain if re.fullmatch(pattern, name)} == wanted else None


def _targets(config: AdapterConfig, root: nn.Module, layout: Layout, origin: str) -> dict[str, str]:
    """The layers that a configuration means: our name to theirs."""
    peft = import_peft()
    try:
        asked = peft.LoraConfig(
            target_modules=config.target_modules,
            exclude_modules=config.exclude_modules,
            layers_to_transform=config.layers_to_transform,
            layers_pattern=config.layers_pattern,
            modules_to_save=config.modules_to_save,
        )
        named = {name: layout.theirs(f"{name}.")[:-1] for name in _names_of_weights(root)}
        is_target = peft.tuners.tuners_utils.check_target_module_exists
        return {ours: theirs for ours, theirs in named.items() if is_target(asked, theirs)}
    except (ValueError, *_PATTERN_ERRORS) as error:
        raise CheckpointError(f"{origin}: its target_modules cannot be used: {error}") from None


def _names_of_weights(root: nn.Module) -> list[str]:
    """Modules that have weights of their own."""
    return [
        name
        for name, module in root.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]


def _each(
    chosen: Mapping[str, str], patterns: Mapping[str, Any], default: Any, origin: str
) -> dict[str, Any]:
    """The value of each chosen layer: of the first pattern that fits the end of its name, else the
    default."""
    values: dict[str, Any] = {}
    used: set[str] = set()
    for ours, name in chosen.items():
        fits = [pattern for pattern in patterns if _fits(pattern, name, origin)]
        used.update(fits)
        values[ours] = patterns[fits[0]] if fits else default
    unused = sorted(set(patterns) - used)
    if unused:
        raise CheckpointError(f"{origin}: {listed(unused)} fits no adapted layer")
    return values


def _fits(pattern: str, name: str, origin: str) -> bool:
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except _PATTERN_ERRORS as error:
        raise CheckpointError(f"{origin}: {pattern!r} is no pattern: {error}") from None
