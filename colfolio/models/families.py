"""What differs between families of backbones, in one table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig, PreTrainedModel, Qwen2VLConfig, Qwen2VLModel

from colfolio.errors import CheckpointError

# What `transformers` raises for a configuration that no model can have.
CONFIG_ERRORS = (TypeError, ValueError, AttributeError, KeyError, StrictDataclassError)


@dataclass(frozen=True, slots=True)
class Family:
    """One family of vision-language backbones.

    Args:
        model_type: its name in `config.json`.
        config: class of its configuration.
        backbone: builds a model with `visual` and `language_model` from a configuration.
        position_scheme: how its position ids are made, a name of `colfolio.mrope`.
    """

    model_type: str
    config: type[PretrainedConfig]
    backbone: Callable[[Any], PreTrainedModel]
    position_scheme: str


FAMILIES = {
    family.model_type: family
    for family in (Family("qwen2_vl", Qwen2VLConfig, Qwen2VLModel, "qwen2_vl"),)
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
