"""`colfolio init`: a base to train from, out of published weights, a graft, or a shape alone.

Of a retriever, whose projection is drawn; or of a generator, whose head comes with its weights.
"""

from __future__ import annotations

from pathlib import Path

from colfolio.commands.console import console
from colfolio.config import load_settings
from colfolio.data.conversations import load_conversations
from colfolio.data.dataset import load_dataset
from colfolio.errors import CheckpointError, RecipeError
from colfolio.models import (
    Generator,
    Retriever,
    Shape,
    base_from_graft,
    base_from_shape,
    base_from_weights,
    generator_from_graft,
    generator_from_shape,
    train_tokenizer,
)
from colfolio.models.generator_base import generator_from_weights


def init_command(
    base: str,
    out: Path,
    *,
    dim: int | None = None,
    seed: int = 0,
    dataset: str | None = None,
    revision: str | None = None,
    vision: str | None = None,
    vision_revision: str | None = None,
    scheme: str | None = None,
    generator: bool = False,
) -> None:
    """Make a base and save it.

    Args:
        base: a hub id, a folder with weights, or a YAML file with a shape.
        dim: dimensions of each vector; None takes the shape's, or 128.
        seed: of everything drawn at random.
        dataset: whose training split teaches the tokenizer of a shape: its queries, or of a
            generator its questions and answers.
        revision, vision_revision: of the hub ids `base` and `vision`.
        vision: hub id or folder of a Qwen2-VL, whose vision tower goes before the text decoder that
            `base` then is.
        scheme: of positions that are grafted onto that decoder.
        generator: the base is for the objective `generation`, with a language-model head.

    Raises:
        ColfolioError: a shape came without a dataset, options do not go together, the base cannot
            be read, or the folder is not free.
    """
    wishes = {"dataset": dataset, "revision": revision, "vision": vision}
    _check_options(base, out, vision_revision=vision_revision, scheme=scheme, **wishes)
    if generator:
        _check_generator(base, dim)
    size, revisions = 128 if dim is None else dim, (revision, vision_revision)
    if _is_shape(base):
        model = _from_shape(Path(base), dim, seed, dataset, is_generator=generator)
    elif vision is not None and generator:
        model = generator_from_graft(base, vision, seed, scheme, None, *revisions)
    elif vision is not None:
        model = base_from_graft(base, vision, size, seed, scheme, *revisions)
    elif generator:
        model = generator_from_weights(base, revision)
    else:
        model = base_from_weights(base, size, seed, revision)
    _save(model, out)


def _is_shape(base: str) -> bool:
    return base.endswith((".yaml", ".yml"))


def _check_options(base: str, out: Path, **wishes: str | None) -> None:
    """Refuse a folder that is not free, and options that nothing would be done with."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is not free; a base is made once, so give a new folder")
    given = {f"--{name.replace('_', '-')}" for name, value in wishes.items() if value is not None}
    is_shape, has_tower = _is_shape(base), "--vision" in given and not _is_shape(base)
    rules = (
        ("--scheme", has_tower, "goes onto a text decoder, whose tower is given with --vision"),
        (
            "--vision",
            not is_shape,
            "is of a decoder; a shape has a vision tower of its own",
        ),
        ("--vision-revision", has_tower, "is of the hub id that --vision names, and there is none"),
        ("--revision", not is_shape, "is of a hub id, and a shape is a file"),
        ("--dataset", is_shape, "teaches the tokenizer of a shape, and weights come with theirs"),
    )
    for name, is_honoured, reason in rules:
        if name in given and not is_honoured:
            raise RecipeError(f"{base}: {name} {reason}; leave {name} out")


def _check_generator(base: str, dim: int | None) -> None:
    if dim is not None:
        raise RecipeError(
            f"{base}: --dim is of vectors, and a generator makes none; leave --dim out, or "
            "--generator"
        )


def _from_shape(
    path: Path, dim: int | None, seed: int, dataset: str | None, *, is_generator: bool
) -> Retriever | Generator:
    if dataset is None:
        raise RecipeError(
            f"{path}: a base from a shape learns its vocabulary from a dataset; add --dataset"
        )
    shape = load_settings(path, Shape, [] if dim is None else [f"dim={dim}"])
    if is_generator:
        told = load_conversations(dataset, "train")
        tokenizer = train_tokenizer([*told.questions, *told.answers], shape.tokenizer)
        return generator_from_shape(shape, tokenizer, seed)
    queries = load_dataset(dataset, "train").queries
    tokenizer = train_tokenizer((query.text for query in queries), shape.tokenizer)
    return base_from_shape(shape, tokenizer, seed)


def _save(model: Retriever | Generator, out: Path) -> None:
    for sentence in model.contract.assumed:
        console().print(sentence, markup=False)
    model.save_pretrained(out)
    count = sum(parameter.numel() for parameter in model.parameters())
    if isinstance(model, Generator):
        made = f"a generator, which chooses among {model.vocabulary:,} tokens"
    else:
        made = f"vectors of {model.dim} dimensions, weights {model.contract.base_hash[:12]}"
    console().print(f"{out}: {count / 1e6:,.2f} M parameters, {made}", markup=False)
