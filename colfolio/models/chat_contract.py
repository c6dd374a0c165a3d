"""What a generator's checkpoint promises, in a JSON file beside its weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field
from torch import Tensor
from transformers import PretrainedConfig

from colfolio.config import Settings, validated
from colfolio.data.chat import ChatTemplates
from colfolio.data.patches import PixelBudget
from colfolio.data.prompts import Templates
from colfolio.errors import CheckpointError, RecipeError
from colfolio.models.contract import Contract, Source, check_contract, hash_weights, versions
from colfolio.models.families import family_of, position_scheme_of
from colfolio.models.files import parse_json, write_json
from colfolio.models.formats.images import pixel_budget_of
from colfolio.models.seal import check_files, check_hash, check_seal, file_hashes, seal_of
from colfolio.mrope import Qwen3VL

CHAT_CONTRACT_FILE = "colfolio_chat.json"
_FORMAT = 1
# Qwen3-VL was trained without a system message
_QWEN3_VISUAL = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>"


class ChatContract(Settings):
    """How conversations enter a generator, and what it came from.

    Args:
        format: version of this file.
        templates: the strings around what is seen, question and answer.
        pixel_budget, position_scheme, frame_rate: as in `Contract`.
        source, loaded_from: as in `Contract`.
        versions: of packages, when the file was written.
        recipe, data, metrics: as in `Contract`.
        assumed: what the files of another library did not say and was filled in, or had to be
            drawn, in sentences.
        weights_hash, files, seal: as in `Contract`; empty in memory.
    """

    format: int = _FORMAT
    templates: ChatTemplates
    pixel_budget: PixelBudget
    position_scheme: str | dict[str, Any]
    frame_rate: float = Field(default=2.0, gt=0)
    source: Source | None = None
    loaded_from: Source | None = None
    versions: dict[str, str] = Field(default={})
    recipe: dict[str, Any] | None = None
    data: dict[str, str] = Field(default={})
    metrics: dict[str, float] = Field(default={})
    assumed: tuple[str, ...] = ()
    weights_hash: str = ""
    files: dict[str, str] = Field(default={})
    seal: dict[str, str] = Field(default={})

    def deciding(self) -> str:
        """The fields that decide an answer, as JSON."""
        told = {"templates", "pixel_budget", "position_scheme", "frame_rate"}
        return self.model_dump_json(include=told)


def chat_templates_of(config: PretrainedConfig, origin: str) -> ChatTemplates:
    """The strings that a family's models were trained with."""
    scheme = family_of(config.model_type, origin).scheme(config)
    if not isinstance(scheme, Qwen3VL):
        return ChatTemplates()
    stamp = family_of("qwen3_vl", origin).templates.time_stamp
    return ChatTemplates(visual=_QWEN3_VISUAL, time_stamp=stamp)


def first_contract(
    folder: Path, config: PretrainedConfig, templates: ChatTemplates | None = None
) -> ChatContract:
    """The contract of published weights: images as their folder says, strings of the family."""
    budget, assumed = pixel_budget_of(folder, config)
    return ChatContract(
        templates=templates or chat_templates_of(config, str(folder)),
        pixel_budget=budget,
        position_scheme=position_scheme_of(config, str(folder)),
        assumed=tuple(assumed),
    )


def check_chat_contract(contract: ChatContract, config: PretrainedConfig, origin: str) -> None:
    """Refuse a contract that its backbone cannot keep, as `check_contract` does.

    Raises:
        CheckpointError: names what does not fit.
    """
    # what it checks is the same of a retriever that sees the same pixels
    same = Contract(
        dim=1,
        templates=Templates(),
        pixel_budget=contract.pixel_budget,
        position_scheme=contract.position_scheme,
        base_hash="",
    )
    check_contract(same, config, origin)


def save_chat_contract(contract: ChatContract, folder: Path, weights: Mapping[str, Tensor]) -> None:
    """Write the contract, sealed, as the last file of a folder.

    Args:
        weights: of the folder, by the names of `Generator.weights`.
    """
    updated = {
        "versions": versions(),
        "weights_hash": hash_weights(weights),
        "files": file_hashes(folder),
        "seal": {},
    }
    # validated anew, so that every field of every part counts as set
    whole = ChatContract.model_validate(contract.model_dump() | updated)
    sealed = whole.model_copy(update={"seal": seal_of(whole)})
    write_json(sealed.model_dump(mode="json"), folder / CHAT_CONTRACT_FILE)


def load_chat_contract(folder: Path) -> ChatContract:
    """Read the contract of a checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged or of another format, or a file beside it is
            not the one that was saved.
    """
    path = folder / CHAT_CONTRACT_FILE
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        _check_format(values, path)
        contract = validated(values, ChatContract, str(path))
    except CheckpointError:
        raise
    except (OSError, ValueError, RecipeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    check_files(folder, contract.files, CHAT_CONTRACT_FILE)
    return contract


def check_saved_chat(
    contract: ChatContract, weights: Mapping[str, Tensor], origin: str
) -> ChatContract:
    """The contract of a folder once it and the weights are known to be what was saved.

    Args:
        weights: all of the folder, by the names of `Generator.weights`.

    Returns:
        The contract without hashes and seal, which hold for the folder alone.

    Raises:
        CheckpointError: a field or the weights were changed since.
    """
    has_hash = bool(contract.weights_hash)
    check_seal(contract, contract.seal, CHAT_CONTRACT_FILE, origin, has_hash=has_hash)
    if has_hash:
        check_hash(contract.weights_hash, hash_weights(weights), "weights_hash", origin)
    return contract.model_copy(update={"weights_hash": "", "files": {}, "seal": {}})


def _check_format(values: Any, path: Path) -> None:
    """Before all else: another format has keys that are not known here."""
    number = values.get("format", _FORMAT) if isinstance(values, dict) else _FORMAT
    if number != _FORMAT:
        raise CheckpointError(f"{path}: format {number!r}, this version reads {_FORMAT}")
