"""`colfolio plan`: what a recipe takes in memory, time and disk, here or on a named GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from colfolio.commands.console import console
from colfolio.commands.ranks import ranks_to_start
from colfolio.commands.run_folder import TrainRecipe
from colfolio.config import load_settings
from colfolio.data.conversations import load_conversations
from colfolio.data.dataset import load_dataset
from colfolio.diagnosis.ledgers.ledger import check_reachable
from colfolio.diagnosis.planning import (
    MARGIN,
    BatchSize,
    Chunking,
    Part,
    Plan,
    TextSize,
    assumed_sizes,
    assumed_text,
    make_plan,
    measured_sizes,
    measured_text,
    named_gpu,
    this_machine,
)
from colfolio.models.generator import Generator
from colfolio.models.generator_outline import model_outline_of
from colfolio.models.retriever import Retriever
from colfolio.training.start import begin_policy, check_settings

_GIB, _MIB = 2**30, 2**20


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
    model = model_outline_of(recipe.model, recipe.train.objective).model
    check_settings(recipe.train)
    begin_policy(model, recipe.train)
    batch = _sizes(recipe, model)
    keep = recipe.checkpoint.keep
    plan = make_plan(model, recipe.train, batch, machine, count, kept_checkpoints=keep)
    _print_head(plan, recipe_path)
    console().print(_memory_table(plan))
    _print_verdict(plan)
    if not plan.fits and recipe.train.gradient_checkpointing != "all":
        settings = recipe.train.model_copy(update={"gradient_checkpointing": "all"})
        _print_lever(make_plan(model, settings, batch, machine, count, kept_checkpoints=keep))
    console().print(_run_table(plan))
    return plan.fits


def _sizes(recipe: TrainRecipe, model: Retriever | Generator) -> BatchSize | TextSize:
    """Of the recipe's rows; a dataset of the hub is not fetched for it."""
    is_here = Path(recipe.dataset).exists()
    if not is_here:
        console().print(
            f"{recipe.dataset}: not on this machine, so sizes are assumed", markup=False
        )
    if isinstance(model, Generator):
        if not is_here:
            return assumed_text(model, recipe.train.batch)
        return measured_text(load_conversations(recipe.dataset, recipe.split), model, recipe.train)
    if not is_here:
        return assumed_sizes(model.collator, recipe.train.batch)
    dataset = load_dataset(recipe.dataset, recipe.split)
    return measured_sizes(dataset, model.collator, recipe.train)


def _print_head(plan: Plan, recipe_path: Path) -> None:
    ranks = f"{plan.ranks} ranks" if plan.ranks > 1 else "1 rank"
    first = plan.phases[0]
    trained = f"{first.num_trained / 1e6:,.1f} M of {first.num_weights / 1e6:,.1f} M weights train"
    lines = [
        f"{recipe_path} on {plan.machine.name}, {ranks}",
        f"{plan.numerics.precision}, attention {plan.numerics.attention}; {trained}",
        f"a batch: {_batch_line(plan.batch)}",
        f"  ({plan.batch.origin})",
        "",
    ]
    console().print("\n".join(lines), markup=False)
    if len(plan.phases) > 1:
        console().print(_phase_table(plan))


