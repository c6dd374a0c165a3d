"""A base to train from: a backbone, and a projection drawn at random once and kept.

The same code makes a base from published weights and a tiny one from a shape alone, because a base
that is drawn anew at each load is another model each time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import PretrainedConfig

from colfolio.data.patches import PixelBudget
from colfolio.data.prompts import Templates
from colfolio.errors import CheckpointError
from colfolio.models.checkpoint import (
    assemble,
    check_tokenizer,
    empty_backbone,
    hidden_size,
)
from colfolio.models.contract import (
    CONTRACT_FILE,
    PROJECTION,
    Contract,
    Source,
    check_contract,
    hash_weights,
    projection_of,
    versions,
)
from colfolio.models.drawing import draw_normal, draw_weights
from colfolio.models.families import family_of, position_scheme_of
from colfolio.models.files import load_config, load_tokenizer
from colfolio.models.formats.images import pixel_budget_of
from colfolio.models.formats.reading import read_backbone
from colfolio.models.grafting import grafted_backbone
from colfolio.models.hub import Location, locate
from colfolio.models.retriever import Retriever
from colfolio.models.shape import SPECIAL_TOKENS, Shape, config_of_shape
from colfolio.models.weights import listed
from colfolio.mrope import Qwen3VL


def base_from_shape(shape: Shape, tokenizer: Tokenizer, seed: int) -> Retriever:
    """A base with random weights of a shape; equal seeds give equal weights, on any machine.

    Args:
        tokenizer: its special tokens give the ids of image placeholders, its size the embedding's.
        seed: of the weights; no generator is touched.

    Raises:
        CheckpointError: the shape's keywords do not fit its family.
    """
    _check_drawn(shape.dim, seed)
    family = family_of(shape.family, "shape")
    config = config_of_shape(shape, tokenizer)
    dtype = getattr(torch, shape.dtype)
    origin = f"shape of family {shape.family}"
    weights = draw_weights(empty_backbone(config, origin), seed, dtype)
    said = shape.templates.model_dump(exclude_unset=True)
    templates = Templates.model_validate(family.templates.model_dump() | said)
    said = shape.pixel_budget.model_dump(exclude_unset=True)
    pixel_budget = PixelBudget.model_validate(family.pixel_budget.model_dump() | said)
    weights |= _projection(config, shape.dim, seed, dtype)
    contract = _contract(config, weights, templates, pixel_budget, origin)
    contract = contract.model_copy(update={"views": shape.views})
    return Retriever(*assemble(config, weights, shape.dim, origin), tokenizer, contract)


def base_from_weights(
    path_or_id: str | Path, dim: int, seed: int, revision: str | None = None
) -> Retriever:
    """A base from published weights of a backbone, with a projection drawn once.

    Images enter as the folder's processor says, but no larger than the family's table has it: a
    model that chats about a page may read thousands of tokens of it, a retriever keeps them all.

    Raises:
        CheckpointError: the weights are not exactly those of the backbone, a language-model head
            aside, or they are those of a retriever.
    """
    _check_drawn(dim, seed)
    location = locate(path_or_id, revision)
    folder, origin = location.folder, str(location.folder)
    config = load_config(folder)
    weights = read_backbone(folder)
    trained = sorted(projection_of(weights))
    if trained or (folder / CONTRACT_FILE).exists():
        raise CheckpointError(
            f"{folder}: is a retriever already ({listed(trained) if trained else CONTRACT_FILE}); "
            "train it further from this folder, without `init`"
        )
    embedding = weights.get("language_model.embed_tokens.weight")
    weights |= _projection(config, dim, seed, embedding.dtype if embedding is not None else None)
    backbone, projection = assemble(config, weights, dim, origin)
    family = family_of(config.model_type, origin)
    budget, assumed = _pixel_budget(folder, config)
    contract = _contract(config, weights, family.templates, budget, origin)
    contract = contract.model_copy(update={"source": _source(location), "assumed": tuple(assumed)})
    tokenizer = load_tokenizer(folder)
    check_tokenizer(tokenizer, config, origin)
    return Retriever(backbone, projection, tokenizer, contract)


def base_from_graft(
    decoder: str | Path,
    vision: str | Path,
    dim: int,
    seed: int,
    scheme: str | None = None,
    revision: str | None = None,
    vision_revision: str | None = None,
) -> Retriever:
    """A base from a text decoder with M-RoPE and the vision tower of a Qwen2-VL.

    What else than the projection had to be drawn stands in the contract, under `assumed`.

    Args:
        decoder, vision: hub ids or folders, see `grafted_backbone`.
        scheme: of positions; None takes that of a decoder grafted before, or else `qwen2_vl`.
        revision, vision_revision: of the decoder's and the tower's hub ids.

    Raises:
        CheckpointError: the weights are not exactly those of the towers, a language-model head
            aside, or the towers do not fit together.
    """
    _check_drawn(dim, seed)
    sources = locate(decoder, revision), locate(vision, vision_revision)
    text, tower = (location.folder for location in sources)
    origin = f"{text} with the vision tower of {tower}"
    found = grafted_backbone(text, tower, SPECIAL_TOKENS, scheme, seed)
    dtype = next(iter(found.weights.values())).dtype
    weights = found.weights | _projection(found.config, dim, seed, dtype)
    backbone, projection = assemble(found.config, weights, dim, origin)
    family = family_of(found.config.model_type, origin)
    if isinstance(family.scheme(found.config), Qwen3VL):  # its clips need text between their steps
        family = family_of("qwen3_vl", origin)
    budget, assumed = _pixel_budget(tower, found.config)
    contract = _contract(found.config, weights, family.templates, budget, origin)
    updated = {"source": _source(*sources), "assumed": (*found.drawn, *assumed)}
    contract = contract.model_copy(update=updated)
    return Retriever(backbone, projection, found.tokenizer, contract)


def _check_drawn(dim: int, seed: int) -> None:
    if dim < 1 or seed < 0:
        raise CheckpointError(
            f"vectors have 1 dimension or more and a seed is 0 or more, received dim {dim} and "
            f"seed {seed}"
        )


def _projection(
    config: PretrainedConfig, dim: int, seed: int, dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Normal weights that keep the variance of their input, no bias at the start."""
    width = hidden_size(config)
    dtype = dtype or torch.float32
    name = f"{PROJECTION}weight"
    return {
        name: draw_normal((dim, width), 1 / math.sqrt(width), seed, name, dtype),
        f"{PROJECTION}bias": torch.zeros(dim, dtype=dtype),
    }


