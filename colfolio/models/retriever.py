"""The retriever: towers, projection, unit length; packed inputs in, ragged vectors out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from tokenizers import Tokenizer
from torch import Tensor, nn

from colfolio.batch import MultiVectors, Packed
from colfolio.data.collate import Collator
from colfolio.data.prompts import Prompter, Templates
from colfolio.errors import CheckpointError, ColfolioError
from colfolio.models.border import BorderOutput
from colfolio.models.checkpoint import cast_parameters, save_parts
from colfolio.models.contract import Contract, check_contract, hash_weights
from colfolio.models.document_inputs import DocumentLike, DocumentReader, listed_documents
from colfolio.models.encoding import (
    OnProgress,
    batches_by_length,
    evaluating,
    listed_texts,
    scores_on,
)
from colfolio.models.lora.base_hash import hash_at_origin, origin_of
from colfolio.models.lora.layers import base_weights
from colfolio.models.lora.opening import load_adapted_parts
from colfolio.models.lora.placing import adapter_digest, lora_layers, named_modules
from colfolio.models.projected import ProjectedBackbone, usable_device


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """Where an image's tokens lie in its row: `rows * columns` vectors from `first`, row-major."""

    first: int
    rows: int
    columns: int


class Retriever(ProjectedBackbone):
    """A vision-language backbone, a projection, and the contract of how they are used.

    Args:
        backbone: a `PreTrainedModel` of `families.py`, with `visual` and `language_model`.
        projection: linear, from the hidden size to the dimensions of a vector; with an adapter,
            the layer that holds both.
        tokenizer: of the backbone.
        contract: templates, pixel budget, dimensions.
    """

    def __init__(
        self,
        backbone: Any,
        projection: nn.Module,
        tokenizer: Tokenizer,
        contract: Contract,
    ) -> None:
        super().__init__(backbone, projection, _collator(tokenizer, contract))
        self.tokenizer = tokenizer
        self._contract = self._kept(contract)
        self._origin = origin_of(self.weights())

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path,
        revision: str | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        base: str | Path | None = None,
        templates: Templates | None = None,
    ) -> Retriever:
        """Load a checkpoint folder or hub id, ready to encode; or an adapter in its base.

        Args:
            revision: of a hub id.
            device: None takes a GPU if there is one.
            dtype: of the weights; None keeps that of the file.
            base: of an adapter, as a folder or hub id; None takes the one that it names.
            templates: for a checkpoint without a contract; None takes those that its library writes
                today, and warns.

        Raises:
            CheckpointError: a file, tensor or token is missing, unexpected or damaged.
            ColfolioError: the device cannot be used.
        """
        place = usable_device(device)
        retriever = cls(*load_adapted_parts(path_or_id, revision, templates, base))
        if dtype is not None:
            retriever._cast(dtype)
        return retriever.to(place).eval()

    @property
    def contract(self) -> Contract:
        """What the model promises. Another one that is set holds at once, for inputs too.

        Raises:
            CheckpointError: backbone or projection cannot keep the one that is set; or the
                tokenizer lacks a token of its templates.
        """
        return self._contract

    @contract.setter
    def contract(self, contract: Contract) -> None:
        kept = self._kept(contract)
        if kept.deciding() != self._contract.deciding():
            self.collator = _collator(self.tokenizer, kept)
        self._contract = kept

    def save_pretrained(
        self, folder: str | Path, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write weights, tokenizer, configuration and contract; aside first, then renamed.

        Args:
            weights: those of `weights()`, put together by the caller if they are spread over ranks.

        Raises:
            ColfolioError: there is an adapter, which would be lost.
        """
        if weights is None and any(lora_layers(named_modules(self.backbone, self.projection))):
            raise ColfolioError(
                "the retriever has an adapter, which its weights alone do not hold: merge it, or "
                "write it by `save_adapter`"
            )
        named = self.weights() if weights is None else weights
        save_parts(Path(folder), named, self.backbone.config, self.tokenizer, self.contract)

    def weights(self) -> dict[str, Tensor]:
        """All tensors by colpali-engine's names: `language_model`, `visual`, `custom_text_proj`.

        With an adapter those of its base, except that merged layers have merged weights.
        """
        named = dict(self.backbone.state_dict())
        named |= {f"custom_text_proj.{k}": v for k, v in self.projection.state_dict().items()}
        return base_weights(named)

    def weights_hash(self) -> str | None:
        """SHA-256 of the weights, without an adapter, as they were read: in the dtype of the file.

        Returns:
            None if they were cast since, otherwise than by `from_pretrained`; then it is unknown.
        """
        return hash_at_origin(self._origin, self.weights())

    @property
    def dim(self) -> int:
        """Dimensions of each vector."""
        return self.contract.dim

    def fingerprint(self) -> str:
        """SHA-256 of all that decides a vector: weights as they are now, and what is promised."""
        adapter = adapter_digest(named_modules(self.backbone, self.projection))
        both = hash_weights(self.weights()) + adapter + self.contract.deciding()
        return hashlib.sha256(both.encode()).hexdigest()

    def forward(self, packed: Packed, below: BorderOutput | None = None) -> MultiVectors:
        """Vectors of unit length, one a token, for packed queries or documents.

        Args:
            below: what `run_below` made of the same batch; only what lies above its border runs.
        """
        hidden = self._hidden(packed, below)
        vectors = self.projection(hidden.to(self.projection.weight.dtype))  # [tokens, dim]
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        return MultiVectors(F.normalize(vectors, dim=-1), packed.offsets)

    def encode_queries(
        self,
        queries: Sequence[str],
        batch_size: int = 128,
        on_progress: OnProgress | None = None,
    ) -> MultiVectors:
        """Vectors of texts, float32 on the CPU, in the given order.

        Args:
            batch_size: texts in one call of the model; it changes no vector.
            on_progress: told after each batch how many texts are encoded, and of how many.

        Raises:
            TypeError: one text in place of a list, or something else among the texts.
            ValueError: a query has no tokens.
        """
        texts = listed_texts(queries)
        lengths = self.collator.query_lengths(texts)
        if 0 in lengths:
            row = lengths.index(0)
            raise ValueError(f"query {row} ({texts[row]!r}) has no tokens, so it finds nothing")
        batches = batches_by_length(lengths, batch_size)
        return self._encode(
            batches,
            lambda rows: self.collator.queries([texts[row] for row in rows]),
            on_progress,
        )

    def encode_documents(
        self,
        documents: Iterable[DocumentLike],
        batch_size: int = 64,
        on_progress: OnProgress | None = None,
    ) -> MultiVectors:
        """Vectors of images, pages and videos, float32 on the CPU, in the given order.

        Files are measured first, and opened only when their batch comes.

        Args:
            documents: uint8 arrays [height, width, 3], PIL images, paths of images; a `Page` of a
                PDF (all of them: `pdf_pages`); paths of videos, read at the contract's frame rate;
                a `Clip`.
            batch_size: documents in one call of the model, at most; and no more visual tokens than
                so many of the largest images have, so that long clips are fewer. It changes no
                vector.
            on_progress: told after each batch how many documents are encoded, and of how many.

        Raises:
            TypeError: one document in place of a list, or something else among the documents.
            DocumentError: a document cannot be read; the message names its row and its file.
        """
        with DocumentReader(
            listed_documents(documents), self.collator, self.contract.frame_rate
        ) as reader:
            most_tokens = batch_size * reader.page_tokens
            batches = batches_by_length(reader.num_tokens(), batch_size, most_tokens)
            return self._encode(
                batches, lambda rows: self.collator.documents(reader.read(rows)), on_progress
            )

    def score(
        self,
        queries: MultiVectors | Sequence[str],
        documents: MultiVectors | Iterable[DocumentLike],
    ) -> Float[Tensor, "queries documents"]:
        """MaxSim of every query with every document, on the CPU; what is not encoded yet, is.

        Raises:
            TypeError, ValueError: as `encode_queries`, `encode_documents` and `maxsim` do.
        """
        if not isinstance(queries, MultiVectors):
            queries = self.encode_queries(queries)
        if not isinstance(documents, MultiVectors):
            documents = self.encode_documents(documents)
        return scores_on(self.device, queries, documents)

    def visual_span(self, image_size: tuple[int, int]) -> VisualSpan:
        """Which vectors of a document are its image's, for an image of `(height, width)` pixels."""
        rows, columns = self.collator.document_size(*image_size)
        return VisualSpan(self.collator.prompter.num_before_image, rows, columns)

    def _kept(self, contract: Contract) -> Contract:
        """The contract, once backbone and projection are known to keep it."""
        check_contract(contract, self.backbone.config, "contract of a retriever")
        rows = len(self.projection.weight)
        if contract.dim != rows:
            raise CheckpointError(
                f"contract of a retriever: dim is {contract.dim}, but its projection has {rows} "
                "rows, and a vector as many dimensions"
            )
        return contract

    def _cast(self, dtype: torch.dtype) -> None:
        """Cast the weights just read, and keep of what they were what adapters need."""
        if all(tensor.dtype == dtype for tensor in self.weights().values()):
            cast_parameters(self, dtype)  # what an adapter has beside them
            return
        is_adapted = any(lora_layers(named_modules(self.backbone, self.projection)))
        before = self.contract.base_hash if is_adapted else hash_weights(self.weights())
        cast_parameters(self, dtype)
        self._origin = origin_of(self.weights(), before)

    @torch.no_grad()
    def _encode(
        self,
        batches: list[list[int]],
        collate: Callable[[list[int]], Packed],
        on_progress: OnProgress | None,
    ) -> MultiVectors:
        """The batches' rows, in the caller's order."""
        if not batches:
            return MultiVectors(torch.empty(0, self.dim), torch.zeros(1, dtype=torch.int64))
        total = sum(map(len, batches))
        encoded: dict[int, Float[Tensor, "_ dim"]] = {}
        with evaluating(self):
            for rows in batches:
                vectors = self(collate(rows).to(self.device))
                kept = MultiVectors(vectors.vectors.float().cpu(), vectors.offsets)
                encoded |= zip(rows, kept, strict=True)
                if on_progress is not None:
                    on_progress(len(encoded), total)
        return MultiVectors.from_list([encoded[row] for row in range(total)])


def _collator(tokenizer: Tokenizer, contract: Contract) -> Collator:
    """What makes the inputs that a contract promises."""
    prompter = Prompter(tokenizer, contract.templates)
    return Collator(prompter, contract.pixel_budget, contract.position_scheme)
