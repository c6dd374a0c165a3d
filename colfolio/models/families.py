"""What differs between families of backbones, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLModel,
)

from colfolio.data.patches import PixelBudget
from colfolio.data.prompts import Templates
from colfolio.errors import CheckpointError
from colfolio.models.grafted import GraftedConfig, GraftedModel
from colfolio.mrope.schemes import Qwen2_5VL, Qwen2VL, Qwen3VL, Scheme, described, scheme_of

# What `transformers` raises for a configuration that no model can have.
CONFIG_ERRORS = (TypeError, ValueError, AttributeError, KeyError, StrictDataclassError)

_PIXEL_BUDGET, _TEMPLATES = PixelBudget(), Templates()


@dataclass(frozen=True, slots=True)
class Family:
    """One family of vision-language backbones.

    Args:
        model_type: its name in `config.json`.
        config: class of its configuration.
        backbone: builds a model with `visual` and `language_model` from a configuration.
        scheme: how position ids are made for a model of this configuration.
        pixel_budget: of a base, where its weights come with none.
        templates: of a base.
    """

    model_type: str
    config: type[PretrainedConfig]
    backbone: Callable[[Any], PreTrainedModel]
    scheme: Callable[[Any], Scheme]
    pixel_budget: PixelBudget = _PIXEL_BUDGET
    templates: Templates = _TEMPLATES


FAMILIES = {
    family.model_type: family
    for family in (
        Family("qwen2_vl", Qwen2VLConfig, Qwen2VLModel, lambda _: Qwen2VL()),
        Family(
            "qwen2_5_vl",
            Qwen2_5_VLConfig,
            Qwen2_5_VLModel,
            lambda config: Qwen2_5VL(tokens_per_second=config.vision_config.tokens_per_second),
        ),
        Family(
            "qwen3_vl",
            Qwen3VLConfig,
            Qwen3VLModel,
            lambda _: Qwen3VL(),
            # as many visual tokens as in the other families, of larger patches
            PixelBudget(
                patch=16,
                min_pixels=4 * 32 * 32,
                max_pixels=768 * 32 * 32,
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
            ),
            Templates(time_stamp="<{seconds} seconds>"),
        ),
        Family(
            "colfolio_grafted",
            GraftedConfig,
            GraftedModel,
            lambda config: scheme_of(config.scheme),
        ),
    )
}


def family_of(model_type: str | None, origin: str) -> Family:
    """The family that a configuration names.

    Raises:
        CheckpointError: the family is not in the table.
    """
    if model_type not in FAMILIES:
        raise CheckpointError(
            f"{origin}: model_type {model_type!r} is none of {', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def position_scheme_of(config: PretrainedConfig, origin: str) -> str | dict[str, Any]:
    """How position ids are made for a backbone, as a contract says it.

    Returns:
        The name of a scheme of `colfolio.mrope`, or with its settings where those are not the
        published ones.

    Raises:
        CheckpointError: the family is not in the table.
    """
    values = described(family_of(config.model_type, origin).scheme(config))
    return values["scheme"] if len(values) == 1 else values
