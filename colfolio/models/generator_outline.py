"""The generator that a folder's files describe, on the meta device: its weights are not read.

Names, shapes and dtypes are those of the real one, as in `outline.py` those of a retriever; where
either may be meant, `model_outline_of` finds out which.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from colfolio.errors import CheckpointError
from colfolio.models.checkpoint import check_tokenizer
from colfolio.models.files import load_tokenizer
from colfolio.models.formats.layouts import to_our_names
from colfolio.models.generator import Generator
from colfolio.models.generator_files import (
    HEAD,
    empty_generator,
    is_generator,
    is_tied,
    read_promises,
    refuse_generator,
)
from colfolio.models.hub import locate
from colfolio.models.outline import outline_of
from colfolio.models.retriever import Retriever

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


@dataclass(frozen=True, slots=True)
class ModelOutline:
    """A model without weights.

    Args:
        model: on the meta device.
        has_dtypes: whether its weights have the dtypes of the files; if those are not on this
            machine, they are float32.
    """

    model: Retriever | Generator
    has_dtypes: bool


def model_outline_of(path_or_id: str | Path, objective: str | None = None) -> ModelOutline:
    """What an objective would train, without weights; of the hub none are fetched.

    Args:
        objective: `retrieval` or `generation`; None takes what the folder says that it holds.

    Raises:
        CheckpointError: it is a model of the other objective, or see `outline_of`.
    """
    folder = locate(path_or_id, with_weights=False).folder
    if objective == "generation" or (objective is None and is_generator(folder)):
        return generator_outline_of(path_or_id)
    refuse_generator(folder)
    found = outline_of(path_or_id)
    return ModelOutline(found.retriever, found.has_dtypes)


def generator_outline_of(path_or_id: str | Path) -> ModelOutline:
    """What `Generator.from_pretrained` would give, without weights; of the hub none are fetched.

    Raises:
        CheckpointError: a file is missing or damaged, no such model can be, or it is a retriever.
    """
    folder = locate(path_or_id, with_weights=False).folder
    config, contract = read_promises(folder)
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, config, str(folder))
    generator = Generator(*empty_generator(config, str(folder)), tokenizer, contract)
    stored = _stored(folder)
    named = dict(generator.backbone.named_parameters())
    if not is_tied(config):
        named[HEAD] = generator.projection.weight
    for name in named.keys() & stored.keys():
        named[name].data = named[name].data.to(stored[name].dtype)
    return ModelOutline(generator, named.keys() <= stored.keys())


def _stored(folder: Path) -> dict[str, Tensor]:
    """Each tensor of a folder without its numbers, by our names; empty without any file of them."""
    stored: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 - it is no mapping
                    kind = _DTYPES.get(file.get_slice(name).get_dtype())
                    if kind is not None:
                        stored[name] = torch.empty(0, dtype=kind, device="meta")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read, it may be cut short: {error}") from None
    head = {HEAD: stored[HEAD]} if HEAD in stored else {}
    return to_our_names(stored, "backbone", str(folder)) | head
