"""A base to train from: a backbone, and a projection drawn at random once and kept.

The same code makes a base from published weights and a tiny one from a shape alone, because a base
that is drawn anew at each load is another model each time.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import nn

from colfolio.config import Settings
from colfolio.data.patches import PixelBudget
from colfolio.data.prompts import IMAGE_TOKEN, VIDEO_TOKEN, Templates
from colfolio.errors import CheckpointError
from colfolio.models.checkpoint import (
    cast_parameters,
    hidden_size,
    load_config,
    load_tokenizer,
)
from colfolio.models.contract import Contract, check_contract, hash_weights
from colfolio.models.families import CONFIG_ERRORS, family_of
from colfolio.models.hub import local_folder
from colfolio.models.retriever import Retriever

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    VISION_START,
    VISION_END,
    IMAGE_TOKEN,
    VIDEO_TOKEN,
)


class TokenizerSettings(Settings):
    """A byte-level byte-pair vocabulary trained on the queries of a training split."""

    vocab_size: int = 512
    lowercase: bool = True


class Shape(Settings):
    """A backbone from scratch, and how it is used.

    Args:
        family: a `model_type` of `models/families.py`.
        backbone: keywords of the family's configuration, with `text_config` and `vision_config`.
        dim: dimensions of each vector.
        templates, pixel_budget, views: see `Contract`.
        tokenizer: how its vocabulary is trained.
    """

    family: str = "qwen2_vl"
    backbone: dict[str, Any]
    dim: int = 128
    dtype: Literal["float32", "bfloat16"] = "float32"
    templates: Templates = Templates()
    pixel_budget: PixelBudget = PixelBudget()
    views: Literal["page", "tiles", "strips"] = "page"
    tokenizer: TokenizerSettings = TokenizerSettings()


def base_from_shape(shape: Shape, tokenizer: Tokenizer, seed: int) -> Retriever:
    """A base with random weights of a shape; equal seeds give equal weights.

    Args:
        tokenizer: its special tokens give the ids of image placeholders, its size the embedding's.
        seed: of the weights; no other generator is touched.

    Raises:
        CheckpointError: the shape's keywords do not fit its family.
    """
    family = family_of(shape.family, "shape")
    values: dict[str, Any] = shape.backbone | _token_ids(tokenizer)
    text: dict[str, Any] = dict(values.get("text_config", {}))
    text.setdefault("vocab_size", tokenizer.get_vocab_size())
    if text["vocab_size"] < tokenizer.get_vocab_size():
        raise CheckpointError(
            f"the shape's vocab_size is {text['vocab_size']}, but its tokenizer has "
            f"{tokenizer.get_vocab_size()} tokens"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        try:
            build: Any = family.config
            config = build(**(values | {"text_config": text}))
            _check_keys(values, config)
            backbone = family.backbone(config)
            cast_parameters(backbone, getattr(torch, shape.dtype))
        except CONFIG_ERRORS as error:
            raise CheckpointError(f"shape of family {shape.family}: {error}") from None
        projection = _projection(backbone, shape.dim)
    return _retriever(
        backbone, projection, tokenizer, shape.templates, shape.pixel_budget, shape.views
    )


def base_from_weights(
    path_or_id: str | Path, dim: int, seed: int, revision: str | None = None
) -> Retriever:
    """A base from published weights of a backbone, with a projection drawn once.

    Raises:
        CheckpointError: the weights are not exactly those of the backbone, a language-model head
            aside.
    """
    folder = local_folder(path_or_id, revision)
    family = family_of(load_config(folder).model_type, str(folder))
    builder: Any = family.backbone
    backbone, found = builder.from_pretrained(folder, output_loading_info=True, dtype="auto")
    if found["missing_keys"] or found["mismatched_keys"]:
        raise CheckpointError(
            f"{folder}: tensors missing or of another shape: "
            f"{sorted(found['missing_keys'])[:20]} {sorted(found['mismatched_keys'])[:20]}"
        )
    unexpected = [name for name in found["unexpected_keys"] if not name.startswith("lm_head.")]
    if unexpected:
        raise CheckpointError(
            f"{folder}: tensors that the backbone does not have: {sorted(unexpected)[:20]}; "
            "a retriever is trained further from its own folder, without `init`"
        )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        projection = _projection(backbone, dim)
    tokenizer = load_tokenizer(folder)
    return _retriever(backbone, projection, tokenizer, Templates(), PixelBudget(), "page")


def train_tokenizer(texts: Iterable[str], settings: TokenizerSettings) -> Tokenizer:
    """A byte-level BPE tokenizer with the family's special tokens, from these texts alone."""
    tokenizer = Tokenizer(models.BPE())
    steps: list[Any] = [normalizers.NFKC()]
    tokenizer.normalizer = normalizers.Sequence(
        [*steps, normalizers.Lowercase()] if settings.lowercase else steps
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocab_size,
        special_tokens=list(_SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _check_keys(values: Mapping[str, Any], config: Any) -> None:
    """`transformers` keeps keywords that it does not know; a shape means each of its own."""
    kinds = [kind for kind in type(config).__mro__ if "__init__" in vars(kind)]
    known = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}
    unknown = sorted(set(values) - known)
    if unknown:
        raise ValueError(f"{type(config).__name__} has no keywords {unknown}")
    for name in ("text_config", "vision_config"):
        if name in values:
            try:
                _check_keys(values[name], getattr(config, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def _projection(backbone: Any, dim: int) -> nn.Linear:
    """Normal weights that keep the variance of their input, no bias at the start."""
    width = hidden_size(backbone.config)
    dtype = backbone.language_model.embed_tokens.weight.dtype
    projection = nn.Linear(width, dim)
    nn.init.normal_(projection.weight, std=width**-0.5)
    nn.init.zeros_(projection.bias)
    return projection.to(dtype)


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {
        "image_token_id": tokenizer.token_to_id(IMAGE_TOKEN),
        "video_token_id": tokenizer.token_to_id(VIDEO_TOKEN),
        "vision_start_token_id": tokenizer.token_to_id(VISION_START),
        "vision_end_token_id": tokenizer.token_to_id(VISION_END),
    }


def _retriever(
    backbone: Any,
    projection: nn.Linear,
    tokenizer: Tokenizer,
    templates: Templates,
    pixel_budget: PixelBudget,
    views: str,
) -> Retriever:
    contract = Contract(
        dim=projection.out_features,
        templates=templates,
        pixel_budget=pixel_budget,
        position_scheme=family_of(backbone.config.model_type, "backbone").position_scheme,
        views=views,
        base_hash="",
    )
    check_contract(contract, backbone.config, "the base")
    retriever = Retriever(backbone, projection, tokenizer, contract)
    retriever.contract = contract.model_copy(
        update={"base_hash": hash_weights(retriever.weights())}
    )
    return retriever
