"""The retriever: towers, projection, unit length; packed inputs in, ragged vectors out.

Letters: N tokens of all rows, P patches, V visual tokens, H hidden size.
"""

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

from colfolio.attention import set_attention
from colfolio.batch import MultiVectors, Packed
from colfolio.data.collate import Collator
from colfolio.data.prompts import Prompter, Templates
from colfolio.errors import ColfolioError
from colfolio.models.border import Border, BorderOutput
from colfolio.models.checkpoint import cast_parameters, save_parts
from colfolio.models.contract import Contract, hash_weights
from colfolio.models.document_inputs import DocumentLike, DocumentReader, listed_documents
from colfolio.models.encoding import (
    OnProgress,
    batches_by_length,
    evaluating,
    listed_texts,
    scores_on,
)
from colfolio.models.linear import linear, speed_up_linears
from colfolio.models.lora.layers import base_weights
from colfolio.models.lora.opening import load_adapted_parts
from colfolio.models.lora.placing import adapter_digest, lora_layers, named_modules
from colfolio.models.towers import (
    Deepstack,
    Stretch,
    entrances,
    exits,
    run_text,
    run_vision,
)


@dataclass(frozen=True, slots=True)
class VisualSpan:
    """Where an image's tokens lie in its row: `rows * columns` vectors from `first`, row-major."""

    first: int
    rows: int
    columns: int


class Retriever(nn.Module):
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
        super().__init__()
        set_attention(backbone)
        if not isinstance(backbone.visual.patch_embed, LinearPatchEmbed):
            backbone.visual.patch_embed = LinearPatchEmbed(backbone.visual.patch_embed.proj)
        speed_up_linears(backbone)
        # Any: which attributes a family's model has is known to `transformers` only at run time
        self.backbone: Any = backbone
        self.projection: Any = projection
        self.tokenizer = tokenizer
        self.contract = contract
        prompter = Prompter(tokenizer, contract.templates)
        self.collator = Collator(prompter, contract.pixel_budget, contract.position_scheme)

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
        place = _usable(device)
        retriever = cls(*load_adapted_parts(path_or_id, revision, templates, base))
        if dtype is not None:
            cast_parameters(retriever, dtype)
        return retriever.to(place).eval()

    def save_pretrained(
        self, folder: str | Path, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write weights, tokenizer, configuration and contract; aside first, then renamed.

        Args:
            weights: those of `weights()`, put together by the caller if they are spread over ranks.

        Raises:
            ColfolioError: there is an adapter, which would be lost.
        """
        if any(lora_layers(named_modules(self.backbone, self.projection))):
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

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.projection.weight.device

    @property
    def dim(self) -> int:
        """Dimensions of each vector."""
        return self.contract.dim

    def units(self) -> list[nn.Module]:
        """The modules that hold all parameters, each run by a call; of these a model is sharded."""
        visual, text = self.backbone.visual, self.backbone.language_model
        vision = [*entrances(visual), *visual.blocks, *exits(visual)]
        return [*vision, text.embed_tokens, *text.layers, text.norm, self.projection]

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
        layers = below.border.layers if below and below.border.tower == "text" else 0
        deepstack = None
        if below and layers:
            states = below.states
        else:
            states, deepstack = self._embeddings(packed, below)
        text = self.backbone.language_model
        hidden = run_text(text, states, packed, Stretch(layers), deepstack)
        vectors = self.projection(hidden.to(self.projection.weight.dtype))  # [N, dim]
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        return MultiVectors(F.normalize(vectors, dim=-1), packed.offsets)

    @torch.no_grad()
    def run_below(self, packed: Packed, border: Border) -> BorderOutput:
        """What the layers below a border make of a batch; see `frozen_border`."""
        visual, text = self.backbone.visual, self.backbone.language_model
        if border.tower == "vision":
            stretch = Stretch(end=border.layers)
            return BorderOutput(
                border, run_vision(visual, packed.patches, packed, self._merge, stretch)
            )
        if not border.layers:
            return BorderOutput(border, run_vision(visual, packed.patches, packed, self._merge))
        states, deepstack = self._embeddings(packed, None)
        stretch = Stretch(end=border.layers)
        return BorderOutput(border, run_text(text, states, packed, stretch, deepstack))

    def _embeddings(
        self, packed: Packed, below: BorderOutput | None
    ) -> tuple[Float[Tensor, "N H"], Deepstack | None]:
        """What the text tower reads: embedded tokens, and visual features in their places."""
        embeddings = self.backbone.language_model.embed_tokens(packed.token_ids)  # [N, H]
        if not len(packed.grid_thw):
            return embeddings, None
        prompter = self.collator.prompter
        visual = packed.token_ids == prompter.image_token_id
        if prompter.video_token_id is not None:
            visual = visual | (packed.token_ids == prompter.video_token_id)
        made = self._visual_features(packed, below).to(embeddings.dtype)
        features, *more = made.split(embeddings.shape[1], dim=1)  # [V, H] each
        states = embeddings.masked_scatter(visual.unsqueeze(1), features)
        return states, Deepstack(visual, tuple(more)) if more else None

    def _visual_features(
        self, packed: Packed, below: BorderOutput | None
    ) -> Float[Tensor, "V width"]:
        """Of each visual token, and beside them those of deepstack."""
        if below is None:
            return run_vision(self.backbone.visual, packed.patches, packed, self._merge)
        if below.border.tower == "text":
            return below.states
        stretch = Stretch(below.border.layers)
        return run_vision(self.backbone.visual, below.states, packed, self._merge, stretch)

    @property
    def _merge(self) -> int:
        return self.contract.pixel_budget.merge

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


class LinearPatchEmbed(nn.Module):
    """The patch embedding as one linear map over the weights of its convolution.

    The stride equals the kernel, so both compute the same; the product is faster on a CPU.
    """

    def __init__(self, proj: nn.Conv3d) -> None:
        super().__init__()
        self.proj = proj

    def forward(self, patches: Float[Tensor, "P patch_dim"]) -> Float[Tensor, "P width"]:
        """Embed flat patches."""
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def _usable(device: str | torch.device | None) -> torch.device:
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ColfolioError(f"device {str(device)!r} cannot be used: {reason}") from None
