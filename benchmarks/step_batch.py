"""The model and the global batch of `step.py`: packed for Colfolio, padded for its peers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from colfolio.batch import ContrastiveBatch, Packed
from colfolio.data.preparing.deduplicate import pixel_digest
from colfolio.models import Retriever, Shape, base_from_shape, train_tokenizer

TOKEN_SIDE = 28  # pixels of a visual token
# A third of the 64 to 768 visual tokens that ragged pages have under ColQwen2's budget.
FEWEST, MOST = 21, 256
UNIFORM = (14, 10)  # rows and columns of visual tokens: 140, the mean of the ragged ones
UPRIGHT = 1.6  # the most that a page is taller than wide, or wider than tall
WORDS = ("invoice", "total", "by", "country", "chapter", "results", "table", "of", "energy", "page")
SHAPE = {
    "dim": 128,
    "backbone": {
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": 256,
            "intermediate_size": 768,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "initializer_range": 0.05,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [16, 8, 8],
            },
        },
        "vision_config": {
            "depth": 4,
            "embed_dim": 192,
            "hidden_size": 256,
            "num_heads": 3,
            "mlp_ratio": 4,
            "initializer_range": 0.05,
        },
    },
    "pixel_budget": {"min_pixels": TOKEN_SIDE**2, "max_pixels": MOST * TOKEN_SIDE**2},
}


@dataclass(frozen=True, slots=True)
class Rows:
    """A global batch in the order in which it was drawn: query i belongs to page i."""

    texts: list[str]
    pages: list[np.ndarray]

    def sorted_by_page(self) -> Rows:
        """The same pairs, the smallest page first."""
        order = sorted(range(len(self.pages)), key=lambda row: self.pages[row].size)
        return Rows([self.texts[row] for row in order], [self.pages[row] for row in order])


def build_model() -> Retriever:
    """The model of all sides: 6 million parameters, the same random weights each time."""
    shape = Shape.model_validate(SHAPE)
    return base_from_shape(shape, train_tokenizer(WORDS, shape.tokenizer), seed=0).train()


def draw_rows(is_ragged: bool, num_rows: int) -> Rows:
    """Pairs of a text and a page of noise; ragged ones in an order that tells nothing of sizes."""
    generator = np.random.default_rng(0)
    texts, pages = [], []
    for _ in range(num_rows):
        num_words = int(generator.integers(5, 26)) if is_ragged else 15
        texts.append(" ".join(generator.choice(WORDS, num_words)))
        rows, columns = _ragged_size(generator) if is_ragged else UNIFORM
        size = (TOKEN_SIDE * rows, TOKEN_SIDE * columns, 3)
        pages.append(generator.integers(0, 256, size, dtype=np.uint8))
    return Rows(texts, pages)


def packed_batch(model: Retriever, rows: Rows) -> ContrastiveBatch:
    """The batch as Colfolio's loader makes it: each side in order of size, nothing padded."""
    lengths = model.collator.query_lengths(rows.texts)
    queries = sorted(range(len(lengths)), key=lengths.__getitem__)
    documents = sorted(range(len(lengths)), key=lambda row: rows.pages[row].shape[:2])
    positives = torch.tensor(queries).unsqueeze(1) == torch.tensor(documents)
    return ContrastiveBatch(
        model.collator.queries([rows.texts[row] for row in queries]),
        model.collator.documents([rows.pages[row] for row in documents]),
        positives,
        torch.zeros_like(positives),
        torch.tensor(queries),
        torch.tensor(documents),
        tuple(pixel_digest(rows.pages[row]) for row in documents),
    )


def padded_batch(model: Retriever, rows: Rows) -> tuple[dict[str, Any], dict[str, Any]]:
    """The batch as `Qwen2VLProcessor` makes it, queries and documents: padded on the right.

    Token ids and patches are those of the packed batch. Padding on the left, which colpali-engine
    prefers, would keep sentence-transformers from cutting it off in its mini batches.
    """
    image_token = model.collator.prompter.image_token_id
    sides = (model.collator.queries(rows.texts), model.collator.documents(rows.pages))
    return _padded(sides[0], image_token), _padded(sides[1], image_token)


def _padded(packed: Packed, image_token: int) -> dict[str, Any]:
    sequences = list(packed.token_ids.split(packed.lengths.tolist()))
    ids = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)  # [rows, longest]
    seen = torch.arange(ids.shape[1]) < packed.lengths.unsqueeze(1)
    inputs = {
        "input_ids": ids,
        "attention_mask": seen.long(),
        "mm_token_type_ids": (ids == image_token).int(),
    }
    if len(packed.grid_thw):
        inputs |= {"pixel_values": packed.patches, "image_grid_thw": packed.grid_thw}
    return inputs


def _ragged_size(generator: np.random.Generator) -> tuple[int, int]:
    """Rows and columns of a page that has any number of visual tokens, one as likely as another."""
    num_tokens = generator.integers(FEWEST, MOST + 1)
    upright = UPRIGHT ** generator.uniform(-1, 1)
    rows = round(math.sqrt(num_tokens * upright))
    return rows, min(round(num_tokens / rows), MOST // rows)
