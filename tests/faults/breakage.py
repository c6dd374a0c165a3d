"""What breaks a run from inside, as a user's own change or another library would have."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

from colfolio.batch import Packed, offsets_of
from colfolio.commands import train as train_module
from colfolio.data import collate, sampler
from colfolio.data.prompts import Prompter, Templates
from colfolio.maxsim import maxsim
from colfolio.models import projected
from colfolio.models import retriever as retriever_module
from colfolio.models.lora import opening
from colfolio.mrope import position_ids
from colfolio.training import TrainingState, exact_batch, start

_SPOILT_AT = 40  # steps
_KEPT_TOKENS = 3  # of a row that is cut off
_FIRST_SCALE = 2.0**60


@contextmanager
def projection_drawn_anew() -> Iterator[None]:
    """The load of a base finds no projection in the files and draws one, another every time."""
    load, numbers = retriever_module.load_adapted_parts, itertools.count()

    def loading(*arguments: Any, **options: Any) -> Any:
        backbone, projection, tokenizer, contract = load(*arguments, **options)
        if "checkpoints" not in Path(arguments[0]).parts:  # which are whole
            generator = torch.Generator().manual_seed(next(numbers))
            with torch.no_grad():
                projection.weight.normal_(std=0.05, generator=generator)
        return backbone, projection, tokenizer, contract

    with patch.object(retriever_module, "load_adapted_parts", loading):
        yield


@contextmanager
def adapter_names_passed_over() -> Iterator[None]:
    """The load matches no name of the adapter's file, and leaves matrices B at zero."""
    inject = opening.inject

    def injecting(root: Any, plan: Any, weights: dict[str, Tensor]) -> None:
        inject(root, plan, {k: v * 0 if "lora_B" in k else v for k, v in weights.items()})

    with patch.object(opening, "inject", injecting):
        yield


@contextmanager
def base_unasked() -> Iterator[None]:
    """The load puts an adapter on whatever base is there."""
    put_in = opening.put_in

    def putting(adapter: Any, backbone: Any, projection: Any, own: Any) -> Any:
        return put_in(adapter, backbone, projection, own, adapter.contract.base_hash)

    with patch.object(opening, "put_in", putting):
        yield


def _positions(change: Callable[..., Tensor]) -> Any:
    """The collator's positions, as a function of them and of what it was asked with gives them."""

    def changed(types: Tensor, offsets: Tensor, **asked: Any) -> Tensor:
        return change(position_ids(types, offsets, **asked), types, offsets, asked)

    return patch.object(collate, "position_ids", changed)


def flattened() -> Any:
    """Image tokens are counted like text: grids were not handed over."""

    def count(ids: Tensor, _types: Tensor, offsets: Tensor, _asked: Any) -> Tensor:
        places = [torch.arange(int(size)) for size in offsets.diff()]
        return torch.cat(places).expand(3, -1).clone() if places else ids

    return _positions(count)


def transposed() -> Any:
    """Height and width of the positions are exchanged."""
    return _positions(lambda ids, *_: ids[[0, 2, 1]])


def rolled() -> Any:
    """Each token has the positions of the one before it."""
    return _positions(lambda ids, *_: ids.roll(1, dims=1))


def other_scheme() -> Any:
    """The collator follows another scheme than the checkpoint."""

    def other(_ids: Tensor, types: Tensor, offsets: Tensor, asked: dict[str, Any]) -> Tensor:
        return position_ids(types, offsets, **(asked | {"scheme": "videorope"}))

    return _positions(other)


@contextmanager
def templates_of_another() -> Iterator[None]:
    """Queries and images are written with the templates of another checkpoint."""
    collator_of = retriever_module._collator

    def making(tokenizer: Any, contract: Any) -> Any:
        own = contract.templates
        document = f"<|im_start|>{own.document}a page of text<|im_end|>"
        other = Templates(query="Question: {query}", num_query_suffix=0, document=document)
        collator = collator_of(tokenizer, contract)
        collator.prompter = Prompter(tokenizer, other)
        return collator

    with patch.object(retriever_module, "_collator", making):
        yield


