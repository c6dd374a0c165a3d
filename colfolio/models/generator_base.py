"""A generator to train from: published weights, a shape alone, or a decoder with a vision tower."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor

from colfolio.data.chat import ChatTemplates
from colfolio.data.patches import PixelBudget
from colfolio.errors import CheckpointError
from colfolio.models.chat_contract import (
    ChatContract,
    chat_templates_of,
    check_chat_contract,
    first_contract,
)
from colfolio.models.checkpoint import empty_backbone
from colfolio.models.contract import Source
from colfolio.models.drawing import draw_normal, draw_weights
from colfolio.models.families import family_of, position_scheme_of
from colfolio.models.generator import Generator
from colfolio.models.generator_files import HEAD, assemble_generator, is_tied, read_generator
from colfolio.models.grafting import grafted_backbone
from colfolio.models.hub import Location, locate
from colfolio.models.shape import SPECIAL_TOKENS, Shape, config_of_shape
from colfolio.models.weights import read_weights

_STD = 0.02  # of `transformers`, where a configuration says nothing


def generator_from_shape(
    shape: Shape, tokenizer: Tokenizer, seed: int, templates: ChatTemplates | None = None
) -> Generator:
    """A generator with random weights of a shape; equal seeds give equal weights, on any machine.

    Args:
        shape: its `dim`, `views` and `templates` are of retrievers, and not looked at.
        templates: None takes those of the family.

    Raises:
        CheckpointError: the shape's keywords do not fit its family.
    """
    origin = f"shape of family {shape.family}"
    family = family_of(shape.family, origin)
    config = config_of_shape(shape, tokenizer)
    dtype = getattr(torch, shape.dtype)
    weights = draw_weights(empty_backbone(config, origin), seed, dtype)
    if not is_tied(config):
        text = config.get_text_config()
        std = float(getattr(text, "initializer_range", None) or _STD)
        weights[HEAD] = draw_normal((text.vocab_size, text.hidden_size), std, seed, HEAD, dtype)
    said = shape.pixel_budget.model_dump(exclude_unset=True)
    contract = ChatContract(
        templates=templates or chat_templates_of(config, origin),
        pixel_budget=PixelBudget.model_validate(family.pixel_budget.model_dump() | said),
        position_scheme=position_scheme_of(config, origin),
    )
    check_chat_contract(contract, config, origin)
    return Generator(*assemble_generator(config, weights, origin), tokenizer, contract)


def generator_from_weights(path_or_id: str | Path, revision: str | None = None) -> Generator:
    """A generator of published weights with their head; nothing is drawn.

    Images enter as the folder's processor says, so that what it was trained on stays what it sees.

    Raises:
        CheckpointError: the weights are not exactly those of the towers and the head, or they are
            those of a retriever.
    """
    location = locate(path_or_id, revision)
    generator = Generator(*read_generator(location))
    source = generator.contract.source or _source(location)
    generator.contract = generator.contract.model_copy(update={"source": source})
    return generator


def generator_from_graft(
    decoder: str | Path,
    vision: str | Path,
    seed: int,
    scheme: str | None = None,
    templates: ChatTemplates | None = None,
    revision: str | None = None,
    vision_revision: str | None = None,
) -> Generator:
    """A language model with M-RoPE and the vision tower of a Qwen2-VL; its head is its own.

    What had to be drawn stands in the contract, under `assumed`.

    Args:
        decoder, vision: hub ids or folders, see `grafted_backbone`.
        scheme: of positions; None takes that of a decoder grafted before, or else `qwen2_vl`.
        templates: None takes those of Qwen2-VL.
        revision, vision_revision: of the decoder's and the tower's hub ids.

    Raises:
        CheckpointError: the weights are not exactly those of the towers and the head, or the towers
            do not fit together.
    """
    sources = locate(decoder, revision), locate(vision, vision_revision)
    text, tower = (location.folder for location in sources)
    origin = f"{text} with the vision tower of {tower}"
    found = grafted_backbone(text, tower, SPECIAL_TOKENS, scheme, seed)
    weights, drawn = dict(found.weights), list(found.drawn)
    if not is_tied(found.config):
        rows = found.config.get_text_config().vocab_size
        weights[HEAD], more = _head(text, rows, seed)
        weights[HEAD] = weights[HEAD].to(next(iter(found.weights.values())).dtype)
        drawn += more
    contract = first_contract(tower, found.config, templates)
    updated = {"source": _source(*sources), "assumed": (*drawn, *contract.assumed)}
    contract = contract.model_copy(update=updated)
    check_chat_contract(contract, found.config, origin)
    parts = assemble_generator(found.config, weights, origin)
    return Generator(*parts, found.tokenizer, contract)


def _source(*locations: Location) -> Source:
    """Hub ids and their commits; of a folder the name alone, as its path is of this machine."""
    names = [each.hub_id or each.folder.resolve().name for each in locations]
    commits = [each.commit or "no commit" for each in locations]
    has_commit = any(each.commit for each in locations)
    return Source(name=" + ".join(names), revision=" + ".join(commits) if has_commit else None)


def _head(folder: Path, rows: int, seed: int) -> tuple[Tensor, list[str]]:
    """A decoder's head, with rows drawn for tokens that were added to its embedding; says which."""
    head = read_weights(folder).get(HEAD)
    if head is None:
        raise CheckpointError(
            f"{folder}: holds no {HEAD}, and its configuration does not say that the head is the "
            "embedding (tie_word_embeddings); give the folder of a language model"
        )
    missing = rows - len(head)
    if missing <= 0:
        return head, []
    std = float(head.float().std())
    more = draw_normal((missing, head.shape[1]), std, seed, HEAD, head.dtype)
    return torch.cat([head, more]), [
        f"{HEAD} had no rows for {missing} special tokens; they are drawn with seed {seed}"
    ]
