"""`colfolio init`: a base to train from, out of published weights, a graft, or a shape alone."""

from __future__ import annotations

from pathlib import Path

from colfolio.commands.console import console
from colfolio.config import load_settings
from colfolio.data.dataset import load_dataset
from colfolio.errors import CheckpointError, RecipeError
from colfolio.models import (
    Retriever,
    Shape,
    base_from_graft,
    base_from_shape,
    base_from_weights,
    train_tokenizer,
)


def init_command(
    base: str,
    out: Path,
    *,
    dim: int | None = None,
    seed: int = 0,
    dataset: str | None = None,
    revision: str | None = None,
    vision: str | None = None,
    scheme: str | None = None,
) -> None:
    """Make a base and save it.

    Args:
        base: a hub id, a folder with weights, or a YAML file with a shape.
        out: the folder of the new base.
        dim: dimensions of each vector; None takes the shape's, or 128.
        seed: of everything drawn at random.
        dataset: whose training queries teach the tokenizer of a shape.
        revision: of a hub id.
        vision: hub id or folder of a Qwen2-VL, whose vision tower goes before the text decoder that
            `base` then is.
        scheme: of positions that are grafted onto that decoder.

    Raises:
        ColfolioError: a shape came without a dataset, options do not go together, the base cannot
            be read, or the folder is not free.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is not free; a base is made once, so give a new folder")
    is_shape = base.endswith((".yaml", ".yml"))
    if scheme is not None and (vision is None or is_shape):
        raise RecipeError("--scheme is grafted onto a text decoder: give its tower with --vision")
    if is_shape and vision is not None:
        raise RecipeError(f"{base}: a shape has a vision tower of its own; leave out --vision")
    if is_shape:
        retriever = _from_shape(Path(base), dim, seed, dataset)
    elif vision is not None:
        size = 128 if dim is None else dim
        retriever = base_from_graft(base, vision, size, seed, scheme, revision)
    else:
        retriever = base_from_weights(base, 128 if dim is None else dim, seed, revision)
    for sentence in retriever.contract.assumed:
        console().print(sentence, markup=False)
    retriever.save_pretrained(out)
    count = sum(parameter.numel() for parameter in retriever.parameters())
    console().print(
        f"{out}: {count / 1e6:,.2f} M parameters, vectors of {retriever.dim} dimensions, "
        f"weights {retriever.contract.base_hash[:12]}",
        markup=False,
    )


def _from_shape(path: Path, dim: int | None, seed: int, dataset: str | None) -> Retriever:
    if dataset is None:
        raise RecipeError(
            f"{path}: a base from a shape learns its vocabulary from a dataset; add --dataset"
        )
    shape = load_settings(path, Shape, [] if dim is None else [f"dim={dim}"])
    queries = load_dataset(dataset, "train").queries
    tokenizer = train_tokenizer((query.text for query in queries), shape.tokenizer)
    return base_from_shape(shape, tokenizer, seed)
