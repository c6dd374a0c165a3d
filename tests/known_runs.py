"""What is known of runs: one that learns, one that is stuck, and one for each cause."""

import math
from dataclasses import replace

from colfolio.diagnosis.evidence import (
    DataFacts,
    Evidence,
    Fault,
    ModelFacts,
    ProbeSignals,
    Settled,
)
from colfolio.diagnosis.training_log import LoggedEvaluation, LoggedPart, LoggedStep

ROWS = 64
CHANCE = math.log(ROWS)
SETTLED = Settled("info_nce", lr=1e-3, steps=300, warmup_steps=20, rows=ROWS, precision="fp32")
DATA = DataFacts(
    queries=2000,
    documents=2000,
    median_document_tokens=12.0,
    truncated=0.0,
    validation_documents=100,
    epoch_overlap=0.03,
    neighbours=0.03,
)
MODEL = ModelFacts(
    positions="right",
    template_faults=(),
    row_difference=1e-6,
    fresh=(),
    trains={"vision": 100, "layers": 200, "projection": 20},
    is_trained=False,
    drawn=("vision", "layers", "projection"),
)
PROBE = ProbeSignals(
    step=0,
    documents=32,
    loss=3.5,
    chance=math.log(32),
    floor=0.0,
    margin=-1.0,
    mean_margin=0.0,
    rank=16.5,
    accuracy=0.03,
    spread=0.5,
    query_cosine=0.6,
    document_cosine=0.7,
    query_rank=9.0,
    document_rank=8.0,
    dim=32,
    same_winner=0.3,
    query_distance=0.0,
    document_distance=0.0,
    shift=1,
    shift_accuracy=0.06,
    confident=0.1,
    distinct_scores=1.0,
    score_error=1e-6,
)
TRAINED = replace(
    PROBE,
    step=300,
    loss=0.4,
    margin=1.0,
    accuracy=0.9,
    spread=2.0,
    rank=1.2,
    query_distance=0.4,
    document_distance=0.5,
)


def steps(losses, update=1e-3, gradient=0.5, accuracy=0.9, lr=1e-3, chance=CHANCE, floor=0.0):
    part = LoggedPart(lr, gradient, update)
    return tuple(
        LoggedStep(
            number + 1,
            loss,
            chance,
            0.0,
            lr,
            100.0,
            float(ROWS),
            0.0,
            floor=floor,
            accuracy=accuracy,
            parts={"layers": part, "projection": part},
        )
        for number, loss in enumerate(losses)
    )


def falling(to=0.4):
    """A loss from chance downwards, with the noise that batches have."""
    return [
        to + (CHANCE - to) * math.exp(-number / 60) + 0.05 * math.sin(number)
        for number in range(300)
    ]


def at_chance(noise=0.05):
    return [CHANCE + noise * math.sin(1.7 * number) for number in range(300)]


LEARNT = Evidence(
    SETTLED,
    steps(falling()),
    (),
    (PROBE, TRAINED),
    DATA,
    MODEL,
    candidates=float(ROWS),
    masked=0.0,
)
STUCK = replace(
    LEARNT,
    steps=steps(at_chance(), accuracy=0.02),
    probes=(PROBE, replace(PROBE, step=300, query_distance=0.1, document_distance=0.1)),
)


def validated(losses):
    rows = enumerate(losses)
    return tuple(
        LoggedEvaluation(100 * (row + 1), "validation", {"loss": loss, "chance": math.log(65)})
        for row, loss in rows
    )


