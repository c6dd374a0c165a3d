"""Whether the scores of a run that has not begun say anything, on the rows of its probe."""

from __future__ import annotations

from collections.abc import Callable

from colfolio.data.picks import Picker
from colfolio.diagnosis.causes import data_causes, score_causes
from colfolio.diagnosis.causes.table import Rule
from colfolio.diagnosis.causes.thresholds import CONFIDENT, NO_RANK
from colfolio.diagnosis.evidence import Evidence, ModelFacts, ProbeSignals, Settled
from colfolio.diagnosis.preflight.check import Check
from colfolio.diagnosis.preflight.rule_checks import ruled
from colfolio.diagnosis.preflight.trial import CHUNK_TOKENS, Trial
from colfolio.diagnosis.signals import Probe, draw_probe
from colfolio.diagnosis.signals.model_facts import can_retrieve
from colfolio.training.retrieval_objective import teacher_of

SCORES = "scores before step 1"
_RULES: tuple[Rule, ...] = (
    score_causes.images_unseen,
    score_causes.queries_alike,
    data_causes.shifted_labels,
    score_causes.rounded_scores,
)


def first_scores(trial: Trial, picker: Callable[[], Picker], settled: Settled) -> Check:
    """Scores depend on images and on queries, are exact, and contradict no labels.

    Args:
        picker: draws the batches of the run.
    """
    state, dataset = trial.state, trial.dataset
    settings, model = state.settings, trial.retriever
    batch = draw_probe(
        dataset,
        model.collator,
        settings.batch,
        picker().relations,
        teacher_of(dataset, settings),
    )
    if batch is None:
        return Check(SCORES, True, "0 rows of the data can be told from others")
    probe = Probe(batch, settings.memory.chunk_tokens or CHUNK_TOKENS)
    found = probe.measure(model, 0, settings.loss, settings.precision)
    facts = ModelFacts(is_trained=can_retrieve(model))
    told = f"{found.accuracy:.0%} of {len(batch.queries)} queries rank their answer first"
    rules = (*_RULES, data_causes.wrong_labels) if _prefers_others(found) else _RULES
    return ruled(SCORES, Evidence(settled, probes=(found,), model=facts), *rules, told=told)


def _prefers_others(probe: ProbeSignals) -> bool:
    """Whether other documents lead clearly, and answers stand where a guess would put them.

    A run tells wrong labels by not learning them. Before it the loss alone does not: at a low
    temperature that of a base from another field is as high, though its answers stand above half.
    """
    return probe.confident >= CONFIDENT and probe.rank >= NO_RANK * probe.documents
