"""A grafted backbone out of published weights: of a decoder, and of a Qwen2-VL's vision tower."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from colfolio.data.prompts import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START
from colfolio.errors import CheckpointError
from colfolio.models.drawing import draw_normal
from colfolio.models.families import CONFIG_ERRORS
from colfolio.models.files import CONFIG_FILE, load_tokenizer, read_json, refuse_code
from colfolio.models.grafted import GraftedConfig
from colfolio.models.weights import read_weights

_EMBEDDING = "language_model.embed_tokens.weight"
_LAST = "visual.merger.mlp.2."
# what a language model's checkpoint holds beside its decoder: the head, and tables of old versions
_NOT_OF_DECODER = re.compile(r"lm_head\..*|.*\.rotary_emb\.inv_freq")
_TOWER = re.compile(r"(?:.*\.)?visual\.")
_TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
_OF_A_FILE = ("architectures", "dtype", "torch_dtype", "transformers_version")
_STD = 0.02  # of `transformers`, where a configuration says nothing


@dataclass(frozen=True, slots=True)
class GraftedBackbone:
    """What a grafted backbone is made of.

    Args:
        weights: by its names.
        tokenizer: the decoder's, with the special tokens that it lacked.
        drawn: what no checkpoint held and was drawn at random, in a sentence each.
    """

    config: GraftedConfig
    weights: dict[str, Tensor]
    tokenizer: Tokenizer
    drawn: tuple[str, ...]


def grafted_backbone(
    decoder: Path,
    vision: Path,
    special_tokens: Collection[str],
    scheme: str | Mapping[str, Any] | None = None,
    seed: int = 0,
) -> GraftedBackbone:
    """A decoder to be grafted and a vision tower before it, all weights those of the two folders.

    Drawn at random is only what neither holds: the last layer of the tower's merger if the decoder
    is of another width, and embeddings of tokens that the decoder's tokenizer lacks. Weights are of
    the wider of the two dtypes, so that none is rounded.

    Args:
        decoder: a folder of a language model; its head is left out.
        vision: a folder of a Qwen2-VL, or of a retriever made from one; only its tower is taken.
        special_tokens: what templates need; those that the tokenizer lacks are added.
        scheme: of positions; None takes that of a decoder grafted before, or else `qwen2_vl`.
        seed: of what is drawn.

    Raises:
        CheckpointError: a file is missing or damaged, the decoder cannot be grafted, or the tower
            is not that of a Qwen2-VL.
    """
    text, tower = _config(decoder), _vision_config(vision)
    weights = _decoder_weights(decoder) | _tower_weights(vision)
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in weights.values()))
    weights = {name: tensor.to(dtype) for name, tensor in weights.items()}
    tokenizer = load_tokenizer(decoder)
    drawn = [
        *_grow_embedding(weights, text, tokenizer, special_tokens, seed),
        *_fit_merger(weights, tower, text, seed),
    ]
    ids: dict[str, Any] = {name: tokenizer.token_to_id(token) for name, token in _TOKENS.items()}
    try:
        scheme = scheme or _grafted_before(text) or "qwen2_vl"
        config = GraftedConfig(text, tower, scheme=scheme, **ids)
    except CONFIG_ERRORS as error:
        raise CheckpointError(f"{decoder} and {vision}: {error}") from None
    return GraftedBackbone(config, weights, tokenizer, tuple(drawn))


def _config(folder: Path) -> dict[str, Any]:
    """What the `config.json` of a folder says of the model."""
    values = read_json(folder / CONFIG_FILE)
    refuse_code(values, str(folder / CONFIG_FILE))
    return _without_file(values)


def _vision_config(folder: Path) -> dict[str, Any]:
    """What a folder says of its vision tower; a retriever of `transformers`, one level deeper.

    Raises:
        CheckpointError: it has no vision tower.
    """
    values = _config(folder)
    vision = values.get("vlm_config", values).get("vision_config")
    if not isinstance(vision, dict):
        raise CheckpointError(
            f"{folder / CONFIG_FILE}: a {values.get('model_type')} has no vision_config, so its "
            "weights hold no vision tower; give the folder of a Qwen2-VL"
        )
    return _without_file(vision)


def _without_file(values: Mapping[str, Any]) -> dict[str, Any]:
    """Without what a configuration says of the file that it was read from."""
    return {name: value for name, value in values.items() if name not in _OF_A_FILE}


def _decoder_weights(folder: Path) -> dict[str, Tensor]:
    """The decoder's tensors by the backbone's names."""
    return {
        f"language_model.{name.removeprefix('model.')}": tensor
        for name, tensor in read_weights(folder).items()
        if not _NOT_OF_DECODER.fullmatch(name)
    }


def _tower_weights(folder: Path) -> dict[str, Tensor]:
    """The vision tower's tensors by the backbone's names, whatever stands before them in the file.

    Raises:
        CheckpointError: there are none, or two of one name.
    """
    found = {name: tensor for name, tensor in read_weights(folder).items() if _TOWER.match(name)}
    weights = {_TOWER.sub("visual.", name, count=1): tensor for name, tensor in found.items()}
    if not weights or len(weights) < len(found):
        raise CheckpointError(
            f"{folder}: must hold one vision tower, tensors `visual.*` behind one prefix; found "
            f"{len(found)} tensors of {len(weights)} names"
        )
    return weights


def _grow_embedding(
    weights: dict[str, Tensor],
    text: dict[str, Any],
    tokenizer: Tokenizer,
    special_tokens: Collection[str],
    seed: int,
) -> list[str]:
    """Add special tokens that a tokenizer lacks, and draw their rows; says which.

    Many embeddings have rows to spare: such a row stays as it is.

    Raises:
        CheckpointError: the tokenizer is not that of the embedding.
    """
    embedding, known = weights.get(_EMBEDDING), tokenizer.get_vocab()
    if embedding is None:
        return []  # what is missing is named when weights and model are put together
    size = len(embedding)
    if max(known.values(), default=-1) >= size:
        raise CheckpointError(
            f"the tokenizer of the decoder has {len(known)} tokens, the last of number "
            f"{max(known.values())}, but its embedding has {size} rows"
        )
    missing = [token for token in special_tokens if token not in known]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in missing])
    added = {token: tokenizer.get_vocab()[token] for token in missing}
    drawn = [token for token, index in added.items() if index >= size]
    if not drawn:
        return []
    text["vocab_size"] = max(added.values()) + 1
    shape = (text["vocab_size"] - size, embedding.shape[1])
    std = text.get("initializer_range") or _STD
    rows = draw_normal(shape, std, seed, _EMBEDDING, embedding.dtype)
    weights[_EMBEDDING] = torch.cat([embedding, rows])
    return [f"{_EMBEDDING} had no rows for {', '.join(drawn)}; they are drawn with seed {seed}"]


def _fit_merger(
    weights: dict[str, Tensor], tower: dict[str, Any], text: Mapping[str, Any], seed: int
) -> list[str]:
    """Draw the merger's last layer if the tower ends in another width than the decoder's."""
    width, last = text.get("hidden_size"), weights.get(f"{_LAST}weight")
    if last is None or len(last) == width or not isinstance(width, int):
        return []
    tower["hidden_size"] = width
    std = tower.get("initializer_range") or _STD
    drawn = draw_normal((width, last.shape[1]), std, seed, f"{_LAST}weight", last.dtype)
    weights[f"{_LAST}weight"] = drawn
    weights[f"{_LAST}bias"] = torch.zeros(width, dtype=last.dtype)
    return [
        f"{_LAST}weight is drawn with seed {seed}, because the tower is {len(last)} wide and the "
        f"decoder {width}"
    ]


def _grafted_before(text: Mapping[str, Any]) -> dict[str, Any] | None:
    """The scheme that an earlier graft wrote into a decoder's configuration."""
    kept = text.get("mrope")
    if not isinstance(kept, Mapping):
        return None
    return {name: value for name, value in kept.items() if name != "sections"}
