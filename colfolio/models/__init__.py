"""Retrievers: backbones of `transformers`, a projection, and what a checkpoint promises."""

from colfolio.models.base import base_from_graft, base_from_shape, base_from_weights
from colfolio.models.retriever import Retriever
from colfolio.models.shape import Shape, train_tokenizer

__all__ = [
    "Retriever",
    "Shape",
    "base_from_graft",
    "base_from_shape",
    "base_from_weights",
    "train_tokenizer",
]
