"""Tiny generators, and conversations about shapes that move, for tests of several packages."""

import copy
import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from colfolio.models import train_tokenizer
from colfolio.models.generator_base import generator_from_shape

DIRECTIONS = {"left": (0, -1), "right": (0, 1), "down": (1, 0)}
QUESTION = "where does it go?"


def generator_of(shape, seed=0, tied=False, texts=(QUESTION, *DIRECTIONS), **values):
    """A generator of a tiny shape, whose head is the embedding or not."""
    backbone = copy.deepcopy(shape.backbone)
    is_grafted = shape.family == "colfolio_grafted"
    (backbone["text_config"] if is_grafted else backbone)["tie_word_embeddings"] = tied
    tokenizer = train_tokenizer(texts, shape.tokenizer)
    shape = shape.model_copy(update={"backbone": backbone})
    return generator_from_shape(shape, tokenizer, seed, **values)


def moving_square(direction, generator, frames=4):
    """Frames of 56 x 56 in which a grey square goes 10 pixels a frame."""
    down, right = DIRECTIONS[direction]
    top, left = generator.integers(0, 14, 2) + np.array([0, 28 if right < 0 else 0])
    clip = np.full((frames, 56, 56, 3), 255, dtype=np.uint8)
    for number in range(frames):
        y, x = top + 8 * down * number, left + 8 * right * number
        clip[number, max(y, 0) : y + 14, max(x, 0) : x + 14] = 60
    return clip


def write_moving(folder, split, count, seed=0):
    """Write a split of clips whose directions take turns, as Parquet with stored frames."""
    generator = np.random.default_rng(seed)
    answers = [list(DIRECTIONS)[number % 3] for number in range(count)]
    clips = [moving_square(answer, generator) for answer in answers]
    columns = {
        "question": [QUESTION] * count,
        "answer": answers,
        "frames": [[{"bytes": png(frame), "path": None} for frame in clip] for clip in clips],
        "seconds_per_frame": [0.5] * count,
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}-00000-of-00001.parquet")


def write_lines(folder, split, rows):
    """Write a split as JSONL."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")


def png(pixels):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()
