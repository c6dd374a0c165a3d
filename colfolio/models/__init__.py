"""Retrievers and generators: backbones of `transformers`, and what a checkpoint promises."""

from colfolio.models.adapters import (
    LoraSettings,
    add_lora,
    load_adapter,
    merge,
    remove,
    save_adapter,
    unmerge,
)
from colfolio.models.base import base_from_graft, base_from_shape, base_from_weights
from colfolio.models.generator import Generator
from colfolio.models.generator_base import generator_from_graft, generator_from_shape
from colfolio.models.retriever import Retriever
from colfolio.models.shape import Shape, train_tokenizer

__all__ = [
    "Generator",
    "LoraSettings",
    "Retriever",
    "Shape",
    "add_lora",
    "base_from_graft",
    "base_from_shape",
    "base_from_weights",
    "generator_from_graft",
    "generator_from_shape",
    "load_adapter",
    "merge",
    "remove",
    "save_adapter",
    "train_tokenizer",
    "unmerge",
]