@contextmanager
def rows_cut_off() -> Iterator[None]:
    """Rows of documents are cut at a greatest length, images or not."""
    whole = collate.Collator.documents

    def cut(self: Any, *arguments: Any, **options: Any) -> Packed:
        packed = whole(self, *arguments, **options)
        begins = packed.offsets[:-1].tolist()
        kept = [min(_KEPT_TOKENS, size) for size in packed.lengths.tolist()]
        places = [torch.arange(at, at + size) for at, size in zip(begins, kept, strict=True)]
        chosen = torch.cat(places)
        return replace(
            packed,
            token_ids=packed.token_ids[chosen],
            offsets=offsets_of(kept),
            position_ids=packed.position_ids[:, chosen],
        )

    with patch.object(collate.Collator, "documents", cut):
        yield


def _patches(change: Callable[[Tensor], Tensor]) -> Any:
    cut = collate.to_patches

    def changed(clips: Any, budget: Any) -> tuple[Tensor, Tensor]:
        patches, grids = cut(clips, budget)
        return change(patches), grids

    return patch.object(collate, "to_patches", changed)


def pixels_lost() -> Any:
    """All pixels are 0 before they reach the model."""
    return _patches(torch.zeros_like)


def scaled_twice() -> Any:
    """Pixels are divided by 255 twice, so that every image is nearly black."""
    mean, std = 0.45, 0.27
    return _patches(lambda patches: ((patches * std + mean) / 255 - mean) / std)


def same_order() -> Any:
    """The data set is gone through from its first row to its last, every time."""

    def order(weights: Any, _seed: int, _epoch: int) -> Any:
        return np.arange(len(weights))

    return patch.object(sampler, "_epoch_order", order)


def shuffled_once() -> Any:
    """The order was drawn before the run, and not again in any epoch."""
    drawn = sampler._epoch_order
    return patch.object(
        sampler, "_epoch_order", lambda weights, seed, _epoch: drawn(weights, seed, 0)
    )


@contextmanager
def vision_detached() -> Iterator[None]:
    """What the vision tower makes is detached before the decoder reads it."""
    features = projected.ProjectedBackbone._visual_features

    def detached(self: Any, packed: Any, below: Any) -> Tensor:
        return features(self, packed, below).detach()

    with patch.object(projected.ProjectedBackbone, "_visual_features", detached):
        yield


@contextmanager
def scores_in_bf16() -> Iterator[None]:
    """MaxSim, which training and the probe have in common, is computed in bf16."""

    def rounded(queries: Any, documents: Any) -> Tensor:
        return maxsim(queries, documents).bfloat16().float()

    with (
        patch.object(exact_batch, "maxsim", rounded),
        patch("colfolio.diagnosis.signals.probe.maxsim", rounded),
    ):
        yield


@contextmanager
def weight_spoilt() -> Iterator[None]:
    """A weight of the last decoder layer becomes infinite while the run goes on."""
    begin = train_module.start_training

    def starting(*arguments: Any, **options: Any) -> TrainingState:
        state = begin(*arguments, **options)
        layer = state.model.backbone.language_model.layers[-1].mlp.down_proj

        def spoil(_module: Any, _inputs: Any) -> None:
            if state.step >= _SPOILT_AT:
                layer.weight.data[0, 0] = torch.inf

        layer.register_forward_pre_hook(spoil)
        return state

    with patch.object(train_module, "start_training", starting):
        yield


@contextmanager
def vision_spoilt() -> Iterator[None]:
    """The vision tower's output is divided by zero for some images, from a step on."""
    begin = train_module.start_training

    def starting(*arguments: Any, **options: Any) -> TrainingState:
        state = begin(*arguments, **options)

        def divide(_module: Any, _inputs: Any, output: Tensor) -> Tensor:
            return output / (output - output) if state.step >= _SPOILT_AT else output

        state.model.backbone.visual.blocks[0].mlp.register_forward_hook(divide)
        return state

    with patch.object(train_module, "start_training", starting):
        yield


def loss_scaled_too_far() -> Any:
    """The scale of the loss for half precision begins far too high."""
    return patch.object(
        start,
        "build_scaler",
        lambda _precision, device: GradScaler(device.type, init_scale=_FIRST_SCALE),
    )
