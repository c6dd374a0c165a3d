"""`colfolio export`: a model as the files of another library, here and on the hub."""

from __future__ import annotations

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
from colfolio.models.hub import locate, push
from colfolio.models.lora.files import is_adapter_folder, read_adapter


def export_command(
    model: str,
    to: str,
    out: Path,
    *,
    adapter: bool = False,
    merged: bool = False,
    push_to: str | None = None,
    private: bool = False,
    revision: str | None = None,
) -> None:
    """Write a model for a library, say what its users have to know, and push it if asked.

    Args:
        model: checkpoint or adapter, a folder or hub id.
        to: one of `TARGETS`.
        out: a new folder.
        adapter: write the adapter alone.
        merged: write the base with its adapter merged into it.
        push_to: hub id of a repository that gets the folder.
        private: make that repository a private one.
        revision: of a hub id.

    Raises:
        ColfolioError: options do not go together or with the model, the library has no class for
            it, the folder is not free, or the hub does not take it.
    """
    _check_options(to, out, adapter, merged, push_to, private)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", AssumedWarning)  # all of it is printed below
        retriever = Retriever.from_pretrained(model, revision=revision, device="cpu")
    _check_adapter(retriever, model, adapter, merged)
    if adapter:
        notes = _export_adapter(retriever, locate(model, revision).folder, to, out, push_to)
    else:
        if merged:
            merge(retriever)
        notes = write(_found(retriever), out, to)
    _print_result(out, to, (*retriever.contract.assumed, *notes))
    if push_to is not None:
        console().print(f"pushed: {push(out, push_to, private=private)}", markup=False)


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
    if push_to is not None and push_to.count("/") != 1:
        raise ColfolioError(f"--push {push_to}: not a hub id of the form owner/name")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out}: is not free; give a new folder")


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


def _export_adapter(
    retriever: Retriever, source: Path, to: str, out: Path, push_to: str | None
) -> tuple[str, ...]:
    """Write an adapter alone, on the base that it names; returns what a user has to know."""
    assert is_adapter_folder(source), "a model with an adapter was read from an adapter's folder"
    config = read_adapter(source).config
    base, revision = str(config.base_model_name_or_path), config.revision
    beside = source / base
    if beside.is_dir():
        base, revision = str(beside.resolve()), None
        if push_to is not None:
            raise ColfolioError(
                f"--push: the base of this adapter is the folder {base}, which nobody else has; "
                "push the base and name it in adapter_config.json, or give --merge"
            )
    with whole_folder(out) as aside:
        save_adapter(retriever, aside, base, revision)
        return write_beside_adapter(_found(retriever), aside, to, base)


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
