"""A folder of any known format as configuration, tensors by our names, tokenizer and contract."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig

from colfolio.data.prompts import Templates
from colfolio.errors import CheckpointError, TensorsError
from colfolio.models.contract import (
    CONTRACT_FILE,
    PROJECTION,
    Contract,
    hash_weights,
    load_contract,
)
from colfolio.models.families import FAMILIES, position_scheme_of
from colfolio.models.files import (
    CONFIG_FILE,
    CONTRACT_MARK,
    backbone_config,
    load_config,
    load_tokenizer,
    read_json,
    refuse_code,
)
from colfolio.models.formats.classes import RETRIEVAL_TYPE
from colfolio.models.formats.layouts import to_our_names
from colfolio.models.formats.sentence_transformers import (
    MODULES_FILE,
    Modules,
    read_dense,
    read_modules,
    refuse_unsaid,
    sentence_usage,
)
from colfolio.models.formats.usage import Usage, engine_usage, retrieval_usage
from colfolio.models.formats.whole_texts import refuse_added_tokens
from colfolio.models.weights import read_weights

ADAPTER_FILE = "adapter_config.json"


class AssumedWarning(UserWarning):
    """A checkpoint without a contract leaves open how it is used; what was assumed is said."""


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint out of the files of one library.

    Args:
        format: whose files: `colfolio`, `colpali-engine`, `transformers`, `sentence-transformers`.
        config: of the backbone.
        weights: by our names, see `layouts.py`.
        contract: as written, or from what its files say and its library does.
    """

    format: str
    config: PretrainedConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    contract: Contract


def detect(folder: Path) -> str:
    """Which format a folder has, by its file names and the classes that its configuration names.

    Returns:
        `colfolio`, `colpali-engine`, `transformers`, `sentence-transformers` or `adapter`.

    Raises:
        CheckpointError: none of these; it says what was seen, and what is known.
    """
    if (folder / MODULES_FILE).is_file():
        return "sentence-transformers"
    path = folder / CONFIG_FILE
    if (folder / ADAPTER_FILE).is_file() and not path.is_file():
        return "adapter"
    if not path.is_file():
        raise CheckpointError(f"{folder}: no {CONFIG_FILE}, so this is no checkpoint")
    values = read_json(path)
    kind = values.get("model_type")
    if kind == RETRIEVAL_TYPE:
        return "transformers"
    if kind in FAMILIES:
        return "colfolio" if CONTRACT_MARK in values else "colpali-engine"
    raise CheckpointError(
        f"{path}: model_type {kind!r} with the class {values.get('architectures')} is no retriever "
        f"that is read here; known are {', '.join(FAMILIES)} (with a projection, as Colfolio and "
        f"colpali-engine write them), {RETRIEVAL_TYPE} of transformers, folders of "
        f"sentence-transformers ({MODULES_FILE}) and adapters ({ADAPTER_FILE})"
    )


def read(folder: Path, templates: Templates | None = None) -> Found:
    """Everything of a checkpoint folder, whichever library wrote it.

    A foreign folder says less than a contract: what was assumed is warned of, and kept in
    `Contract.assumed`.

    Args:
        templates: for a folder without a contract, in place of its library's.

    Raises:
        CheckpointError: a file is missing, damaged, of a format that is not known, or says what
            cannot be honoured.
    """
    format = detect(folder)
    if format == "adapter":
        raise CheckpointError(
            f"{folder}: holds an adapter alone; its base is a model of its own, which is loaded "
            "first"
        )
    modules = read_modules(folder) if format == "sentence-transformers" else None
    place = modules.backbone if modules else folder
    config = _config(place)
    tokenizer = load_tokenizer(place)
    if modules is not None:
        refuse_unsaid(folder, modules, tokenizer)
    own = load_contract(folder) if _has_contract(folder, format) else None
    if own is not None and templates not in (None, own.templates):
        raise CheckpointError(
            f"{folder / CONTRACT_FILE}: says the templates of this model, and others were given; "
            "a model is used as it was trained, so give none"
        )
    weights = _weights(place, modules)
    if own is None:
        own = _assumed_contract(folder, format, modules, config, tokenizer, weights, templates)
    return Found(format, config, weights, tokenizer, own)


def read_backbone(folder: Path) -> dict[str, Tensor]:
    """Tensors of a backbone without a projection under our names, in any layout it is published in.

    The head of a language model is left out, and nothing else.
    """
    return to_our_names(read_weights(folder), "backbone", str(folder))


def _has_contract(folder: Path, format: str) -> bool:
    return format == "colfolio" or (folder / CONTRACT_FILE).is_file()


def _config(place: Path) -> PretrainedConfig:
    """The backbone's configuration; in a retrieval model of transformers it lies one level in."""
    path = place / CONFIG_FILE
    if not path.is_file():
        return load_config(place)  # which says that it is missing
    values = read_json(path)
    if values.get("model_type") != RETRIEVAL_TYPE:
        return load_config(place)
    refuse_code(values, str(path))
    inner = values.get("vlm_config")
    if not isinstance(inner, dict):
        raise CheckpointError(f"{path}: has no vlm_config, found {inner!r}")
    return backbone_config(inner, f"{path}: vlm_config")


def _weights(place: Path, modules: Modules | None) -> dict[str, Tensor]:
    """All tensors by our names; sentence-transformers has the projection in a file of its own."""
    is_retrieval = read_json(place / CONFIG_FILE).get("model_type") == RETRIEVAL_TYPE
    if modules is not None and modules.is_retrieval != is_retrieval:
        raise CheckpointError(
            f"{place / CONFIG_FILE}: model_type does not fit the modules in {MODULES_FILE}"
        )
    format = "transformers" if is_retrieval else "backbone" if modules else "colpali-engine"
    weights = to_our_names(read_weights(place), format, str(place))
    if modules is not None and not is_retrieval:
        twice = sorted(name for name in weights if name.startswith(PROJECTION))
        if twice:
            raise CheckpointError(f"{place}: a projection in two places, also as {twice}")
        weights |= read_dense(modules)
    return weights


def _assumed_contract(
    folder: Path,
    format: str,
    modules: Modules | None,
    config: PretrainedConfig,
    tokenizer: Tokenizer,
    weights: dict[str, Tensor],
    templates: Templates | None,
) -> Contract:
    """A contract out of what the files say and the library does; the assumed is warned of."""
    projection: Any = weights.get(PROJECTION + "weight")
    if projection is None or projection.ndim != 2:
        raise TensorsError(
            f"{folder}: holds no projection to vectors ({PROJECTION}weight), so this is a backbone "
            "or a damaged retriever; make a base to train from with `colfolio init`"
        )
    refuse_added_tokens(tokenizer, str(folder))
    usage = _usage(folder, format, modules, config, tokenizer)
    assumed = (*(() if templates else usage.of_queries), *usage.assumed)
    for sentence in assumed:
        warnings.warn(f"{folder}: {sentence}", AssumedWarning, stacklevel=2)
    return Contract(
        dim=len(projection),
        templates=templates or usage.templates,
        pixel_budget=usage.pixel_budget,
        position_scheme=position_scheme_of(config, str(folder)),
        base_hash=hash_weights(weights),
        assumed=assumed,
    )


def _usage(
    folder: Path,
    format: str,
    modules: Modules | None,
    config: PretrainedConfig,
    tokenizer: Tokenizer,
) -> Usage:
    if modules is not None:
        return sentence_usage(folder, modules, config, tokenizer)
    return (retrieval_usage if format == "transformers" else engine_usage)(folder, config)
