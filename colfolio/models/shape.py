"""The shape of a backbone from scratch, and the tokenizer that is trained for it."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PretrainedConfig

from colfolio.config import Settings
from colfolio.data.patches import PixelBudget
from colfolio.data.prompts import (
    IMAGE_TOKEN,
    VIDEO_TOKEN,
    VISION_END,
    VISION_START,
    Templates,
)
from colfolio.errors import CheckpointError
from colfolio.models.families import CONFIG_ERRORS, family_of

SPECIAL_TOKENS = (
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
        templates, pixel_budget: see `Contract`; what they leave out is as in the family's table.
        views: see `Contract`.
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
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def config_of_shape(shape: Shape, tokenizer: Tokenizer) -> PretrainedConfig:
    """The configuration that a shape and its tokenizer give.

    Raises:
        CheckpointError: its family has none of these keywords, or the tokenizer has more tokens.
    """
    values: dict[str, Any] = shape.backbone | _token_ids(tokenizer)
    text: dict[str, Any] = dict(values.get("text_config", {}))
    size = tokenizer.get_vocab_size()
    text.setdefault("vocab_size", size)
    if text["vocab_size"] < size:
        raise CheckpointError(
            f"the shape's vocab_size is {text['vocab_size']}, but its tokenizer has {size} tokens"
        )
    try:
        build: Any = family_of(shape.family, "shape").config
        config = build(**(values | {"text_config": text}))
        _check_keys(values, config)
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"shape of family {shape.family}: {error}") from None
    return config


def _check_keys(values: Mapping[str, Any], config: Any) -> None:
    """`transformers` keeps keywords that it does not know; a shape means each of its own."""
    kinds = [kind for kind in type(config).__mro__ if "__init__" in vars(kind)]
    known = {name for kind in kinds for name in inspect.signature(kind.__init__).parameters}
    unknown = sorted(set(values) - known - {"model_type"})
    if unknown:
        raise ValueError(f"{type(config).__name__} has no keywords {unknown}")
    for name in ("text_config", "vision_config"):
        if name in values:
            try:
                _check_keys(values[name], getattr(config, name))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None


def _token_ids(tokenizer: Tokenizer) -> dict[str, int | None]:
    return {
        "image_token_id": tokenizer.token_to_id(IMAGE_TOKEN),
        "video_token_id": tokenizer.token_to_id(VIDEO_TOKEN),
        "vision_start_token_id": tokenizer.token_to_id(VISION_START),
        "vision_end_token_id": tokenizer.token_to_id(VISION_END),
    }
