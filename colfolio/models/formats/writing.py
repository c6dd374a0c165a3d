"""A checkpoint written as the files of one library, with our contract and a model card beside."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from colfolio.models.contract import PROJECTION, load_contract, projection_of, save_contract
from colfolio.models.families import family_of
from colfolio.models.files import (
    CONFIG_FILE,
    CONTRACT_MARK,
    save_tokenizer,
    whole_folder,
    write_json,
)
from colfolio.models.formats.card import CARD_FILE, adapter_story, model_card, story_of
from colfolio.models.formats.chat import CHAT_FILE, chat_template
from colfolio.models.formats.classes import (
    RETRIEVAL_PROCESSOR,
    RETRIEVAL_TYPE,
    check_engine,
    check_retrieval,
    classes_of,
    engine_name,
)
from colfolio.models.formats.images import write_processor_files
from colfolio.models.formats.layouts import ENGINE, RETRIEVAL, to_their_names
from colfolio.models.formats.notes import notes_of, retrieval_prefix
from colfolio.models.formats.reading import ADAPTER_FILE, Found
from colfolio.models.formats.sentence_transformers import write_modules
from colfolio.models.formats.usage import TOKENIZER_CONFIG
from colfolio.models.formats.whole_texts import check_strings, plain_tokenizer
from colfolio.models.weights import WEIGHTS_FILE, write_weights

TARGETS = ("colfolio", "colpali-engine", "transformers", "sentence-transformers")
ADAPTER_TARGETS = ("colfolio", "colpali-engine")


def write(found: Found, folder: Path, target: str) -> tuple[str, ...]:
    """Write a checkpoint and its model card for a library; aside first, then renamed.

    Args:
        found: of any format; which one is not looked at.
        target: one of `TARGETS`.

    Returns:
        Sentences on what a user of that library has to know; the model card has them too.

    Raises:
        CheckpointError: the library has no class for this model or cannot write its queries, the
            folder is not free, or the weights cannot be written.
    """
    files = {
        "colfolio": _write_own,
        "colpali-engine": _write_engine,
        "transformers": _write_retrieval,
        "sentence-transformers": _write_sentence,
    }
    if target != "colfolio":
        check_strings(found.contract, found.tokenizer, target)
    notes = notes_of(found, target)
    with whole_folder(folder, (CONFIG_FILE, ADAPTER_FILE)) as aside:
        files[target](found, aside)
        save_contract(found.contract, aside, found.weights)
        story = story_of(found.contract, load_contract(aside).weights_hash)
        _write_card(found, aside, target, notes, story)
    return notes


def write_checkpoint(found: Found, folder: Path) -> None:
    """Write a checkpoint of Colfolio without a card; aside first, then renamed.

    Raises:
        CheckpointError: as `write`.
    """
    with whole_folder(folder, (CONFIG_FILE, ADAPTER_FILE)) as aside:
        _write_own(found, aside)
        save_contract(found.contract, aside, found.weights)


def write_beside_adapter(found: Found, folder: Path, target: str, base: str) -> tuple[str, ...]:
    """Write what is read beside an adapter: a model card; of a library its processor and tokenizer.

    Args:
        found: with the weights of the base.
        target: one of `ADAPTER_TARGETS`.
        base: hub id or folder that the adapter names.

    Returns:
        Sentences on what a user of that library has to know.

    Raises:
        CheckpointError: the library has no class for this model, or cannot write its queries.
    """
    notes = (f"these files hold an adapter alone; its base is {base}", *notes_of(found, target))
    if target != "colfolio":
        check_strings(found.contract, found.tokenizer, target)
        classes = check_engine(found.config.model_type, found.contract.dim)
        _write_processor(found, folder, classes.engine_processor)
    _write_card(found, folder, target, notes, adapter_story(found.contract))
    return notes


def _write_own(found: Found, folder: Path) -> None:
    write_weights(_plain(found.weights), folder / WEIGHTS_FILE)
    values = _config(found, engine_name(found.config.model_type))
    write_json(values | {CONTRACT_MARK: True}, folder / CONFIG_FILE)
    save_tokenizer(found.tokenizer, folder)


def _write_engine(found: Found, folder: Path) -> None:
    classes = check_engine(found.config.model_type, found.contract.dim)
    write_weights(to_their_names(_plain(found.weights), ENGINE), folder / WEIGHTS_FILE)
    write_json(_config(found, classes.engine) | _dtype(found), folder / CONFIG_FILE)
    _write_processor(found, folder, classes.engine_processor)


def _write_retrieval(found: Found, folder: Path) -> None:
    retrieval = check_retrieval(found.config.model_type)
    write_weights(to_their_names(_plain(found.weights), RETRIEVAL), folder / WEIGHTS_FILE)
    values: dict[str, Any] = {
        "architectures": [retrieval],
        "model_type": RETRIEVAL_TYPE,
        "embedding_dim": found.contract.dim,
        "vlm_config": _config(found, _backbone_name(found)) | _dtype(found),
    }
    write_json(values | _dtype(found), folder / CONFIG_FILE)
    strings = {"visual_prompt_prefix": found.contract.templates.document}
    prefix = retrieval_prefix(found.contract.templates)
    if prefix is not None:
        strings["query_prefix"] = prefix
    _write_processor(found, folder, RETRIEVAL_PROCESSOR, strings)


def _write_sentence(found: Found, folder: Path) -> None:
    classes = classes_of(found.config.model_type)
    weights = _plain(found.weights)
    projection = projection_of(weights)
    backbone = {name: tensor for name, tensor in weights.items() if name not in projection}
    write_weights(to_their_names(backbone, ENGINE), folder / WEIGHTS_FILE)
    named = {name.removeprefix(PROJECTION): tensor for name, tensor in projection.items()}
    write_modules(named, folder)
    write_json(_config(found, _backbone_name(found)) | _dtype(found), folder / CONFIG_FILE)
    _write_processor(found, folder, classes.processor)
    template = chat_template(found.contract.templates)
    (folder / CHAT_FILE).write_text(template, encoding="utf-8")


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _config(found: Found, architecture: str) -> dict[str, Any]:
    """The backbone's configuration as JSON; how attention runs is ours, and no promise."""
    values = found.config.to_dict() | {"architectures": [architecture]}
    values.pop("_attn_implementation", None)
    return values


def _dtype(found: Found) -> dict[str, str]:
    """Of the backbone's weights, in which other libraries load by what the file says."""
    first = next(
        tensor for name, tensor in found.weights.items() if not name.startswith(PROJECTION)
    )
    return {"dtype": str(first.dtype).removeprefix("torch.")}


def _backbone_name(found: Found) -> str:
    family: Any = family_of(found.config.model_type, "export")
    return family.backbone.__name__


def _write_processor(
    found: Found, folder: Path, processor: str, strings: dict[str, str] | None = None
) -> None:
    """What `AutoProcessor` reads; the tokenizer is taken as its file describes it."""
    save_tokenizer(plain_tokenizer(found.tokenizer), folder)
    budget, kind = found.contract.pixel_budget, found.config.model_type
    write_processor_files(budget, kind, folder, processor, **(strings or {}))
    values = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "processor_class": processor,
        "model_input_names": ["input_ids", "attention_mask"],
        "pad_token": found.contract.templates.query_suffix,
        "clean_up_tokenization_spaces": False,
    }
    write_json(values, folder / TOKENIZER_CONFIG)


def _write_card(
    found: Found, folder: Path, target: str, notes: tuple[str, ...], story: str
) -> None:
    card = model_card(found, target, notes, story)
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
