"""What runs stand on: the sizes of models and data, and bases that many runs share.

What is counted and what thresholds are set by have nothing in common: neither seeds, nor widths,
depths and families of models, nor the dimensions of vectors, nor the images.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import yaml
from conversing import generator_of, write_moving
from faults.pictures import Look, write_pictures
from tokenizers import Regex, Tokenizer, normalizers

from colfolio.commands.train import train_command
from colfolio.data.dataset import load_dataset
from colfolio.models import Retriever, Shape, base_from_shape, train_tokenizer
from colfolio.models.adapters import is_adapter_folder
from colfolio.models.contract import Source, hash_weights, projection_of

_COLOURS = {"red": (200, 30, 30), "blue": (30, 30, 200), "grey": (128, 128, 128)}
_OTHERS = {
    "green": (20, 140, 60),
    "pink": (230, 120, 170),
    "black": (10, 10, 10),
    "brown": (120, 70, 20),
}
_FAR = {
    "white": (235, 235, 235),
    "gold": (230, 190, 40),
    "teal": (0, 128, 128),
    "violet": (130, 60, 200),
}
_ELDER = 1000  # added to the seed of what was trained on before
_BIAS = 30.0
_PROJECTION = 0.02
_FOREIGN = 500  # added to the seed of a base that is not the adapter's


@dataclass(frozen=True, slots=True)
class Size:
    """A model and its data.

    Args:
        shape: of the model, with weights drawn `initializer_range` wide.
        steps: in which the recipe of `TRAIN` learns it.
        rate: at which it does.
    """

    name: str
    shape: Mapping[str, Any]
    look: Look
    steps: int = 80
    rate: float = 2e-3


def _shape(
    family: str, width: int, layers: int, depth: int, dim: int, **vision: Any
) -> dict[str, Any]:
    return {
        "family": family,
        "dim": dim,
        "backbone": {
            "tie_word_embeddings": False,
            "text_config": {
                "hidden_size": width,
                "intermediate_size": 2 * width,
                "num_hidden_layers": layers,
                "num_attention_heads": width // 16,
                "num_key_value_heads": width // 32 if width % 32 == 0 else width // 16,
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
                "depth": depth,
                "hidden_size": width,
                "num_heads": 2,
                "initializer_range": 0.05,
                **vision,
            },
        },
        "templates": {
            "num_query_suffix": 2,
            "document": "<|vision_start|><|image_pad|><|vision_end|>",
        },
        "pixel_budget": {"min_pixels": 784, "max_pixels": 50176},
        "tokenizer": {"vocab_size": 300},
    }


COUNTED = Size(
    "counted", _shape("qwen2_vl", 64, 2, 2, 32, embed_dim=64, mlp_ratio=2), Look(_COLOURS)
)
# for thresholds: another family, narrower and deeper; and wider and shallower; other images
TUNED = (
    Size(
        "tuned-2.5",
        _shape(
            "qwen2_5_vl",
            48,
            3,
            2,
            24,
            intermediate_size=96,
            out_hidden_size=48,
            window_size=56,
            fullatt_block_indexes=[1],
            tokens_per_second=2,
        ),
        Look(_OTHERS, is_upright=True, train=640, validation=96),
        rate=1.5e-3,
    ),
    Size(
        "tuned-2",
        _shape("qwen2_vl", 96, 1, 1, 48, embed_dim=96, mlp_ratio=2),
        Look(_OTHERS, train=448, validation=96),
    ),
)

# what learns these data
TRAIN: dict[str, Any] = {
    "batch": {"rows": 64},
    "memory": {"chunk_tokens": 4096},
    "optimiser": {"betas": [0.9, 0.98], "warmup_steps": 8},
    "precision": "fp32",
    "threads": 1,
}


class Ground:
    """Data sets and bases of one size, made in a folder when they are first needed."""

    def __init__(self, folder: Path, size: Size) -> None:
        self.folder, self.size = folder / size.name, size

    def data(self, way: str, seed: int) -> Path:
        """A dataset whose splits are as one of `pictures.WAYS` leaves them, or `moving` clips."""
        return self._made(f"data-{way}-{seed}", lambda folder: self._write(folder, way, seed))

    def base(self, kind: str, seed: int) -> Path:
        """A model to train from, of one of the kinds of `_MAKERS`."""
        return self._made(f"base-{kind}-{seed}", lambda folder: _MAKERS[kind](self, folder, seed))

    def train(self, out: Path, recipe: Mapping[str, Any], ranks: int = 1) -> None:
        """Train as a user does, less the talk and the page at the end."""
        path = out.with_name(f"{out.name}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(dict(recipe) | {"out": str(out)}), encoding="utf-8")
        page = patch("colfolio.commands.run_steps.write_run_report")
        examples = patch("colfolio.commands.run_steps.examples_of")
        with _quietly(), page, examples:
            code = train_command(path, ranks=ranks, unchecked=True)
        assert code == 0, f"{out}: exit code {code}"

    def recipe(
        self, data: Path, base: Path, seed: int, train: Mapping[str, Any], every: int = 50
    ) -> dict[str, Any]:
        """A recipe in which only some settings are not those that learn."""
        own = TRAIN | {"steps": self.size.steps, "seed": seed}
        own["optimiser"] = own["optimiser"] | {"lr": self.size.rate}
        return {
            "model": str(base),
            "dataset": str(data),
            "train": merged(own, train),
            "validation": {"every": every},
            "checkpoint": {"every": 10_000},
        }

    def _write(self, folder: Path, way: str, seed: int) -> None:
        if way == "moving":
            for number, (split, count) in enumerate((("train", 192), ("validation", 24))):
                write_moving(folder, split, count, seed + number)
            return
        look = replace(self.size.look, colours=_FAR) if way == "far" else self.size.look
        own = seed + _ELDER if way in ("elder", "far") else seed
        write_pictures(folder, look, own, way)

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        """A folder that appears when it is whole; several processes may want it."""
        path = self.folder / name
        if not path.exists():
            aside = self.folder / "aside" / f"{name}-{os.getpid()}"
            aside.parent.mkdir(parents=True, exist_ok=True)
            make(aside)
            try:
                aside.rename(path)
            except OSError:  # another process was faster
                shutil.rmtree(aside)
        return path


def merged(values: Mapping[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with others put over them; a loss or an adapter is replaced as a whole."""
    found = dict(values)
    for key, value in others.items():
        is_nested = isinstance(value, Mapping) and isinstance(found.get(key), Mapping)
        found[key] = merged(found[key], value) if is_nested else value
    return found


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _shape_of(ground: Ground) -> Shape:
    return Shape.model_validate(ground.size.shape)