CASES = {
    "not_finite": replace(STUCK, fault=Fault(12, "loss", "backbone.layers.1")),
    "fresh_tensors": replace(STUCK, model=replace(MODEL, fresh=("custom_text_proj.weight",))),
    "adapter_not_loaded": replace(LEARNT, model=replace(MODEL, adapter_effect=0.0)),
    "adapter_of_another_base": replace(LEARNT, model=replace(MODEL, adapter_is_of_base=False)),
    "positions_flattened": replace(LEARNT, model=replace(MODEL, positions="flattened")),
    "wrong_template": replace(
        LEARNT, model=replace(MODEL, template_faults=("queries lack 'Query: '",))
    ),
    "padding_side": replace(LEARNT, model=replace(MODEL, row_difference=0.02)),
    "truncated_images": replace(LEARNT, data=replace(DATA, truncated=0.4)),
    "blank_documents": replace(STUCK, data=replace(DATA, blank=0.6)),
    "images_unseen": replace(
        STUCK, probes=(replace(PROBE, document_cosine=1.0, spread=0.0), STUCK.probes[1])
    ),
    "queries_alike": replace(STUCK, probes=(replace(PROBE, query_cosine=1.0), STUCK.probes[1])),
    "fixed_order": replace(LEARNT, data=replace(DATA, epoch_overlap=1.0)),
    "shifted_labels": replace(
        STUCK, probes=(replace(PROBE, shift=-1, shift_accuracy=0.8), STUCK.probes[1])
    ),
    "dead_part": replace(
        LEARNT,
        steps=tuple(
            replace(step, parts={**step.parts, "vision": LoggedPart(1e-3, 0.0, 0.0)})
            for step in LEARNT.steps
        ),
    ),
    "rounded_scores": replace(
        LEARNT, probes=(replace(PROBE, score_error=0.3, distinct_scores=0.05), TRAINED)
    ),
    "overflow": replace(LEARNT, skipped=0.4),
    "rate_too_high": replace(STUCK, steps=steps(at_chance(), update=0.5)),
    "collapsed": replace(
        STUCK,
        probes=(PROBE, replace(TRAINED, accuracy=0.0, spread=0.001, document_cosine=0.9999)),
    ),
    "leaked_split": replace(LEARNT, data=replace(DATA, leaked=0.5)),
    "temperature_floor": replace(
        LEARNT, steps=steps([0.7 * CHANCE] * 300, floor=0.65 * CHANCE, accuracy=0.95)
    ),
    "false_negatives": replace(LEARNT, data=replace(DATA, copies=0.1)),
    "wrong_labels": replace(
        STUCK,
        model=replace(MODEL, is_trained=True),
        probes=(replace(PROBE, confident=0.8, loss=6.0), STUCK.probes[1]),
    ),
    "temperature_too_low": replace(
        STUCK,
        settled=replace(SETTLED, temperature=0.02),
        probes=(replace(PROBE, loss=30.0), STUCK.probes[1]),
    ),
    "flat_start": replace(STUCK, probes=(replace(PROBE, spread=0.01), STUCK.probes[1])),
    "temperature_too_high": replace(STUCK, settled=replace(SETTLED, temperature=50.0)),
    "rate_too_low": replace(
        STUCK,
        steps=steps(at_chance(), update=1e-7, lr=1e-7),
        probes=(PROBE, replace(PROBE, step=300, document_distance=1e-5)),
    ),
    "warmup_too_long": replace(
        STUCK,
        settled=replace(SETTLED, warmup_steps=5000),
        steps=steps(at_chance(), update=1e-7, lr=1e-5),
        probes=(PROBE, replace(PROBE, step=300, document_distance=1e-5)),
    ),
    "frozen_parts": replace(
        STUCK, model=replace(MODEL, trains={"projection": 20}, frozen={"layers": 200})
    ),
    "few_candidates": replace(
        LEARNT,
        settled=replace(SETTLED, rows=3, accumulation=16),
        candidates=3.0,
        probes=(PROBE, replace(TRAINED, accuracy=0.2)),
    ),
    "over_fitting": replace(LEARNT, evaluations=validated([2.0, 1.0, 1.6, 2.2])),
    "pairwise_loss": replace(
        STUCK,
        settled=replace(SETTLED, loss="pairwise"),
        steps=steps(
            [0.69 + 0.02 * math.sin(1.7 * n) for n in range(300)], accuracy=0.02, chance=math.log(2)
        ),
    ),
    "forgetting": replace(
        LEARNT,
        steps=steps([1.0 + 0.003 * number for number in range(300)]),
        probes=(replace(TRAINED, step=0), replace(TRAINED, step=300, accuracy=0.6, loss=1.2)),
    ),
    "not_started": STUCK,
}
