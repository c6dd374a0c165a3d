"""What a run learns from, counted before its first step: told, and kept in its log."""

from __future__ import annotations

from dataclasses import asdict

from colfolio.commands.console import console
from colfolio.commands.run_folder import RunFolder
from colfolio.commands.splits import Splits, pool_line
from colfolio.data.conversations import ConversationDataset
from colfolio.diagnosis import Ledger, TextLedger, ledger_lines, make_ledger, make_text_ledger
from colfolio.training import TrainingState
from colfolio.training.thaw_schedule import trains_line


def ledger_of(state: TrainingState, splits: Splits) -> Ledger | TextLedger:
    """What every rank counts, so that all of them refuse what cannot be trained."""
    settings, ranks, dataset = state.settings, state.world.size, splits.train
    trains = trains_line(state.model, settings, len(state.opened))
    computed = {"precision": settings.precision, "attention": state.kernel}
    if isinstance(dataset, ConversationDataset):
        chat, vocabulary = state.generator.chat, state.generator.vocabulary
        return make_text_ledger(dataset, settings, ranks, chat, vocabulary, computed, trains)
    return make_ledger(
        dataset,
        settings,
        ranks,
        state.retriever.collator.query_lengths,
        computed,
        validation=pool_line(splits.validation),
        trains=trains,
        position=state.position,
        step=state.step,
    )


def log_ledger(run: RunFolder, step: int, ledger: Ledger | TextLedger) -> None:
    """Note the ledger of a run that begins, or goes on in other ranks or with other arithmetic.

    What else it says is counted in other batches than before, and no more news than they are.
    """
    kind = "text_ledger" if isinstance(ledger, TextLedger) else "ledger"
    row, last = asdict(ledger), run.last(kind) or {}
    if any(row[name] != last.get(name) for name in ("ranks", "computed_with")):
        run.append(kind, {"step": step} | row)


def say_ledger(ledger: Ledger | TextLedger) -> None:
    """Tell the terminal."""
    for line in ledger_lines(ledger):
        console().print(line, markup=False)  # a folder's name may look like markup
