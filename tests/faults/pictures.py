"""Small images of coloured shapes, named in words, and every way in which such data is wrong.

A way is a function that changes splits before they are written, as a mistake while preparing data
would have.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from colfolio.data.dataset import CorpusRow, Query, write_split

_FORMS = ("circle", "square", "triangle")
_SIDE, _STEP = 24, 28  # pixels
_WHITE = (255, 255, 255)
_COPIES = 32  # of each image, where images occur again and again
_TINY = 12  # rows that can be learnt by heart
_SCORED = 8  # documents of a query that the teacher scored


@dataclass(frozen=True, slots=True)
class Look:
    """How images are drawn, and how many there are.

    Args:
        colours: of the shapes, by name.
        is_upright: shapes stand below each other, not side by side.
        train, validation: images of each split, one query each.
    """

    colours: Mapping[str, tuple[int, int, int]]
    is_upright: bool = False
    train: int = 512
    validation: int = 128


@dataclass(slots=True)
class Split:
    """Query i has a text, and the row of the image that is labelled as its answer."""

    shapes: list[tuple[str, ...]]
    images: list[bytes]
    texts: list[str]
    answers: list[int]
    refused: list[list[int]]
    teacher: dict[int, dict[int, float]] | None = None


Splits = dict[str, Split]
Way = Callable[[Splits, np.random.Generator], None]


def write_pictures(folder: Path, look: Look, seed: int, way: str) -> None:
    """Write both splits, no image in two, as one of `WAYS` leaves them."""
    generator = np.random.default_rng((seed, 7))
    splits = _drawn(look, generator)
    WAYS[way](splits, generator)
    for name, split in splits.items():
        ids = [f"{name}-{number}" for number in range(len(split.images))]
        asked = [f"{name}-q{number}" for number in range(len(split.texts))]
        teacher = split.teacher and {
            asked[query]: {ids[row]: score for row, score in scores.items()}
            for query, scores in split.teacher.items()
        }
        write_split(
            folder,
            name,
            [CorpusRow(id_, png, id_) for id_, png in zip(ids, split.images, strict=True)],
            [Query(id_, text) for id_, text in zip(asked, split.texts, strict=True)],
            {
                id_: {ids[row]: 0 for row in refused} | {ids[answer]: 1}
                for id_, answer, refused in zip(asked, split.answers, split.refused, strict=True)
            },
            teacher,
        )


def _drawn(look: Look, generator: np.random.Generator) -> Splits:
    singles = [f"{colour} {form}" for colour in look.colours for form in _FORMS]
    triples = list(product(singles, repeat=3))
    order = generator.permutation(len(triples)).tolist()
    splits: Splits = {}
    for name, size in (("train", look.train), ("validation", look.validation)):
        shapes = [triples[order.pop()] for _ in range(size)]
        images = [_png(_image(names, look)) for names in shapes]
        texts = [", ".join(names) for names in shapes]
        splits[name] = Split(shapes, images, texts, list(range(size)), [[] for _ in shapes])
    return splits


def _image(names: tuple[str, ...], look: Look) -> Image.Image:
    long, short = 3 * _STEP, _STEP
    image = Image.new("RGB", (short, long) if look.is_upright else (long, short), _WHITE)
    pen = ImageDraw.Draw(image)
    for number, name in enumerate(names):
        colour, form = name.split()
        along, across = 2 + _STEP * number, 2
        left, top = (across, along) if look.is_upright else (along, across)
        box = (left, top, left + _SIDE, top + _SIDE)
        if form == "circle":
            pen.ellipse(box, fill=look.colours[colour])
        elif form == "square":
            pen.rectangle(box, fill=look.colours[colour])
        else:
            corners = [(left, top + _SIDE), (left + _SIDE // 2, top), (left + _SIDE, top + _SIDE)]
            pen.polygon(corners, fill=look.colours[colour])
    return image


def _png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="PNG", compress_level=1)
    return stream.getvalue()


def _as_they_are(splits: Splits, generator: np.random.Generator) -> None:
    pass


def _blank(splits: Splits, generator: np.random.Generator) -> None:
    """Pages that did not render: two of five are white, each in a size of its own at most."""
    train = splits["train"]
    for row in generator.permutation(len(train.images))[: 2 * len(train.images) // 5].tolist():
        size = Image.open(io.BytesIO(train.images[row])).size
        train.images[row] = _png(Image.new("RGB", size, _WHITE))


def _copied(splits: Splits, generator: np.random.Generator) -> None:
    """A page that is in many documents: each image stands under many ids, asked for otherwise."""
    train = splits["train"]
    for row in range(len(train.images)):
        first = row // _COPIES * _COPIES
        train.images[row] = train.images[first]
        train.texts[row] = f"{train.texts[first]}, number {row - first}"


def _shifted(splits: Splits, generator: np.random.Generator) -> None:
    """The list of answers lost its first line, so that each query has its neighbour's."""
    train = splits["train"]
    train.answers = [*train.answers[1:], train.answers[0]]