def _source(*locations: Location) -> Source:
    """Hub ids and their commits; of a folder the name alone, as its path is of this machine."""
    names = [each.hub_id or each.folder.resolve().name for each in locations]
    commits = [each.commit or "no commit" for each in locations]
    has_commit = any(each.commit for each in locations)
    return Source(name=" + ".join(names), revision=" + ".join(commits) if has_commit else None)


def _pixel_budget(folder: Path, config: PretrainedConfig) -> tuple[PixelBudget, list[str]]:
    """The folder's, no larger than the family's, and what was assumed of it."""
    found, assumed = pixel_budget_of(folder, config)
    most = family_of(config.model_type, str(folder)).pixel_budget.max_pixels
    return found.model_copy(update={"max_pixels": min(found.max_pixels, most)}), assumed


def _contract(
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    templates: Templates,
    pixel_budget: PixelBudget,
    origin: str,
) -> Contract:
    """What a base of these weights promises.

    Raises:
        CheckpointError: its backbone cannot keep that.
    """
    contract = Contract(
        dim=len(weights[f"{PROJECTION}weight"]),
        templates=templates,
        pixel_budget=pixel_budget,
        position_scheme=position_scheme_of(config, origin),
        base_hash=hash_weights(weights),
        projection_hash=hash_weights(projection_of(weights)),
        versions=versions(),
    )
    check_contract(contract, config, origin)
    return contract
