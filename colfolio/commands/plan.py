"""`colfolio plan`: what a recipe takes in memory, time and disk, here or on a named GPU."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import nn

from colfolio.commands.console import console
from colfolio.commands.ranks import ranks_to_start
from colfolio.commands.run_folder import TrainRecipe
from colfolio.config import load_settings
from colfolio.data.dataset import load_dataset
from colfolio.diagnosis.ledger import check_reachable
from colfolio.diagnosis.planning import (
    MARGIN,
    BatchSize,
    Part,
    Plan,
    assumed_sizes,
    make_plan,
    measured_sizes,
    named_gpu,
    this_machine,
)
from colfolio.diagnosis.planning.chunking import Chunking, mebibytes
from colfolio.models.checkpoint import hidden_size, load_config, load_tokenizer, local_folder
from colfolio.models.contract import check_contract, load_contract
from colfolio.models.families import family_of
from colfolio.models.retriever import Retriever

_GIB = 2**30


def plan_command(
    recipe_path: Path,
    overrides: Sequence[str] = (),
    *,
    gpu: str | None = None,
    ranks: int | None = None,
) -> bool:
    """Print what a recipe takes; whether it can be trained as it stands.

    No weights are loaded, and of a base on the hub none are fetched.

    Args:
        gpu: a name of `GPUS`; None is this machine.
        ranks: that share each batch; None is one a GPU here, and one of a named GPU.

    Raises:
        ColfolioError: the recipe, the base or the dataset cannot be honoured, or there is no such
            GPU in the table.
    """
    recipe = load_settings(recipe_path, TrainRecipe, overrides)
    count = ranks or (1 if gpu else ranks_to_start(None, None))
    machine = named_gpu(gpu) if gpu else this_machine(count)
    check_reachable(recipe.train, count)
    retriever = _without_weights(recipe.model)
    batch = _sizes(recipe, retriever)
    keep = recipe.checkpoint.keep
    plan = make_plan(retriever, recipe.train, batch, machine, count, kept_checkpoints=keep)
    _print_head(plan, recipe_path)
    console().print(_memory_table(plan))
    _print_verdict(plan)
    console().print(_run_table(plan))
    return plan.fits


def _without_weights(model: str) -> Retriever:
    """The model that a checkpoint's configuration and contract describe, on the meta device."""
    folder = local_folder(model, with_weights=False)
    contract, config = load_contract(folder), load_config(folder)
    check_contract(contract, config, str(folder))
    with torch.device("meta"):
        backbone = family_of(config.model_type, str(folder)).backbone(config)
        projection = nn.Linear(hidden_size(config), contract.dim)
    return Retriever(backbone, projection, load_tokenizer(folder), contract)


def _sizes(recipe: TrainRecipe, retriever: Retriever) -> BatchSize:
    """Of the recipe's rows; a dataset of the hub is not fetched for it."""
    if not Path(recipe.dataset).exists():
        console().print(f"{recipe.dataset}: not on this machine, so sizes are assumed", markup=False)
        return assumed_sizes(retriever.collator, recipe.train.batch)
    dataset = load_dataset(recipe.dataset, recipe.split)
    return measured_sizes(dataset, retriever.collator, recipe.train)


def _print_head(plan: Plan, recipe_path: Path) -> None:
    batch, each = plan.batch, "each of " if plan.ranks > 1 else ""
    ranks = f"{plan.ranks} ranks" if plan.ranks > 1 else "1 rank"
    lines = [
        f"{recipe_path} on {plan.machine.name}, {ranks}",
        f"{plan.numerics.precision}, attention {plan.numerics.attention}; "
        f"{plan.num_trained / 1e6:,.1f} M of {plan.num_weights / 1e6:,.1f} M weights train",
        f"a batch: {batch.queries:,} queries of {batch.query.tokens:,} tokens, "
        f"{batch.documents:,} documents of {batch.document.tokens:,}",
        f"  ({batch.origin})",
        "",
    ]
    console().print("\n".join(lines), markup=False)
    del each


def _memory_table(plan: Plan) -> Table:
    title = "memory of each rank" if plan.ranks > 1 else "memory"
    table = _table(title, "GiB")
    for part in [*plan.fixed, *_graph_parts(plan.own)]:
        table.add_row(part.name, _gib(part.num_bytes))
    table.add_section()
    table.add_row("at the highest moment of a step", _gib(plan.taken))
    total = _gib(plan.machine.num_bytes)
    table.add_row(f"there is ({total}, less {MARGIN:.0%})", _gib(plan.usable))
    return table


def _graph_parts(cut: Chunking) -> list[Part]:
    return [
        Part("graphs kept from the first pass to the second", cut.kept),
        Part("a chunk at work", cut.working),
    ]


def _print_verdict(plan: Plan) -> None:
    own, advice = plan.own, plan.advice
    documents, queries = own.num_chunks
    twice = f"{own.share_twice:.0%} of the tokens run twice" if own.share_twice else "one pass"
    size = "all rows of a side" if own.chunk_tokens is None else f"{own.chunk_tokens:,} tokens"
    lines = [f"chunks of {size}: {documents} of documents, {queries} of queries; {twice}"]
    lines += _faults(plan)
    if advice is None:
        lines.append("not even one row a chunk fits: lower the pixel budget or freeze layers")
    elif not plan.fits or advice.share_twice < own.share_twice:
        rerun = f"{advice.share_twice:.0%} run twice" if advice.share_twice else "one pass"
        lines.append(f"what fits ({rerun}), to paste into the recipe under `train:`")
        lines.append(f"  {_memory_line(advice)}")
    console().print("\n".join(lines) + "\n", markup=False)


def _faults(plan: Plan) -> list[str]:
    """Why the recipe cannot be trained as it stands, with the numbers."""
    own = plan.own
    faults = []
    if plan.loading > plan.usable:
        faults.append(
            f"does not fit: the model is loaded whole before it is shared, {_gib(plan.loading)} GiB"
        )
    if plan.taken > plan.usable:
        faults.append(
            f"does not fit: {_gib(plan.taken)} GiB are needed, {_gib(plan.usable)} GiB are there"
        )
    if not own.fits_budget:
        assert own.activation_bytes is not None
        faults.append(
            f"does not fit: the largest chunk holds {mebibytes(own.largest):,} MiB for backward, "
            f"and memory.activation_mb is {mebibytes(own.activation_bytes):,}"
        )
    return faults


def _memory_line(cut: Chunking) -> str:
    assert cut.activation_bytes is not None
    budget = mebibytes(cut.activation_bytes)
    return f"memory: {{chunk_tokens: {cut.chunk_tokens}, activation_mb: {budget}}}"


def _run_table(plan: Plan) -> Table:
    table = _table("the run", "")
    epochs = "" if plan.epochs is None else f" ({plan.epochs:.1f} epochs)"
    table.add_row("steps" + epochs, f"{plan.steps:,}")
    table.add_row("operations a step and rank", f"{plan.flops_a_step / 1e12:,.3g} TFLOP")
    table.add_row(f"speed ({plan.speed.origin})", f"{plan.speed.flops / 1e12:,.3g} TFLOP/s")
    table.add_row("hours, estimated", f"{plan.hours:,.2g}")
    for part in plan.disk:
        table.add_row(f"disk: {part.name}", f"{_gib(part.num_bytes)} GiB")
    return table


def _table(title: str, unit: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column("part")
    table.add_column(unit, justify="right")
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / _GIB:,.2f}"
