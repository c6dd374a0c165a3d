"""Retrievers: backbones of `transformers`, a projection, and what a checkpoint promises."""

from colfolio.models.base import Shape, base_from_shape, base_from_weights, train_tokenizer
from colfolio.models.retriever import Retriever

__all__ = ["Retriever", "Shape", "base_from_shape", "base_from_weights", "train_tokenizer"]