def _tokenizer(ground: Ground, shape: Shape, seed: int) -> Tokenizer:
    queries = load_dataset(ground.data("plain", seed), "train").queries
    return train_tokenizer((query.text for query in queries), shape.tokenizer)


def _drawn(ground: Ground, folder: Path, seed: int) -> None:
    """From random weights."""
    shape = _shape_of(ground)
    base_from_shape(shape, _tokenizer(ground, shape, seed), seed).save_pretrained(folder)


def _biased(ground: Ground, folder: Path, seed: int) -> None:
    """A projection whose bias hides what it adds to it."""
    shape = _shape_of(ground)
    retriever = base_from_shape(shape, _tokenizer(ground, shape, seed), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        retriever.projection.bias.normal_(std=_BIAS, generator=generator)
    retriever.contract = retriever.contract.model_copy(
        update={"base_hash": retriever.weights_hash() or "", "projection_hash": ""}
    )
    retriever.save_pretrained(folder)


def _latin(ground: Ground, folder: Path, seed: int) -> None:
    """A tokenizer that passes over all that is not of its script."""
    shape = _shape_of(ground)
    tokenizer = _tokenizer(ground, shape, seed)
    latin: Any = [tokenizer.normalizer, normalizers.Replace(Regex("[^\\x00-\\x7f]|\\s"), "")]
    tokenizer.normalizer = normalizers.Sequence(latin)  # pyright: ignore[reportAttributeAccessIssue]
    base_from_shape(shape, tokenizer, seed).save_pretrained(folder)


def _trained(ground: Ground, folder: Path, seed: int, way: str = "elder") -> None:
    """Trained on other images, as a base that is published has been."""
    recipe = ground.recipe(ground.data(way, seed), ground.base("drawn", seed), seed, {})
    run = folder.with_name(f"run-{folder.name}")
    ground.train(run, recipe | {"validation": {"split": None}})
    (run / "model").rename(folder)
    shutil.rmtree(run)


def _far(ground: Ground, folder: Path, seed: int) -> None:
    """Trained on images with other colours, named by other words."""
    _trained(ground, folder, seed, "far")


def _published(ground: Ground, folder: Path, seed: int) -> None:
    """Weights from elsewhere with a projection that is fresh, as `colfolio init` makes of them."""
    retriever = Retriever.from_pretrained(ground.base("far", seed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        retriever.projection.weight.normal_(std=_PROJECTION, generator=generator)
    weights = retriever.weights()
    retriever.contract = retriever.contract.model_copy(
        update={
            "recipe": None,
            "data": {},
            "metrics": {},
            "source": Source(name="published/backbone"),
            "base_hash": hash_weights(weights),
            "projection_hash": hash_weights(projection_of(weights)),
        }
    )
    retriever.save_pretrained(folder)


def _adapted(ground: Ground, folder: Path, seed: int) -> None:
    """An adapter that was trained on random weights."""
    train = {"steps": 60, "lora": {"rank": 16, "alpha": 32.0, "dropout": 0.0}}
    data, base = ground.data("elder", seed), ground.base("drawn", seed)
    run = folder.with_name(f"run-{folder.name}")
    ground.train(run, ground.recipe(data, base, seed, train) | {"validation": {"split": None}})
    (run / "model").rename(folder)
    assert is_adapter_folder(folder)
    _name_base(folder, base)
    shutil.rmtree(run)


def _moved(ground: Ground, folder: Path, seed: int) -> None:
    """The same adapter, which names another base now."""
    shutil.copytree(ground.base("adapted", seed), folder)
    _name_base(folder, ground.base("drawn", seed + _FOREIGN))


def _name_base(folder: Path, base: Path) -> None:
    path = folder / "adapter_config.json"
    values = json.loads(path.read_text()) | {"base_model_name_or_path": str(base)}
    path.write_text(json.dumps(values))


def _generator(ground: Ground, folder: Path, seed: int) -> None:
    """A generator from random weights, for clips."""
    generator_of(_shape_of(ground), seed).save_pretrained(folder)


_MAKERS: dict[str, Callable[[Ground, Path, int], None]] = {
    "drawn": _drawn,
    "biased": _biased,
    "latin": _latin,
    "trained": _trained,
    "far": _far,
    "published": _published,
    "adapted": _adapted,
    "moved": _moved,
    "generator": _generator,
}