def _phase_table(plan: Plan) -> Table:
    """What each opening of a stage comes to."""
    table = Table(title="what opens when", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for name in ("from step", "weights train", "memory", "TFLOP a step"):
        table.add_column(name, justify="right")
    for phase in plan.phases:
        table.add_row(
            phase.name or "the beginning",
            f"{phase.first:,}" + ("" if phase.is_exact else " or later"),
            f"{phase.num_trained / 1e6:,.1f} M",
            _size(phase.taken),
            _number(plan.flops_of(phase) / 1e12),
        )
    table.add_row()
    return table


def _batch_line(batch: BatchSize | TextSize) -> str:
    if isinstance(batch, TextSize):
        row = batch.row
        return f"{batch.rows:,} conversations of {row.tokens:,} tokens, {row.answers:,} to predict"
    return (
        f"{batch.queries:,} queries of {batch.query.tokens:,} tokens, "
        f"{batch.documents:,} documents of {batch.document.tokens:,}"
    )


def _memory_table(plan: Plan) -> Table:
    title = "memory of each rank" if plan.ranks > 1 else "memory"
    phase = plan.largest
    if len(plan.phases) > 1:
        title += f" from {phase.name} on" if phase.name else " in the beginning"
    table = _table(title)
    for part in [*phase.fixed, *_graph_parts(plan)]:
        table.add_row(part.name, _size(part.num_bytes))
    table.add_row()
    table.add_row("at the highest moment of a step", _size(phase.taken))
    total = _size(plan.machine.num_bytes)
    table.add_row(f"there is ({total}, less {MARGIN:.0%})", _size(plan.usable))
    return table


def _graph_parts(plan: Plan) -> list[Part]:
    own = plan.largest.own
    if isinstance(plan.batch, TextSize):  # no graph outlives its chunk
        return [Part("a chunk at work, its logits included", own.working)]
    return [
        Part("graphs kept from the first pass to the second", own.kept),
        Part("a chunk at work", own.working),
    ]


def _print_verdict(plan: Plan) -> None:
    own, advice = plan.largest.own, plan.largest.advice
    counts = ", ".join(f"{count} of {rows}" for rows, count in own.num_chunks.items())
    size = "all rows" if own.chunk_tokens is None else f"{own.chunk_tokens:,} tokens"
    lines = [f"chunks of {size}: {counts}; {_passes(own)}"]
    lines += _faults(plan)
    if advice is None:
        lines.append(_nothing_fits(plan))
    elif not plan.fits or advice.share_twice < own.share_twice:
        lines.append(f"what fits ({_passes(advice)}), to paste into the recipe under `train:`")
        lines.append(f"  {_memory_line(advice)}")
    console().print("\n".join(lines) + "\n", markup=False)


def _passes(cut: Chunking) -> str:
    return f"{cut.share_twice:.0%} run twice" if cut.share_twice else "one pass"


def _nothing_fits(plan: Plan) -> str:
    before = max(sum(part.num_bytes for part in phase.fixed) for phase in plan.phases)
    if before > plan.usable:
        return (
            f"{_size(before)} are taken before any graph: freeze layers, keep the optimiser's\n"
            "state in 8 bits, or spread the model over ranks with `parallel: fsdp2`"
        )
    return "not even a chunk of one row fits: lower the pixel budget, or freeze layers"


def _print_lever(plan: Plan) -> None:
    """What the recipe would come to with all layers checkpointed."""
    phase = plan.largest
    lines = [f"with `gradient_checkpointing: all` it takes {_size(phase.taken)}"]
    if not plan.fits and phase.advice is not None:
        lines.append(f"  and fits with {_memory_line(phase.advice)}")
    console().print("\n".join(lines) + "\n", markup=False)


def _faults(plan: Plan) -> list[str]:
    """Why the recipe cannot be trained as it stands, with the numbers."""
    own, faults = plan.largest.own, []
    loading, *opening = plan.phases
    if loading.whole > plan.usable:
        faults.append(
            f"does not fit: the model is loaded whole before it is shared, {_size(loading.whole)}"
        )
    faults += [
        f"does not fit: {phase.name} puts the model together to open, {_size(phase.whole)}"
        for phase in opening
        if phase.whole > plan.usable
    ]
    taken = plan.largest.taken
    if taken > plan.usable:
        faults.append(f"does not fit: {_size(taken)} are needed, {_size(plan.usable)} are there")
    if not own.fits_budget:
        assert own.activation_bytes is not None
        faults.append(
            f"does not fit: a chunk holds {own.largest / _MIB:,.1f} MiB, "
            f"but memory.activation_mb is {own.activation_bytes / _MIB:,.1f}"
        )
    return faults


def _memory_line(cut: Chunking) -> str:
    assert cut.activation_bytes is not None
    budget = math.floor(cut.activation_bytes / _MIB)
    return f"memory: {{chunk_tokens: {cut.chunk_tokens}, activation_mb: {budget}}}"


def _run_table(plan: Plan) -> Table:
    table = _table("the run")
    epochs = "" if plan.epochs is None else f" ({plan.epochs:.1f} epochs)"
    table.add_row("steps" + epochs, f"{plan.steps:,}")
    table.add_row("operations a step and rank", f"{_number(plan.flops_a_step / 1e12)} TFLOP")
    table.add_row("speed of a rank", f"{_number(plan.speed.flops / 1e12)} TFLOP/s")
    table.add_row(f"  {plan.speed.origin}")
    table.add_row("hours, estimated", _number(plan.hours))
    for part in plan.disk:
        table.add_row(f"disk: {part.name}", _size(part.num_bytes))
    return table


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    return table


def _number(value: float) -> str:
    """Three digits, and no exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _size(num_bytes: int) -> str:
    if num_bytes >= _GIB:
        return f"{num_bytes / _GIB:,.2f} GiB"
    return f"{num_bytes / _MIB:,.1f} MiB"
