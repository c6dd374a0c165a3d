"""`colfolio export`: a model as the files of another library, here and on the hub."""

from __future__ import annotations

import shlex
import warnings
from pathlib import Path

from colfolio.commands.console import console
from colfolio.errors import CheckpointError, ColfolioError
from colfolio.models import Retriever
from colfolio.models.adapters import has_adapter, merge, save_adapter
from colfolio.models.files import whole_folder
from colfolio.models.formats import (
    ADAPTER_TARGETS,
    AssumedWarning,
    Found,
    write,
    write_beside_adapter,
)
from colfolio.models.hub import Location, check_push, locate, push
from colfolio.models.lora.files import is_adapter_folder, read_adapter
from colfolio.models.lora.opening import base_of


def export_command(
    model: str,
    to: str,
    out: Path,
    *,
    adapter: bool = False,
    merged: bool = False,
    base: str | None = None,
    push_to: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> None:
    """Write a model for a library, say what its users have to know, and push it if asked.

    Args:
        model: checkpoint or adapter, a folder or hub id.
        to: one of `TARGETS`.
        out: a new folder.
        adapter, merged: write the adapter alone, or the base with its adapter merged into it.
        base: of an adapter, as a folder or hub id; None takes the one that it names.
        push_to, private: hub id of a repository that gets the folder, and whether it is private.
        revision: of a hub id.

    Raises:
        ColfolioError: options do not go together or with the model, the library has no class for
            it, the folder is not free, or the hub does not take it.
    """
    _check_options(to, out, adapter, merged, push_to, private)
    retriever = _opened(model, revision, base)
    _check_adapter(retriever, model, adapter, merged)
    if adapter:
        place = _base_of(locate(model, revision).folder, base, push_to)
        notes = _export_adapter(retriever, place, to, out)
    else:
        if merged:
            merge(retriever)
        notes = write(_found(retriever), out, to)
    _print_result(out, to, (*retriever.contract.assumed, *notes))
    if push_to is not None:
        _push(out, push_to, private)


def _check_options(
    to: str, out: Path, adapter: bool, merged: bool, push_to: str | None, private: bool
) -> None:
    if adapter and merged:
        raise ColfolioError(
            "--adapter writes the adapter alone, --merge its base with it: give one"
        )
    if adapter and to not in ADAPTER_TARGETS:
        raise ColfolioError(
            f"--adapter: an adapter has the tensor names of {' and '.join(ADAPTER_TARGETS)}; for "
            f"{to}, give --merge"
        )
    if private and push_to is None:
        raise ColfolioError("--private is of the repository on the hub: give it with --push")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is not free; give a new folder")
    if push_to is not None:
        check_push(push_to, private=private)


def _opened(model: str, revision: str | None, base: str | None) -> Retriever:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumedWarning)  # all of it is printed by the caller
        return Retriever.from_pretrained(model, revision=revision, device="cpu", base=base)


def _check_adapter(retriever: Retriever, model: str, adapter: bool, merged: bool) -> None:
    if has_adapter(retriever) and not (adapter or merged):
        raise ColfolioError(
            f"{model}: is an adapter with its base; give --adapter to write it alone, or --merge "
            "to write its base with it"
        )
    if (adapter or merged) and not has_adapter(retriever):
        raise ColfolioError(
            f"{model}: has no adapter, so leave out --{'adapter' if adapter else 'merge'}"
        )


def _base_of(source: Path, given: str | None, push_to: str | None) -> Location:
    """Where the base is that an adapter was opened on.

    Raises:
        ColfolioError: the adapter is to be pushed, and the base is on this machine alone.
    """
    assert is_adapter_folder(source), "a model with an adapter was read from an adapter's folder"
    place = base_of(read_adapter(source), given, with_weights=False)
    if push_to is not None and place.hub_id is None:
        raise ColfolioError(
            f"--push: the base of this adapter is the folder {place.folder}, which nobody else "
            "has; push that first and give its id as --base, or give --merge"
        )
    return place


def _export_adapter(retriever: Retriever, place: Location, to: str, out: Path) -> tuple[str, ...]:
    """Write an adapter alone, on the base that it was opened on; what a user has to know."""
    base = place.hub_id or str(place.folder.resolve())
    with whole_folder(out) as aside:
        save_adapter(retriever, aside, base, place.commit)
        return write_beside_adapter(_found(retriever), aside, to, base)


def _push(out: Path, push_to: str, private: bool) -> None:
    try:
        address = push(out, push_to, private=private)
    except CheckpointError as error:
        again = f"hf upload {push_to} {shlex.quote(str(out))}{' --private' if private else ''}"
        raise CheckpointError(f"{error}. It is written and stays; push it with: {again}") from None
    console().print(f"pushed: {address}", markup=False)


def _print_result(out: Path, to: str, notes: tuple[str, ...]) -> None:
    for sentence in notes:
        console().print(f"note: {sentence}", markup=False)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    console().print(f"{out}: {size / 1e6:,.1f} MB for {to}", markup=False)


def _found(retriever: Retriever) -> Found:
    """What is to be written; the format is that of the target."""
    return Found(
        "colfolio",
        retriever.backbone.config,
        retriever.weights(),
        retriever.tokenizer,
        retriever.contract,
    )
