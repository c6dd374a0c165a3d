"""Short clips of two shapes that move, what is said of them, and the same told in words alone.

A clip has three steps. In each, a shape fills a place of 14 x 14 pixels, which is one token, and it
goes one place a step. The two frames of a step are equal, so that a vision tower, which sees one
step at a time, cannot see a movement: only who compares places over steps can tell where a shape
goes. Clips are of four sizes, so that no number of tokens always lies between a place and the one
below it.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

COLOURS = {
    "blue": (40, 60, 220),
    "green": (30, 150, 60),
    "red": (220, 40, 40),
    "yellow": (230, 200, 30),
}
FORMS = ("circle", "square", "triangle")
DIRECTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
QUESTION = "what moves?"
STEPS = 3
PLACE = 14  # pixels
SIDES = (3, 4)  # of a clip, in places
_SECONDS = 0.5  # from one frame to the next, of which a step has two
_WHO = ("anna", "ben", "the dog", "the old cat", "a child", "nobody")
_DOES = ("see", "like", "find", "carry", "forget")


@dataclass(frozen=True, slots=True)
class Mover:
    """A shape, and where it goes."""

    colour: str
    form: str
    direction: str

    @property
    def name(self) -> str:
        return f"a {self.colour} {self.form}"


@dataclass(frozen=True, slots=True)
class Scene:
    """Two movers, where each is at every step, row and column, and how large the clip is."""

    movers: tuple[Mover, Mover]
    paths: tuple[list[tuple[int, int]], list[tuple[int, int]]]
    size: tuple[int, int]

    @property
    def description(self) -> str:
        return ", ".join(f"{mover.name} moves {mover.direction}" for mover in self.movers)

    @property
    def told(self) -> str:
        """The places of each step, in words."""
        steps = (
            " and ".join(
                f"{mover.name} at {row + 1} {column + 1}"
                for mover, (row, column) in zip(self.movers, places, strict=True)
            )
            for places in zip(*self.paths, strict=True)
        )
        return ", then ".join(steps)


def pairs_of(held_out: Mapping[str, int]) -> dict[str, list[tuple[Mover, Mover]]]:
    """Pairs of movers of unlike colours for each split, none in two; `train` gets the rest of 864.

    Args:
        held_out: how many each other split gets.
    """
    movers = [Mover(*words) for words in product(COLOURS, FORMS, DIRECTIONS)]
    pairs = [(a, b) for a, b in combinations(movers, 2) if a.colour != b.colour]
    order = iter(np.random.default_rng(0).permutation(len(pairs)).tolist())
    chosen = {split: [pairs[next(order)] for _ in range(size)] for split, size in held_out.items()}
    return chosen | {"train": [pairs[number] for number in order]}


def scenes(
    pairs: Sequence[tuple[Mover, Mover]],
    count: int,
    generator: np.random.Generator,
    sides: Sequence[int] = SIDES,
) -> Iterator[Scene]:
    """Scenes whose pairs take turns; shapes are never in one place at a time."""
    for number in range(count):
        movers, size = pairs[number % len(pairs)], generator.choice(sides, 2)
        while True:
            first, second = (_path(mover, size, generator) for mover in movers)
            if all(one != other for one, other in zip(first, second, strict=True)):
                break
        yield Scene(movers, (first, second), (int(size[0]), int(size[1])))


def write_clips(
    folder: Path,
    split: str,
    pairs: Sequence[tuple[Mover, Mover]],
    count: int,
    seed: int,
    sides: Sequence[int] = SIDES,
) -> None:
    """Write a split of conversations about clips, as Parquet with stored frames."""
    made = list(scenes(pairs, count, np.random.default_rng((seed, 1)), sides))
    columns = {
        "question": [QUESTION] * count,
        "answer": [scene.description for scene in made],
        "frames": [[{"bytes": frame, "path": None} for frame in _frames(scene)] for scene in made],
        "seconds_per_frame": [_SECONDS] * count,
    }
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), folder / f"{split}.parquet")


def text_rows(
    pairs: Sequence[tuple[Mover, Mover]], count: int, generator: np.random.Generator
) -> Iterator[tuple[str, str, str]]:
    """Context, question and answer in words alone; every third is about something else."""
    for number, scene in enumerate(scenes(pairs, count, generator)):
        if number % 3:
            yield scene.told, QUESTION, scene.description
        else:
            who, does = generator.choice(_WHO), generator.choice(_DOES)
            what = scene.movers[number % 2].name
            yield f"{who} {does}s {what}", f"what does {who} {does}?", what


def _path(mover: Mover, size: np.ndarray, generator: np.random.Generator) -> list[tuple[int, int]]:
    """Places of a mover, all inside of the clip."""
    direction = np.array(DIRECTIONS[mover.direction])
    reach = direction * (STEPS - 1)
    start = generator.integers(np.maximum(0, -reach), size - np.maximum(0, reach))
    places = [start + direction * step for step in range(STEPS)]
    return [(int(row), int(column)) for row, column in places]


def _frames(scene: Scene) -> Iterator[bytes]:
    for places in zip(*scene.paths, strict=True):
        image = Image.new("RGB", (PLACE * scene.size[1], PLACE * scene.size[0]), (255, 255, 255))
        for mover, place in zip(scene.movers, places, strict=True):
            _draw(ImageDraw.Draw(image), mover, place)
        stream = io.BytesIO()
        image.save(stream, format="PNG", compress_level=1)
        yield from (stream.getvalue(),) * 2


def _draw(pen: ImageDraw.ImageDraw, mover: Mover, place: tuple[int, int]) -> None:
    top, left = (PLACE * number + 1 for number in place)
    bottom, right = top + PLACE - 3, left + PLACE - 3
    colour = COLOURS[mover.colour]
    if mover.form == "circle":
        pen.ellipse((left, top, right, bottom), fill=colour)
    elif mover.form == "square":
        pen.rectangle((left, top, right, bottom), fill=colour)
    else:
        pen.polygon([(left, bottom), ((left + right) // 2, top), (right, bottom)], fill=colour)
