"""Causes that show in the scores: gone, rounded, too flat, too steep, or near their floor."""

from __future__ import annotations

import math

from colfolio.diagnosis.causes.finding import Finding, RuledOut
from colfolio.diagnosis.causes.mends import lower_rate, lower_temperature, more_rows
from colfolio.diagnosis.causes.reading import Reading
from colfolio.diagnosis.causes.thresholds import (
    FEW_CANDIDATES,
    FLAT_START,
    HIGH_FLOOR,
    LEARNT,
    MOSTLY_RANKED,
    NEAR_CHANCE,
    NO_ROOM,
    RANKED,
    ROUGH,
    SAME_SCORES,
    SCORE_ERROR,
    STEEP_START,
    UNSEEN,
    UNTOLD_FLOOR,
)
from colfolio.diagnosis.evidence import ProbeSignals

_THIRD = 1 / 3
_LEAST_STEPS = 10
_WRONG_LABELS = (
    "If it collapses all the same, read some queries beside their documents: where labels are "
    "wrong, or no image answers its query, equal scores are the best there is"
)


def collapsed(reading: Reading) -> Finding | RuledOut | None:
    """All documents score alike, and once did not."""
    gone = reading.has_collapsed
    level = reading.recent
    if gone is None or level is None:
        return None
    if not gone or not reading.is_at_chance:
        left = reading.spread_left
        why = "the loss moves" if left is None else f"the spread is {left:.2g} of the first"
        return RuledOut("collapsed", f"scores still tell documents apart: {why}")
    evidence = [f"The loss is {level.loss:.4f} and chance is {level.chance:.4f}."]
    first, last = reading.first_probe, reading.last_probe
    if first is not None and last is not None:
        evidence.append(
            f"Scores of a query spread by {last.spread:.2g}, and by {first.spread:.2g} before the "
            f"first step; vectors of different documents have a cosine of "
            f"{last.document_cosine:.3f}, their effective rank is {last.document_rank:.1f} of "
            f"{last.dim}."
        )
    else:
        evidence.append("It stands still there, as the loss of equal scores does.")
    is_final = reading.has_gone_silent
    if is_final:
        evidence.append("Gradients are next to 0 in every part.")
    return Finding(
        "collapsed",
        "the model has collapsed: it gives all documents the same score",
        tuple(evidence),
        "certain" if last is not None and is_final else "likely",
        *_mend_of_collapse(reading, is_final=is_final),
    )


def _mend_of_collapse(reading: Reading, *, is_final: bool) -> tuple[str, dict[str, str]]:
    candidates = reading.evidence.candidates
    if reading.settled.loss == "pairwise":
        told, change = _mend_of_pairwise(reading)
        return f"{told}. {_WRONG_LABELS}", change
    if is_final or reading.last_probe is None:
        begin = "Begin again from the base"
    else:
        begin = "Go on and see whether scores come apart again, or begin again from the base"
    if candidates is not None and candidates < FEW_CANDIDATES:
        return (
            f"{begin}: with so few candidates equal scores cost little. {_WRONG_LABELS}",
            more_rows(reading),
        )
    return (
        f"{begin}: a lower rate, a longer warm-up or a higher temperature keeps it from "
        f"collapsing. {_WRONG_LABELS}",
        lower_rate(reading, _THIRD),
    )


