"""The retriever: towers, projection, unit length; packed inputs in, ragged vectors out.

Letters: N tokens of all rows, P patches, V visual tokens, H hidden size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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

from colfolio.attention import TEXT_ATTENTION, VISION_ATTENTION, register_attention
from colfolio.batch import MultiVectors, Packed
from colfolio.data.collate import Collator
from colfolio.data.pages.images import load_image
from colfolio.data.prompts import Prompter
from colfolio.errors import ColfolioError
from colfolio.models.checkpoint import cast_parameters, load_parts, save_parts
from colfolio.models.contract import Contract, hash_weights
from colfolio.models.vision_positions import vision_position_ids

# "_": images of one call may differ in size
ImageLike = UInt8[np.ndarray, "_H _W 3"] | Path | str | Image.Image


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
        register_attention()
        backbone.set_attn_implementation(TEXT_ATTENTION)
        backbone.visual.config._attn_implementation = VISION_ATTENTION
        if not isinstance(backbone.visual.patch_embed, LinearPatchEmbed):
            backbone.visual.patch_embed = LinearPatchEmbed(backbone.visual.patch_embed.proj)
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

    def save_pretrained(self, folder: str | Path) -> None:
        """Write weights, tokenizer, configuration and contract; aside first, then renamed."""
        save_parts(
            Path(folder), self.weights(), self.backbone.config, self.tokenizer, self.contract
        )

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

    def fingerprint(self) -> str:
        """SHA-256 of all that decides a vector: the weights as they are now, and the contract."""
        both = hash_weights(self.weights()) + self.contract.model_dump_json()
        return hashlib.sha256(both.encode()).hexdigest()

    def forward(self, packed: Packed) -> MultiVectors:
        """Vectors of unit length, one a token, for packed queries or documents."""
        embeddings = self.backbone.language_model.embed_tokens(packed.token_ids)  # [N, H]
        if len(packed.grid_thw):
            visual = packed.token_ids == self.collator.prompter.image_token_id
            features = self._visual_features(packed).to(embeddings.dtype)  # [V, H]
            embeddings = embeddings.masked_scatter(visual.unsqueeze(1), features)
        hidden = self.backbone.language_model(
            inputs_embeds=embeddings.unsqueeze(0),
            position_ids=packed.position_ids.unsqueeze(1),
            cu_seq_lens_q=packed.offsets,
            use_cache=False,
        ).last_hidden_state[0]
        vectors = self.projection(hidden)  # [N, dim]
        vectors = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
        return MultiVectors(F.normalize(vectors, dim=-1), packed.offsets)

    def _visual_features(self, packed: Packed) -> Float[Tensor, "V H"]:
        visual = self.backbone.visual
        merge = self.contract.pixel_budget.merge
        return visual(
            packed.patches.to(visual.dtype),
            packed.grid_thw,
            position_ids=vision_position_ids(packed.grid_thw, merge).to(packed.patches.device),
        ).pooler_output

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
        self, documents: Iterable[ImageLike], batch_size: int = 64
    ) -> MultiVectors:
        """Vectors of images (arrays, PIL images, paths), float32 on the CPU, in the given order."""
        images = [_pixels(document) for document in documents]
        sizes = [rows * columns for rows, columns in map(self._token_grid, images)]
        return self._encode(
            sizes, batch_size, lambda rows: self.collator.documents([images[row] for row in rows])
        )

    def visual_span(self, image_size: tuple[int, int]) -> VisualSpan:
        """Which vectors of a document are its image's, for an image of `(height, width)` pixels."""
        rows, columns = self.collator.document_size(*image_size)
        return VisualSpan(self.collator.prompter.num_before_image, rows, columns)

    def _token_grid(self, image: np.ndarray) -> tuple[int, int]:
        return self.collator.document_size(*image.shape[:2])

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
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


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


def _pixels(document: ImageLike) -> np.ndarray:
    if isinstance(document, np.ndarray):
        if document.dtype != np.uint8 or document.ndim != 3 or document.shape[2] != 3:
            raise ValueError(
                "an image is uint8 [height, width, 3] in RGB, received "
                f"{document.dtype} {list(document.shape)}"
            )
        return document
    return load_image(Path(document) if isinstance(document, str) else document)
