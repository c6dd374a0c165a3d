"""Small images that can be learnt in seconds: three coloured shapes in a row, named in words."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from colfolio.data.dataset import CorpusRow, Query, write_split

COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "grey": (128, 128, 128)}
FORMS = ("circle", "square", "triangle")
SIDE, STEP = 30, 36  # pixels
_WIDTH = 64
SHAPE: dict[str, Any] = {
    "dim": 32,
    "backbone": {
        "tie_word_embeddings": False,
        "text_config": {
            "hidden_size": _WIDTH,
            "intermediate_size": 2 * _WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "initializer_range": 0.05,
            "bos_token_id": 0,
            "eos_token_id": 0,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [4, 2, 2],
            },
        },
        "vision_config": {
            "depth": 2,
            "embed_dim": _WIDTH,
            "hidden_size": _WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
            "initializer_range": 0.05,
        },
    },
    "templates": {
        "num_query_suffix": 2,
        "document": "<|vision_start|><|image_pad|><|vision_end|>",
    },
    "pixel_budget": {"min_pixels": 784, "max_pixels": 50176},
    "tokenizer": {"vocab_size": 300},
}


def write_shapes(folder: Path, sizes: dict[str, int]) -> None:
    """Write a dataset whose splits share no combination of three shapes; 729 there are in all."""
    singles = [f"{colour} {form}" for colour in COLOURS for form in FORMS]
    triples = [(a, b, c) for a in singles for b in singles for c in singles]
    order = iter(np.random.default_rng(0).permutation(len(triples)).tolist())
    for split, size in sizes.items():
        picked = [triples[next(order)] for _ in range(size)]
        ids = [f"{split}-{number}" for number in range(size)]
        corpus = [CorpusRow(id_, _png(names), id_) for id_, names in zip(ids, picked, strict=True)]
        queries = [Query(id_, ", ".join(names)) for id_, names in zip(ids, picked, strict=True)]
        write_split(folder, split, corpus, queries, {id_: {id_: 1} for id_ in ids})


def _png(names: tuple[str, ...]) -> bytes:
    image = Image.new("RGB", (3 * STEP + 4, 2 * 28), (255, 255, 255))
    pen = ImageDraw.Draw(image)
    for number, name in enumerate(names):
        colour, form = name.split()
        left, top = 4 + STEP * number, 12
        box = (left, top, left + SIDE, top + SIDE)
        if form == "circle":
            pen.ellipse(box, fill=COLOURS[colour])
        elif form == "square":
            pen.rectangle(box, fill=COLOURS[colour])
        else:
            corners = [(left, top + SIDE), (left + SIDE // 2, top), (left + SIDE, top + SIDE)]
            pen.polygon(corners, fill=COLOURS[colour])
    stream = io.BytesIO()
    image.save(stream, format="PNG")
    return stream.getvalue()