def pairwise_loss(reading: Reading) -> Finding | RuledOut | None:
    """A loss at ln 2 that the pairwise loss itself holds there, before scores are all equal."""
    level, model = reading.recent, reading.evidence.model
    if level is None or reading.settled.loss != "pairwise" or len(reading.steps) < _LEAST_STEPS:
        return None
    if model is not None and model.is_trained:
        return RuledOut("pairwise_loss", "the model was trained before, and may bear it")
    if abs(level.loss - level.chance) > NEAR_CHANCE * level.chance or reading.ranks(MOSTLY_RANKED):
        return RuledOut("pairwise_loss", f"the loss is {level.loss:.3f} and has left ln 2")
    if reading.has_collapsed:
        return RuledOut("pairwise_loss", "it has done what it does: scores are equal by now")
    return Finding(
        "pairwise_loss",
        "the pairwise loss holds the model at ln 2, whatever the size of the batch",
        (
            f"The loss is {level.loss:.4f} and chance is {level.chance:.4f}. Where scores differ "
            "and say nothing, the hardest negative stands above the answer and the loss above "
            "ln 2: near it scores are nearly equal.",
        ),
        "likely",
        *_mend_of_pairwise(reading),
    )


def _mend_of_pairwise(reading: Reading) -> tuple[str, dict[str, str]]:
    return (
        "The pairwise loss is least hurt by scores that are all equal, at any size of batch; "
        "InfoNCE over many candidates is not: begin again from the base with it",
        {"train.loss.kind": "info_nce"} | more_rows(reading),
    )


def images_unseen(reading: Reading) -> Finding | RuledOut | None:
    """Documents have the same scores though their images differ."""
    probe, data = reading.first_probe, reading.evidence.data
    if probe is None:
        return None
    # where queries are alike too, a common direction of all vectors hides what they say
    share = probe.spread / max(1 - probe.query_cosine, 1e-9)
    if share > UNSEEN or _are_queries_alike(probe) or (data is not None and data.blank > LEARNT):
        return RuledOut(
            "images_unseen",
            f"scores tell documents apart at the start: they spread by {probe.spread:.2g}",
        )
    return Finding(
        "images_unseen",
        "the model does not see the images: all documents score alike",
        (
            f"Before the first step the scores of a query spread by {probe.spread:.1g} over its "
            f"{probe.documents} documents, though vectors of different queries have a mean cosine "
            f"of {probe.query_cosine:.2f} alone.",
            f"{probe.same_winner:.0%} of the query tokens have their best match at the same place "
            "of nearly every document.",
        ),
        "certain",
        "Look at what enters the vision tower: patches that are all alike, pixels that were scaled "
        "twice, or image tokens that its output never replaces",
    )


def queries_alike(reading: Reading) -> Finding | RuledOut | None:
    """All queries give a document the same score."""
    probe = reading.first_probe
    if probe is None:
        return None
    if not _are_queries_alike(probe):
        return RuledOut(
            "queries_alike", f"queries differ at the start (cosine {probe.query_cosine:.3f})"
        )
    return Finding(
        "queries_alike",
        "all queries are the same to the model",
        (
            "Before the first step all queries give a document the same score, while a query's "
            f"scores spread by {probe.spread:.2g} over documents.",
        ),
        "certain",
        "Read the queries as they enter the model: empty texts, a column of another name, letters "
        "that the tokenizer passes over, or a template that leaves the query out",
    )


def _are_queries_alike(probe: ProbeSignals) -> bool:
    if probe.query_spread is None:
        return probe.query_cosine >= 1 - 1e-6
    return probe.query_spread < UNSEEN * probe.spread


def rounded_scores(reading: Reading) -> Finding | RuledOut | None:
    """Scores kept in too few bits to be told apart."""
    probe = reading.first_probe
    if probe is None or not math.isfinite(probe.score_error):
        return None
    # scores that hardly differ are rough beside their spread even in float32, but not beside 1
    largest = max(map(abs, probe.edges)) or 1.0
    error = probe.score_error * probe.spread / largest
    is_rough = probe.score_error > SCORE_ERROR and probe.distinct_scores < SAME_SCORES
    if not is_rough or error < ROUGH:
        return RuledOut(
            "rounded_scores", f"scores are exact to {probe.score_error:.1g} of their spread"
        )
    return Finding(
        "rounded_scores",
        "scores are rounded until they can no longer be told apart",
        (
            f"They differ from a product in float64 by up to {probe.score_error:.0%} of their "
            f"spread, and {probe.distinct_scores:.0%} of them are distinct.",
        ),
        "certain",
        "Compute MaxSim and the loss in float32, whatever the model's precision is",
    )


