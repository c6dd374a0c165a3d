"""The retriever that a checkpoint's files describe, on the meta device: its weights are not read.

Modules, names, shapes and dtypes are those of the real one, so that what a run will take or train
can be told at once, and of a checkpoint on the hub before anything large is fetched.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from torch import nn

from colfolio.errors import CheckpointError
from colfolio.models.checkpoint import empty_backbone, hidden_size, load_parts
from colfolio.models.contract import (
    CONTRACT_FILE,
    PROJECTION,
    Contract,
    check_contract,
    load_contract,
)
from colfolio.models.files import load_config, load_tokenizer
from colfolio.models.formats import detect
from colfolio.models.hub import Location, locate
from colfolio.models.lora.files import is_adapter_folder, read_adapter
from colfolio.models.lora.opening import base_of
from colfolio.models.lora.placing import PROJECTION_NAME, inject, named_modules
from colfolio.models.retriever import Retriever

_OURS = ("colfolio", "colpali-engine")  # whose tensors have our names
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_Parts = tuple[Any, nn.Module, Tokenizer, Contract]


@dataclass(frozen=True, slots=True)
class Outline:
    """A retriever without weights.

    Args:
        retriever: on the meta device.
        has_dtypes: whether its weights have the dtypes of the files; if those are not on this
            machine, all but adapters are float32.
    """

    retriever: Retriever
    has_dtypes: bool


def outline_of(path_or_id: str | Path) -> Outline:
    """What `Retriever.from_pretrained` would give, without weights; of the hub none are fetched.

    Two kinds of files are read wholly: an adapter, which is small, and a folder of another library,
    which says only in its weights what a contract says.

    Raises:
        CheckpointError: a file is missing or damaged, no such model can be, or it is of another
            library and on the hub.
    """
    location = locate(path_or_id, with_weights=False)
    if not is_adapter_folder(location.folder):
        parts, has_dtypes = _parts_of(location)
        return Outline(Retriever(*parts), has_dtypes)
    adapter = read_adapter(locate(path_or_id).folder)
    parts, has_dtypes = _parts_of(base_of(adapter, with_weights=False))
    backbone, projection, tokenizer, contract = parts
    root = named_modules(backbone, projection)
    inject(root, adapter.plan(root), adapter.weights)
    projection = root.get_submodule(PROJECTION_NAME)
    contract = adapter.contract or contract
    return Outline(Retriever(backbone, projection, tokenizer, contract), has_dtypes)


def _parts_of(location: Location) -> tuple[_Parts, bool]:
    """Backbone, projection, tokenizer and contract; and whether dtypes are those of the files."""
    folder = location.folder
    if detect(folder) in _OURS and (folder / CONTRACT_FILE).is_file():
        return _described(folder)
    if location.hub_id is not None:
        raise CheckpointError(
            f"{location.hub_id}: was not written by Colfolio, so only its weights say what it is, "
            "and of the hub none are fetched for this. Make a base of a backbone with `colfolio "
            f"init`; a retriever, bring here with `hf download {location.hub_id}` and give its "
            "folder"
        )
    backbone, projection, tokenizer, contract = load_parts(location)
    nn.ModuleList([backbone, projection]).to("meta")
    return (backbone, projection, tokenizer, contract), True


def _described(folder: Path) -> tuple[_Parts, bool]:
    """By configuration and contract alone, and the heads of the files with weights."""
    contract, config = load_contract(folder), load_config(folder)
    check_contract(contract, config, str(folder))
    backbone = empty_backbone(config, str(folder))
    with torch.device("meta"):
        projection = nn.Linear(hidden_size(config), contract.dim)
    dtypes = _stored_dtypes(folder)
    named = dict(backbone.named_parameters())
    named |= {PROJECTION + name: weight for name, weight in projection.named_parameters()}
    for name in named.keys() & dtypes.keys():
        named[name].data = named[name].data.to(dtypes[name])
    parts = (backbone, projection, load_tokenizer(folder), contract)
    return parts, named.keys() <= dtypes.keys()


def _stored_dtypes(folder: Path) -> dict[str, torch.dtype]:
    """Of each tensor in a folder, by the heads of its files; empty without any."""
    dtypes: dict[str, torch.dtype] = {}
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                names: list[str] = file.keys()
                kinds = {name: file.get_slice(name).get_dtype() for name in names}
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path}: cannot be read, it may be cut short: {error}") from None
        dtypes |= {name: _DTYPES[kind] for name, kind in kinds.items() if kind in _DTYPES}
    return dtypes
