"""`colfolio demo`: the whole job on the bundled documents, and one screen of what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table

from colfolio.commands.console import console, program
from colfolio.demo.outcome import write_outcome
from colfolio.demo.plan import DemoFolder, Progress, commands, run_commands


def demo_command(out: Path, *, seed: int = 0, steps: int | None = None) -> None:
    """Run the demo into a folder; an interrupted demo goes on where it stopped.

    Args:
        out: everything lands here.
        seed: of weights and of the order of the data.
        steps: of training; None takes the recipe's.

    Raises:
        ColfolioError: a command failed, or the folder holds another demo.
    """
    folder = DemoFolder(out)
    plan = commands(folder, seed, steps)
    progress = Progress(folder, seed, steps)
    for number, (command, done) in enumerate(run_commands(folder, plan, progress), start=1):
        mark = " (done before)" if done else ""
        console().print(f"\n[bold]{number}/{len(plan)} {command.why}[/bold]{mark}")
        console().print(f"$ {command.line}", style="cyan", markup=False)
    results = write_outcome(folder, plan, progress.seconds, seed)
    _print_results(results, folder)


def _print_results(results: dict[str, Any], folder: DemoFolder) -> None:
    table = Table(title="Held-out document families", title_justify="left")
    for name in ("", "nDCG@5", "chance", "candidates"):
        table.add_column(name, justify="left" if not name else "right")
    low, high = results["ndcg@5_interval"]
    table.add_row(
        "headings by their title",
        f"{results['ndcg@5']:.3f} [{low:.3f}, {high:.3f}]",
        f"{results['chance_ndcg@5']:.4f}",
        f"{results['candidates']:,}",
    )
    if results["unseen_ndcg@5"] is not None:
        table.add_row("  titles unseen in training", f"{results['unseen_ndcg@5']:.3f}", "", "")
    table.add_row("  blind baseline", f"{results['baseline_ndcg@5']:.3f}", "", "")
    low, high = results["page_ndcg@5_interval"]
    table.add_row(
        "whole pages by section title",
        f"{results['page_ndcg@5']:.3f} [{low:.3f}, {high:.3f}]",
        f"{results['page_chance_ndcg@5']:.4f}",
        f"{results['page_candidates']:,}",
    )
    console().print()
    console().print(table)
    console().print(
        f"prepared in {results['prepare_seconds']:.0f} s, trained in "
        f"{results['train_seconds']:.0f} s, all in {results['total_seconds'] / 60:.1f} min"
    )
    console().print(f"report:  {folder / 'report.html'}")
    console().print(f'search:  {program()} search {folder / "index"} "your words"')