def steep_start(reading: Reading) -> Finding | RuledOut | None:
    """A temperature that makes the first scores decide everything."""
    probe = reading.first_probe
    if probe is None or reading.settled.loss != "info_nce":
        return None
    temperature = reading.settled.temperature
    steepness, level = probe.spread / temperature, reading.recent
    has_learnt = reading.ranks(RANKED) or (level is not None and level.way > LEARNT)
    if steepness < STEEP_START or probe.loss < 1.5 * probe.chance or has_learnt:
        return RuledOut(
            "temperature_too_low",
            f"scores spread by {steepness:.2g} temperatures before the first step",
        )
    return Finding(
        "temperature_too_low",
        "the temperature is too low for scores that know nothing yet",
        (
            f"Before the first step scores spread by {steepness:.1f} times the temperature "
            f"{temperature:g}: the loss begins at {probe.loss:.2f}, chance is {probe.chance:.2f}, "
            "and equal scores are then the fastest way down.",
        ),
        "likely",
        "Raise it until the loss begins near chance",
        {"train.loss.temperature": f"{max(temperature, probe.spread):.2g}"},
    )


def flat_start(reading: Reading) -> Finding | RuledOut | None:
    """Initial scores, or a temperature, that leave hardly a difference to learn from."""
    probe = reading.first_probe
    if probe is None or reading.recent is None or reading.settled.loss == "pairwise":
        return None
    flatness = probe.spread / reading.settled.temperature
    if flatness > FLAT_START or not reading.is_poor:
        return RuledOut(
            "flat_start", f"scores spread by {flatness:.2g} temperatures before the first step"
        )
    is_warm = reading.settled.temperature > 2
    return Finding(
        "temperature_too_high" if is_warm else "flat_start",
        "the temperature is so high that scores hardly matter"
        if is_warm
        else "scores hardly differ before the first step",
        (
            f"They spread by {probe.spread:.2g}, {flatness:.2g} of the temperature "
            f"{reading.settled.temperature:g}, so that the gradient hardly tells one document from "
            "another.",
        ),
        "likely",
        "Lower the temperature" if is_warm else "Draw the weights wider, or lower the temperature",
        lower_temperature(reading),
    )


def high_floor(reading: Reading) -> Finding | RuledOut | None:
    """A loss that looks stuck and is nearly as low as its scores can take it."""
    level, accuracy = reading.recent, reading.accuracy
    if level is None or all(step.floor is None for step in reading.steps):
        return None
    share = level.floor / level.chance
    is_ranking = reading.ranks(MOSTLY_RANKED) or (
        accuracy is not None and accuracy >= MOSTLY_RANKED
    )
    is_untold = accuracy is None and share > UNTOLD_FLOOR
    # of a base that could rank, ranks that are lost are no sign of room
    is_able = is_ranking or reading.was_good or level.way > LEARNT
    if share < HIGH_FLOOR or not (is_able or is_untold or share >= NO_ROOM):
        return RuledOut("temperature_floor", f"the loss can go down to {level.floor:.3f}")
    ranked = "" if accuracy is None else f" {accuracy:.0%} of the queries rank their answer first."
    has_room = share < NO_ROOM
    return Finding(
        "temperature_floor" if has_room else "temperature_too_high",
        "the loss cannot go much lower at this temperature"
        if has_room
        else "the temperature is so high that scores hardly matter",
        (
            f"It is {level.loss:.3f}; scores at the ends of their range would give "
            f"{level.floor:.3f}, scores without information {level.chance:.3f}.{ranked}",
        ),
        "certain",
        "Judge the run by accuracy, margin and validation, not by the loss; a lower temperature "
        "lets it fall further",
        lower_temperature(reading),
    )