def _shuffled(splits: Splits, generator: np.random.Generator) -> None:
    """Queries and answers were sorted by different columns before they were joined."""
    train = splits["train"]
    train.answers = generator.permutation(len(train.answers)).tolist()


def _leaked(splits: Splits, generator: np.random.Generator) -> None:
    """Pages were split at random after they had been copied: half of validation is in training."""
    train, validation = splits["train"], splits["validation"]
    for row in range(0, len(validation.images), 2):
        validation.images[row] = train.images[row]
        validation.texts[row] = train.texts[row]


def _tiny(splits: Splits, generator: np.random.Generator) -> None:
    """Too few examples for so many steps."""
    train = splits["train"]
    for name in ("shapes", "images", "texts", "answers", "refused"):
        setattr(train, name, getattr(train, name)[:_TINY])


def _numbered(splits: Splits, generator: np.random.Generator) -> None:
    """Queries that nothing on an image answers: each asks for a number of its own."""
    numbers = iter(generator.permutation(10_000).tolist())
    for split in splits.values():
        split.texts = [f"document {next(numbers)}" for _ in split.texts]


def _in_greek(splits: Splits, generator: np.random.Generator) -> None:
    """Queries in a script of which the tokenizer has no letter."""
    letters = "αβγδεζηθικλμνξοπρστυφχψωάέή"
    script = {chr(ord("a") + number): letters[number] for number in range(26)} | {",": ""}
    for split in splits.values():
        split.texts = [text.translate(str.maketrans(script)) for text in split.texts]


def _with_negatives(splits: Splits, generator: np.random.Generator) -> None:
    """Each query refuses an image that shares the most shapes with its answer."""
    for split in splits.values():
        split.refused = [[_nearest(split, row, generator)[1]] for row in split.answers]


def _with_teacher(splits: Splits, generator: np.random.Generator) -> None:
    """A teacher scored some images of each query by the shapes that they share with its answer."""
    for split in splits.values():
        split.teacher = {
            query: {
                other: 3.0 * _shared(split, row, other)
                for other in _nearest(split, row, generator)[:_SCORED]
            }
            for query, row in enumerate(split.answers)
        }


def _nearest(split: Split, row: int, generator: np.random.Generator) -> list[int]:
    """Rows by how many shapes they share with one, itself first; equal ones in any order."""
    order = generator.permutation(len(split.images)).tolist()
    return sorted(order, key=lambda other: -_shared(split, row, other) - (other == row))


def _shared(split: Split, row: int, other: int) -> int:
    pairs = zip(split.shapes[row], split.shapes[other], strict=True)
    return sum(mine == theirs for mine, theirs in pairs)


WAYS: dict[str, Way] = {
    "plain": _as_they_are,
    "elder": _as_they_are,  # what a base was trained on before
    "far": _as_they_are,  # and one of another field
    "blank": _blank,
    "copied": _copied,
    "shifted": _shifted,
    "shuffled": _shuffled,
    "leaked": _leaked,
    "tiny": _tiny,
    "numbered": _numbered,
    "greek": _in_greek,
    "negatives": _with_negatives,
    "teacher": _with_teacher,
}


def fewer(look: Look, train: int) -> Look:
    """The same look with another number of training images."""
    return replace(look, train=train)
