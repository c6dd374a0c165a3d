"""What a checkpoint promises, in a JSON file beside its weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from transformers import PretrainedConfig

from colfolio.config import Settings, validated
from colfolio.data.patches import PixelBudget
from colfolio.data.prompts import Templates
from colfolio.errors import CheckpointError, RecipeError
from colfolio.models.families import position_scheme_of
from colfolio.models.files import parse_json
from colfolio.models.seal import check_files, check_hash, check_seal, file_hashes, seal_of

CONTRACT_FILE = "colfolio.json"
PROJECTION = "custom_text_proj."
_FORMAT = 1
_DECIDING = {
    "dim",
    "templates",
    "pixel_budget",
    "position_scheme",
    "views",
    "frame_rate",
    "kept_vectors",
}
_PACKAGES = ("colfolio", "tokenizers", "torch", "transformers")


class Source(Settings):
    """Where weights came from: a hub id with its commit, or the name of a folder."""

    name: str
    revision: str | None = None


class Contract(Settings):
    """How queries and pages enter a model and what comes out, and what the model came from.

    The fields up to `kept_vectors` decide vectors; those behind tell where the weights are from.

    Args:
        format: version of this file.
        dim: dimensions of each vector.
        templates: the strings around a query and an image.
        pixel_budget: how images are resized and cut.
        position_scheme: how position ids are made, a name of `colfolio.mrope`, or with settings.
        views: how a page is cut into images for this model: `page`, `tiles` or `strips`.
        frame_rate: frames of a video that are read, a second.
        kept_vectors: which vectors of a document are kept.
        base_hash: SHA-256 of the base's weights (backbone and projection) as it was first saved.
        projection_hash: SHA-256 of its projection as it was drawn; empty where it was not, or where
            `base_hash` is of weights that were trained since.
        source: where the weights of the base were read from.
        loaded_from: the hub id and commit that these weights, or those that they were trained from,
            were last read from; None for folders.
        versions: of packages, when the file was written.
        recipe: settings of the training run.
        data: fingerprint of each split that it was trained on.
        metrics: what it reached, by split and metric.
        assumed: what a checkpoint of another library did not say and was filled in, in sentences.
        weights_hash: SHA-256 of the weights beside this file; empty in memory.
        plan_hash: SHA-256 of what the adapter's configuration beside this file asks for; empty in
            memory.
        files: SHA-256 of configuration and tokenizer beside this file; empty in memory.
        seal: a digest of each field as it was saved; empty in memory.
    """

    format: int = _FORMAT
    dim: int = Field(ge=1)
    templates: Templates
    pixel_budget: PixelBudget
    position_scheme: str | dict[str, Any]
    views: str = "page"
    frame_rate: float = Field(default=2.0, gt=0)
    kept_vectors: Literal["all"] = "all"
    base_hash: str
    projection_hash: str = ""
    source: Source | None = None
    loaded_from: Source | None = None
    versions: dict[str, str] = Field(default={})
    recipe: dict[str, Any] | None = None
    data: dict[str, str] = Field(default={})
    metrics: dict[str, float] = Field(default={})
    assumed: tuple[str, ...] = ()
    weights_hash: str = ""
    plan_hash: str = ""
    files: dict[str, str] = Field(default={})
    seal: dict[str, str] = Field(default={})

    def deciding(self) -> str:
        """The fields that decide a vector, as JSON."""
        return self.model_dump_json(include=_DECIDING)


def on_weights(contract: Contract, base: Contract, found: str) -> Contract:
    """The contract of an adapter once it stands on the weights of a base.

    Args:
        base: the base's own; if its weights are not as they were first saved, its projection is not
            as it was drawn either.
        found: hash of its weights.
    """
    updated = {"base_hash": found}
    if base.base_hash != found:
        updated["projection_hash"] = ""
    return contract.model_copy(update=updated)


def save_contract(
    contract: Contract,
    folder: Path,
    weights: Mapping[str, Tensor] | None = None,
    plan_hash: str = "",
) -> None:
    """Write the contract, sealed, as the last file of a folder; it names the others by their hash.

    Args:
        weights: of the folder, by the names of `Retriever.weights`; None if it has none of its own.
        plan_hash: of an adapter's folder.

    The seal tells of edits by hand and of damage, not of forgery.
    """
    found = "" if weights is None else hash_weights(weights)
    updated = {
        "versions": versions(),
        "weights_hash": found,
        "plan_hash": plan_hash,
        "files": file_hashes(folder),
        "seal": {},
    }
    # validated anew, so that every field of every part counts as set
    whole = Contract.model_validate(contract.model_dump() | updated)
    sealed = whole.model_copy(update={"seal": seal_of(whole)})
    text = json.dumps(sealed.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (folder / CONTRACT_FILE).write_text(text + "\n", encoding="utf-8")


def load_contract(folder: Path) -> Contract:
    """Read the contract of a checkpoint.

    Raises:
        CheckpointError: the file is missing, damaged, or of another format, or a file beside it is
            not the one that was saved.
    """
    path = folder / CONTRACT_FILE
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        _check_format(values, path)
        contract = validated(values, Contract, str(path))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {CONTRACT_FILE}, so how queries and pages enter this model is unknown; "
            "make a base from it with `colfolio init`"
        ) from None
    except CheckpointError:
        raise
    except (OSError, ValueError, RecipeError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    check_files(folder, contract.files, CONTRACT_FILE)
    return contract


def check_contract(contract: Contract, config: PretrainedConfig, origin: str) -> None:
    """Refuse a contract that its backbone cannot keep.

    Raises:
        CheckpointError: images are cut otherwise than the vision tower reads them, the towers do
            not fit together, or positions are made by another scheme than the family's.
    """
    vision: Any = config.vision_config  # pyright: ignore[reportAttributeAccessIssue]
    sizes = {
        "patch": vision.patch_size,
        "merge": vision.spatial_merge_size,
        "temporal_patch": vision.temporal_patch_size,
    }
    built = {
        "pixel_budget": contract.pixel_budget.model_copy(update=sizes),
        "position_scheme": position_scheme_of(config, origin),
    }
    wrong = differences(contract, contract.model_copy(update=built))
    given = getattr(vision, "out_hidden_size", vision.hidden_size)
    read = config.get_text_config().hidden_size
    if given != read:
        wrong.append(f"vision_config.hidden_size is {given}, not {read}")
    if wrong:
        raise CheckpointError(f"{origin}: does not fit its backbone: {'; '.join(wrong)}")


def check_saved(contract: Contract, weights: Mapping[str, Tensor], origin: str) -> Contract:
    """The contract of a folder once it and the weights are known to be what was saved.

    Args:
        weights: all of the folder, by the names of `Retriever.weights`.

    Returns:
        The contract without hash and seal, which hold for the folder alone.

    Raises:
        CheckpointError: a field or the weights were changed since, or weights that say they are a
            base have another projection than the one drawn.
    """
    has_hash = bool(contract.weights_hash)
    check_seal(contract, contract.seal, CONTRACT_FILE, origin, has_hash=has_hash)
    if has_hash:
        check_hash(contract.weights_hash, hash_weights(weights), "weights_hash", origin)
    if contract.projection_hash and contract.weights_hash == contract.base_hash:
        found = hash_weights(projection_of(weights))
        check_hash(contract.projection_hash, found, "projection_hash", origin)
    return contract.model_copy(
        update={"weights_hash": "", "plan_hash": "", "files": {}, "seal": {}}
    )


def differences(ours: Settings, theirs: Settings) -> list[str]:
    """In which fields two contracts, or parts of them, differ: `name is ours, not theirs` each."""
    return _differences(ours.model_dump(), theirs.model_dump(), "")


def versions() -> dict[str, str]:
    """Of the packages that decide what a model computes."""
    return {name: metadata.version(name) for name in _PACKAGES}


def projection_of(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of the projection among all of a retriever."""
    return {name: tensor for name, tensor in weights.items() if name.startswith(PROJECTION)}


def hash_weights(weights: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors, in order of name."""
    digest = hashlib.sha256()
    for name in sorted(weights):
        tensor = weights[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _check_format(values: object, path: Path) -> None:
    """Before all else: a newer file has keys that are not known here."""
    number = values.get("format", _FORMAT) if isinstance(values, dict) else _FORMAT
    if isinstance(number, int) and number > _FORMAT:
        raise CheckpointError(
            f"{path}: format {number} is newer than this version of colfolio reads ({_FORMAT}); "
            "install a newer one"
        )
    if number != _FORMAT:
        raise CheckpointError(f"{path}: format {number!r}, this version reads {_FORMAT}")


def _differences(ours: Any, theirs: Any, name: str) -> list[str]:
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        keys = [*ours, *(key for key in theirs if key not in ours)]
        inside = [
            _differences(ours.get(key), theirs.get(key), f"{name}.{key}" if name else str(key))
            for key in keys
        ]
        return [difference for each in inside for difference in each]
    return [] if ours == theirs else [f"{name} is {ours!r}, not {theirs!r}"]
