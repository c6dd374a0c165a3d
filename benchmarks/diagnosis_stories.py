"""Arms of the two stories' quick forms, trained by the real command and read from their logs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import story_069
import story_mrope
from story_shapes import SHAPE, write_shapes

from colfolio.data.dataset import load_dataset
from colfolio.models import Shape, base_from_shape, train_tokenizer
from colfolio.models.generator import Generator

sys.path.append(str(Path(__file__).parents[1] / "tests"))
from faults.ground import COUNTED, Ground
from faults.trials import Outcome, Trial, outcome_of

_SEED = 0
_FEW, _MANY = 3, 64  # rows
_RATE_069 = 2e-3


@dataclass(frozen=True, slots=True)
class Story:
    """An arm of a story: what a diagnosis should say of it, and how its run is made."""

    cause: str
    told: str
    prepare: Callable[[Path], dict[str, Any]]
    broken: Callable[[], AbstractContextManager[Any]] = nullcontext


def run_story(name: str, folder: Path) -> Outcome:
    """Train an arm as a user would, unless its folder is whole, and diagnose it."""
    story = STORIES[name]
    trial = Trial(name, story.cause, story.told)
    ground = Ground(folder, COUNTED)

    def train(out: Path) -> None:
        with story.broken():
            ground.train(out, story.prepare(folder))

    return outcome_of(trial, _SEED, folder / name, train)


def _of_069(folder: Path, kind: story_069.Kind, rows: int) -> dict[str, Any]:
    data, base = folder / f"069-{kind}-{rows}-data", folder / f"069-{kind}-{rows}-base"
    write_shapes(data, {"train": 512, "validation": 128})
    shape = Shape.model_validate(SHAPE)
    texts = (query.text for query in load_dataset(data, "train").queries)
    base_from_shape(shape, train_tokenizer(texts, shape.tokenizer), _SEED).save_pretrained(base)
    train = {
        "steps": 150,
        "seed": _SEED,
        "batch": {"rows": rows, "ignore": "page"},
        "memory": {"chunk_tokens": 4096},
        "loss": {"kind": kind},
        "optimiser": {"lr": _RATE_069, "betas": [0.9, 0.98], "warmup_steps": 15},
        "threads": 1,
    }
    return {"model": str(base), "dataset": str(data), "train": train}


def _of_mrope(folder: Path, name: story_mrope.Name) -> dict[str, Any]:
    own = folder / f"mrope-{name}-start"
    size = story_mrope.Size(text_steps=200, clips=4032, steps=350)
    start = story_mrope.Start(own, size, 1)
    start.model(_SEED).save_pretrained(own / "base")
    arm = story_mrope.Arm(name, story_mrope.QUICK_RATE)
    train = story_mrope.settings_of(arm, _SEED, start).model_dump(mode="json")
    return {
        "model": str(own / "base"),
        "dataset": str(own / "clips"),
        "train": train,
        "validation": {"every": 100},
    }


def _flattened() -> Any:
    """Clips get the positions of text, by the scheme of the collator, as in the story."""
    load = Generator.from_pretrained

    def loading(*arguments: Any, **options: Any) -> Generator:
        model = load(*arguments, **options)
        model.collator.scheme = story_mrope.Flattened()
        return model

    return patch.object(Generator, "from_pretrained", loading)


STORIES: dict[str, Story] = {
    "069 pairwise 3": Story(
        "collapsed", "pairwise softplus, 3 rows", partial(_of_069, kind="pairwise", rows=_FEW)
    ),
    "069 pairwise 64": Story(
        "collapsed", "pairwise softplus, 64 rows", partial(_of_069, kind="pairwise", rows=_MANY)
    ),
    "069 info_nce 64": Story(
        "healthy", "InfoNCE, 64 rows", partial(_of_069, kind="info_nce", rows=_MANY)
    ),
    "mrope full": Story("healthy", "all trains", partial(_of_mrope, name="full")),
    "mrope frozen": Story(
        "healthy", "the decoder stays as it is", partial(_of_mrope, name="frozen")
    ),
    "mrope flattened": Story(
        "positions_flattened",
        "clips get the positions of text",
        partial(_of_mrope, name="flattened"),
        _flattened,
    ),
}
