"""All checks of a recipe, and the cheap ones among them that every run begins with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial

from colfolio.data.dataset import RetrievalDataset
from colfolio.data.picks import Picker
from colfolio.diagnosis.evidence import DataFacts
from colfolio.diagnosis.ledgers.ledger import Ledger
from colfolio.diagnosis.preflight import data_checks as data
from colfolio.diagnosis.preflight import equality_checks as equality
from colfolio.diagnosis.preflight import input_checks as inputs
from colfolio.diagnosis.preflight import learning_checks as learning
from colfolio.diagnosis.preflight import score_checks as scores
from colfolio.diagnosis.preflight import start_checks as start
from colfolio.diagnosis.preflight import vector_checks as vectors
from colfolio.diagnosis.preflight.check import Asked, Check, run_checks, timed
from colfolio.diagnosis.preflight.trial import Trial, make_trial
from colfolio.diagnosis.run_evidence import settled_of
from colfolio.diagnosis.signals import measure_data
from colfolio.diagnosis.signals.model_facts import can_retrieve
from colfolio.errors import RecipeError
from colfolio.models.adapters import has_adapter
from colfolio.training import TrainingState
from colfolio.training.retrieval_objective import teacher_of


def check_run(
    state: TrainingState,
    dataset: RetrievalDataset,
    held_out: RetrievalDataset | None,
    count: Callable[[], Ledger],
    base: str,
) -> Iterator[Check]:
    """All checks of a run before its first step, one after another; in a world of one.

    Args:
        state: the same again after each check.
        dataset, held_out: the training split, and that of validation if there is one.
        count: makes the ledger of the run.
        base: folder or hub id of the model.

    Raises:
        DatasetError: none of the first images can be read, or training would refuse a batch.
    """
    counted = functools.cache(count)
    with suppress(RecipeError):  # which the line on candidates tells
        counted()
    trial, settled = make_trial(state, dataset), settled_of(state.settings, state.world.size)

    @functools.cache
    def picker() -> Picker:
        settings = state.settings
        return Picker(dataset, settings.batch, settings.seed, teacher_of(dataset, settings))

    @functools.cache
    def facts() -> DataFacts:
        collator, batch = state.retriever.collator, state.settings.batch
        return measure_data(dataset, collator, batch, picker(), trial.rows, held_out)

    asked = _cheap(trial, counted, base) | {
        data.ENOUGH: partial(
            data.enough_candidates,
            counted,
            facts,
            settled,
            is_trained=can_retrieve(state.retriever),
        ),
        data.ANSWERS: partial(data.answers, trial),
        data.BLANK: partial(data.pages_show_something, facts, settled),
        data.COPIED: partial(data.no_false_negatives, facts, settled),
        data.SPLITS: partial(data.splits_apart, facts, settled),
        data.ORDER: partial(data.drawn_anew, facts, settled),
        scores.SCORES: partial(scores.first_scores, trial, picker, settled),
        start.START: partial(start.start_of_loss, trial, counted),
        start.FLOOR: partial(start.floor_of_loss, counted),
        learning.FROZEN: partial(learning.frozen_weights, trial),
        learning.ONE_BATCH: partial(learning.one_batch_by_heart, trial),
        vectors.ALONE: partial(equality.rows_alone, trial),
        equality.CHUNKS: partial(equality.chunks_alike, trial),
        vectors.SAVED: partial(equality.saved_and_loaded, trial, base),
        equality.HALF: partial(equality.half_precision, trial),
    }
    yield from run_checks(asked)


def check_first(
    state: TrainingState, dataset: RetrievalDataset, ledger: Ledger, base: str
) -> Iterator[Check]:
    """The checks that cost less than a step or two; all ranks call it, and get the same.

    Args:
        state: before the first step; the same again after each check.
        base: folder or hub id of the model.

    Raises:
        ColfolioError: what the first step would refuse, as a chunk that does not fit.
    """
    asked = _cheap(make_trial(state, dataset), lambda: ledger, base)
    # an error that a rank has alone must end it, as in a step: the others wait for it there
    yield from map(timed, asked.values())


def _cheap(trial: Trial, count: Callable[[], Ledger], base: str) -> dict[str, Asked]:
    model, settings = trial.retriever, trial.state.settings
    adapters: dict[str, Asked] = {}
    if has_adapter(model) and settings.lora is None:  # it was loaded; a fresh one changes nothing
        precision = settings.precision
        adapters[vectors.ADAPTER] = partial(vectors.adapter_works, model, trial.rows, precision)
    return {
        inputs.WEIGHTS: partial(inputs.weights_of_files, model, base),
        **adapters,
        # what is cut off fits no positions either
        inputs.TOKENS: partial(inputs.token_counts, model, trial.rows),
        inputs.POSITIONS: partial(inputs.positions, model, trial.rows),
        inputs.TEMPLATES: partial(inputs.templates, model, trial.rows),
        data.CANDIDATES: partial(data.candidates, count, settings),
        learning.GRADIENT: partial(learning.reach_of_gradient, trial),
    }
