"""A model that was read, whose its files are, and what its library makes of them."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from colfolio.data.prompts import Templates
from colfolio.diagnosis.preflight.trial import paired_rows
from colfolio.diagnosis.signals import ProbeBatch
from colfolio.models.adapters import has_adapter, merge, unmerge
from colfolio.models.contract import CONTRACT_FILE
from colfolio.models.formats import AssumedWarning, detect
from colfolio.models.formats.sentence_transformers import read_modules, sentence_usage
from colfolio.models.formats.usage import engine_usage, retrieval_usage
from colfolio.models.hub import Location
from colfolio.models.lora.files import read_adapter
from colfolio.models.lora.opening import base_of
from colfolio.models.retriever import Retriever

_TEXTS = ("what does the page say?", "a", "chapter 12: results, and how they were measured")


@dataclass(frozen=True, slots=True)
class Subject:
    """A model that was read, and what its files are.

    Args:
        retriever: with an adapter, if the files hold one.
        format: whose code calls it: `colfolio`, or the library that the files are for.
        folder: of the files; of an adapter, its own.
        base: of an adapter.
    """

    retriever: Retriever
    format: str
    folder: Path
    base: Path | None = None

    @property
    def is_ours(self) -> bool:
        """Whether Colfolio calls it."""
        return self.format == "colfolio"

    @property
    def library(self) -> str:
        """Its name."""
        return "Colfolio" if self.is_ours else self.format


def read(location: Location, device: str | None) -> Retriever:
    """The model of a folder or hub id; what was assumed of it is in its contract."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumedWarning)
        name = location.hub_id or location.folder
        return Retriever.from_pretrained(name, location.commit, device=device)


def subject_of(retriever: Retriever, folder: Path, *, is_adapter: bool) -> Subject:
    """A model with whose its files are; an adapter without our contract is colpali-engine's."""
    if not is_adapter:
        return Subject(retriever, detect(folder), folder)
    is_own = (folder / CONTRACT_FILE).is_file()
    base = base_of(read_adapter(folder)).folder
    return Subject(retriever, "colfolio" if is_own else "colpali-engine", folder, base)


def place_of(subject: Subject) -> Path:
    """Where the configuration of the model lies; adapters change no positions."""
    folder = subject.base or subject.folder
    return read_modules(folder).backbone if detect(folder) == "sentence-transformers" else folder


def is_retrieval(subject: Subject) -> bool:
    """Whether the library's model is `ColQwen2ForRetrieval`, by itself or as a module."""
    is_module = (
        subject.format == "sentence-transformers" and read_modules(subject.folder).is_retrieval
    )
    return subject.format == "transformers" or is_module


def library_strings(subject: Subject) -> Templates | None:
    """What the library writes around queries and pages; None for Colfolio: its contract says."""
    retriever, folder = subject.retriever, subject.base or subject.folder
    config = retriever.backbone.config
    if subject.is_ours:
        return None
    if subject.format == "transformers":
        return retrieval_usage(folder, config).templates
    if subject.format == "sentence-transformers":
        return sentence_usage(folder, read_modules(folder), config, retriever.tokenizer).templates
    return engine_usage(folder, config).templates


def probe_rows(retriever: Retriever) -> ProbeBatch:
    """Texts of several lengths, and noise of several sizes."""
    side = retriever.contract.pixel_budget.factor
    noise = np.random.default_rng(0)
    pages = [
        noise.integers(0, 256, (height * side, width * side, 3), dtype=np.uint8)
        for height, width in ((2, 3), (4, 2), (1, 5))
    ]
    return paired_rows(retriever.collator, pages, _TEXTS)


def merged_weights(retriever: Retriever) -> dict[str, Tensor]:
    """All weights on the CPU, with an adapter merged into them; the retriever is as it was."""
    if not has_adapter(retriever):
        return {name: tensor.detach().cpu() for name, tensor in retriever.weights().items()}
    merge(retriever, keeps_adapter=True)
    try:
        return {name: tensor.detach().cpu() for name, tensor in retriever.weights().items()}
    finally:
        unmerge(retriever)
