"""The retriever: towers, projection, unit length; packed inputs in, ragged vectors out.

Letters: N tokens of all rows, P patches, V visual tokens, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, UInt8
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

from colfolio.attention import set_attention
from colfolio.batch import MultiVectors, Packed
from colfolio.data.collate import Collator
from colfolio.data.pages.images import load_image
from colfolio.data.prompts import Prompter
from colfolio.data.video import Clip
from colfolio.errors import ColfolioError
from colfolio.models.border import Border, BorderOutput
from colfolio.models.checkpoint import cast_parameters, load_parts, save_parts
from colfolio.models.contract import Contract, hash_weights
from colfolio.models.linear import linear, speed_up_linears
from colfolio.models.towers import Stretch, run_text, run_vision

# "_": images of one call may differ in size
DocumentLike = UInt8[np.ndarray, "_H _W 3"] | Path | str | Image.Image | Clip


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
        projection: linear, from the hidden size to the dimensions of a vector.
        tokenizer: of the backbone.
        contract: templates, pixel budget, dimensions.
    """

    def __init__(
        self,
        backbone: Any,
        projection: nn.Linear,
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
        self.projection = projection
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
    ) -> Retriever:
        """Load a checkpoint folder or hub id, ready to encode.

        Args:
            revision: of a hub id.
            device: None takes a GPU if there is one.
            dtype: of the weights; None keeps that of the file.

        Raises:
            CheckpointError: a file, tensor or token is missing, unexpected or damaged.
            ColfolioError: the device cannot be used.
        """
        place = _usable(device)
        retriever = cls(*load_parts(path_or_id, revision))
        if dtype is not None:
            cast_parameters(retriever, dtype)
        return retriever.to(place).eval()

    def save_pretrained(
        self, folder: str | Path, weights: Mapping[str, Tensor] | None = None
    ) -> None:
        """Write weights, tokenizer, configuration and contract; aside first, then renamed.

        Args:
            weights: those of `weights()`, put together by the caller if they are spread over ranks.
        """
        named = self.weights() if weights is None else weights
        save_parts(Path(folder), named, self.backbone.config, self.tokenizer, self.contract)

    def weights(self) -> dict[str, Tensor]:
        """All tensors by colpali-engine's names: `language_model`, `visual`, `custom_text_proj`."""
        named = dict(self.backbone.state_dict())
        named |= {f"custom_text_proj.{k}": v for k, v in self.projection.state_dict().items()}
        return named

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
        vision = [visual.patch_embed, *visual.blocks, visual.merger]
        return [*vision, text.embed_tokens, *text.layers, text.norm, self.projection]

    def fingerprint(self) -> str:
        """SHA-256 of all that decides a vector: the weights as they are now, and the contract."""
        both = hash_weights(self.weights()) + self.contract.model_dump_json()
        return hashlib.sha256(both.encode()).hexdigest()

    def forward(self, packed: Packed, below: BorderOutput | None = None) -> MultiVectors:
        """Vectors of unit length, one a token, for packed queries or documents.

        Args:
            below: what `run_below` made of the same batch; only what lies above its border runs.
        """
        layers = below.border.layers if below and below.border.tower == "text" else 0
        states = below.states if below and layers else self._embeddings(packed, below)
        hidden = run_text(self.backbone.language_model, states, packed, Stretch(layers))
        vectors = self.projection(hidden)  # [N, dim]
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
        embeddings = self._embeddings(packed, None)
        return BorderOutput(border, run_text(text, embeddings, packed, Stretch(end=border.layers)))

    def _embeddings(self, packed: Packed, below: BorderOutput | None) -> Float[Tensor, "N H"]:
        """What the text tower reads: embedded tokens, and visual features in their places."""
        embeddings = self.backbone.language_model.embed_tokens(packed.token_ids)  # [N, H]
        if not len(packed.grid_thw):
            return embeddings
        prompter = self.collator.prompter
        visual = packed.token_ids == prompter.image_token_id
        if prompter.video_token_id is not None:
            visual = visual | (packed.token_ids == prompter.video_token_id)
        features = self._visual_features(packed, below).to(embeddings.dtype)  # [V, H]
        return embeddings.masked_scatter(visual.unsqueeze(1), features)

    def _visual_features(self, packed: Packed, below: BorderOutput | None) -> Float[Tensor, "V H"]:
        if below is None:
            return run_vision(self.backbone.visual, packed.patches, packed, self._merge)
        if below.border.tower == "text":
            return below.states
        stretch = Stretch(below.border.layers)
        return run_vision(self.backbone.visual, below.states, packed, self._merge, stretch)

    @property
    def _merge(self) -> int:
        return self.contract.pixel_budget.merge

    def encode_queries(self, queries: Sequence[str], batch_size: int = 128) -> MultiVectors:
        """Vectors of texts, float32 on the CPU, in the given order.

        Raises:
            ValueError: a query has no tokens.
        """
        if isinstance(queries, str):
            raise TypeError(f"encode_queries takes a list of texts, received one: {queries!r}")
        texts = list(queries)
        lengths = self.collator.query_lengths(texts)
        if 0 in lengths:
            row = lengths.index(0)
            raise ValueError(f"query {row} ({texts[row]!r}) has no tokens, so it finds nothing")
        return self._encode(
            lengths, batch_size, lambda rows: self.collator.queries([texts[row] for row in rows])
        )

    def encode_documents(
        self, documents: Iterable[DocumentLike], batch_size: int = 64
    ) -> MultiVectors:
        """Vectors of images (arrays, PIL images, paths) and clips, float32 on the CPU, in order."""
        shown = [_shown(document) for document in documents]
        sizes = [self.collator.num_visual_tokens(each) for each in shown]
        return self._encode(
            sizes, batch_size, lambda rows: self.collator.documents([shown[row] for row in rows])
        )

    def visual_span(self, image_size: tuple[int, int]) -> VisualSpan:
        """Which vectors of a document are its image's, for an image of `(height, width)` pixels."""
        rows, columns = self.collator.document_size(*image_size)
        return VisualSpan(self.collator.prompter.num_before_image, rows, columns)

    @torch.no_grad()
    def _encode(
        self, lengths: list[int], batch_size: int, collate: Callable[[list[int]], Packed]
    ) -> MultiVectors:
        """Rows of like length go together; the result is in the caller's order."""
        if not lengths:
            return MultiVectors(torch.empty(0, self.dim), torch.zeros(1, dtype=torch.int64))
        was_training = self.training
        self.eval()
        order = sorted(range(len(lengths)), key=lengths.__getitem__)
        encoded: list[Tensor] = [torch.empty(0)] * len(lengths)
        try:
            for rows in _batches(order, batch_size):
                vectors = self(collate(rows).to(self.device))
                kept = MultiVectors(vectors.vectors.float().cpu(), vectors.offsets)
                for row, vector in zip(rows, kept, strict=True):
                    encoded[row] = vector
        finally:
            self.train(was_training)
        return MultiVectors.from_list(encoded)


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


def _batches(order: list[int], size: int) -> Iterator[list[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def _shown(document: DocumentLike) -> np.ndarray | Clip:
    if isinstance(document, Clip):
        return document
    if isinstance(document, np.ndarray):
        if document.dtype != np.uint8 or document.ndim != 3 or document.shape[2] != 3:
            raise ValueError(
                "an image is uint8 [height, width, 3] in RGB, received "
                f"{document.dtype} {list(document.shape)}"
            )
        return document
    return load_image(Path(document) if isinstance(document, str) else document)
