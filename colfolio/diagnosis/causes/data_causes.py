"""Causes that lie in the data: what is in it twice, cut off, out of order or labelled wrongly."""

from __future__ import annotations

from colfolio.diagnosis.causes.finding import Finding, RuledOut
from colfolio.diagnosis.causes.reading import Reading
from colfolio.diagnosis.causes.thresholds import (
    AT_CHANCE,
    BLANK,
    BY_HEART,
    CONFIDENT,
    CONTRADICTED,
    COPIES,
    GAP,
    LEAKED,
    LEAST_DOCUMENTS,
    MANY_COPIES,
    NO_RANK,
    OFTEN_TOGETHER,
    OVER_FITTED,
    SHIFTED,
    STANDING,
    TIMES_EXPECTED,
    TRUNCATED,
)
from colfolio.diagnosis.evidence import ProbeSignals


def truncated(reading: Reading) -> Finding | RuledOut | None:
    """Images of which tokens are cut off."""
    data = reading.evidence.data
    if data is None or data.truncated is None:
        return None
    if data.truncated < TRUNCATED:
        return RuledOut("truncated_images", f"{data.truncated:.0%} of the documents are cut off")
    return Finding(
        "truncated_images",
        "image tokens are cut off",
        (f"{data.truncated:.0%} of the documents have fewer image tokens than their grid.",),
        "certain",
        "Raise the longest row that the collator lets through, or lower the pixel budget, so that "
        "a whole image fits",
    )


def blank(reading: Reading) -> Finding | RuledOut | None:
    """Documents with nothing on them."""
    data = reading.evidence.data
    if data is None:
        return None
    if data.blank < BLANK:
        return RuledOut("blank_documents", f"{data.blank:.0%} of the documents are one colour")
    return Finding(
        "blank_documents",
        "many documents show nothing",
        (f"{data.blank:.0%} of the images are of one colour throughout.",),
        "certain",
        "Look at the images: pages that did not render, masks in place of pictures, an alpha "
        "channel that hides all; prepare the data anew",
    )


def fixed_order(reading: Reading) -> Finding | RuledOut | None:
    """Batches that are the same every epoch, or stretches of the data set."""
    data, rows = reading.evidence.data, reading.settled.rows
    if data is None or rows is None or data.queries < 2:
        return None
    expected = (rows - 1) / (data.queries - 1)
    found = {
        "rows of a batch meet again in the next epoch": data.epoch_overlap,
        "rows have the data set's next row in their batch": data.neighbours,
    }
    for what, share in found.items():
        if share is not None and share > max(OFTEN_TOGETHER, TIMES_EXPECTED * expected):
            return Finding(
                "fixed_order",
                "the data comes in a fixed order",
                (f"{share:.0%} of the {what}; drawn at random it would be {expected:.1%}.",),
                "certain",
                "Shuffle in every epoch: batches that never change show each query the same few "
                "negatives, and neighbours are often of one document",
            )
    return RuledOut("fixed_order", "batches are drawn anew in every epoch")


def false_negatives(reading: Reading) -> Finding | RuledOut | None:
    """Answers that count as negatives."""
    data = reading.evidence.data
    if data is None:
        return None
    if data.copies < COPIES:
        return RuledOut(
            "false_negatives", f"{data.copies:.2%} of the candidates are copies of the answer"
        )
    return Finding(
        "false_negatives",
        "answers count as negatives",
        (
            f"{data.copies:.1%} of a query's candidates show what its answer shows, or answer the "
            "same text, and are pushed away nevertheless.",
        ),
        "certain" if data.copies >= MANY_COPIES else "likely",
        "Mask them, and remove the copies from the data",
        {"train.batch.ignore_copies": "exact"},
    )


def leaked(reading: Reading) -> Finding | RuledOut | None:
    """A validation split that training has seen."""
    data = reading.evidence.data
    if data is None or data.validation_documents is None:
        return None
    if data.leaked < LEAKED:
        return RuledOut("leaked_split", f"training has {data.leaked:.1%} of the validation split")
    return Finding(
        "leaked_split",
        "what validation measures was trained on",
        (
            f"{data.leaked:.0%} of the validation split's images, or of its queries with the image "
            "that answers them, stand in training.",
        ),
        "certain",
        "Take them out of training, and split by document and not by page: colfolio prepare does",
    )


def shifted_labels(reading: Reading) -> Finding | RuledOut | None:
    """Labels that stand a few rows beside their documents."""
    probes = [each for each in reading.evidence.probes if each.documents >= LEAST_DOCUMENTS]
    if not probes:
        return None
    probe = max(probes, key=lambda each: each.shift_accuracy - each.accuracy)
    by_chance = 1 / max(1, probe.documents)
    if probe.shift_accuracy > max(SHIFTED, 2 * probe.accuracy, TIMES_EXPECTED * by_chance):
        rows = "row" if abs(probe.shift) == 1 else "rows"
        where = "behind" if probe.shift > 0 else "before"
        return Finding(
            "shifted_labels",
            f"labels are shifted by {abs(probe.shift)} {rows} against the documents",
            (
                f"{probe.shift_accuracy:.0%} of the queries rank first the document "
                f"{abs(probe.shift)} {rows} {where} the labelled one, {probe.accuracy:.0%} the "
                f"labelled one (step {probe.step}, {probe.documents} documents).",
            ),
            "certain",
            "Join queries and documents by their ids, not by their place in two files",
        )
    return RuledOut(
        "shifted_labels", f"no neighbour is preferred ({probe.shift_accuracy:.0%} at most)"
    )


def wrong_labels(reading: Reading) -> Finding | RuledOut | None:
    """Labels that a model which already ranks well contradicts."""
    model, probe = reading.evidence.model, reading.first_probe
    is_comparable = reading.settled.loss != "distillation"  # which goes by a teacher
    if model is None or probe is None or not is_comparable or not model.is_trained or model.fresh:
        return None
    if reading.steps and not reading.is_poor:
        return RuledOut("wrong_labels", "the model learns the labels")
    by_chance = 1 / max(1, probe.documents)
    if _contradicts(reading, probe) and probe.accuracy <= TIMES_EXPECTED * by_chance:
        return Finding(
            "wrong_labels",
            "labels contradict a model that was trained before",
            (
                f"Before the first step {probe.accuracy:.0%} of the queries put the labelled "
                f"document first, {probe.confident:.0%} another by a clear lead, and the loss of "
                f"the probe is {probe.loss:.2f} where scores without information give "
                f"{probe.chance:.2f}.",
            ),
            "likely",
            "Read some queries of the training split beside the documents that they are labelled "
            "with; the misses in report.html are of the validation split",
        )
    return RuledOut(
        "wrong_labels", f"the model agrees with {probe.accuracy:.0%} of the labels at the start"
    )


def _contradicts(reading: Reading, probe: ProbeSignals) -> bool:
    """Whether a probe prefers other documents than the labelled ones, and not by chance alone."""
    if reading.settled.loss == "info_nce":
        return probe.loss > CONTRADICTED * probe.chance
    # other losses begin above chance by themselves
    return probe.confident >= CONFIDENT and probe.rank >= NO_RANK * probe.documents


def over_fitting(reading: Reading) -> Finding | RuledOut | None:
    """Validation that gets worse, or stays where it is, while training gets better."""
    rows = reading.validation_losses
    if len(rows) < 3 or reading.recent is None:
        return None
    from_best = min(range(len(rows)), key=lambda place: rows[place][1])
    best_step, best, chance = rows[from_best]
    last_step, last, _ = rows[-1]
    rise = (last - best) / chance
    has_learnt = reading.recent.way > AT_CHANCE and best < chance
    is_rising = rise > OVER_FITTED and from_best < len(rows) - 1
    if has_learnt and (is_rising or _has_left_behind(reading)):
        return Finding(
            "over_fitting",
            "the model learns the training split by heart",
            (
                f"Validation loss was {best:.3f} at step {best_step} and is {last:.3f} at step "
                f"{last_step}, on the same negatives and with chance at {chance:.3f}, while the "
                f"training loss went down to {reading.recent.loss:.3f}, "
                f"{reading.recent.way:.0%} of its way.",
            ),
            "likely",
            *_mend_of_over_fitting(reading, best_step),
        )
    return RuledOut("over_fitting", f"validation loss is {rise:.0%} of chance above its best")


def _mend_of_over_fitting(reading: Reading, best_step: int) -> tuple[str, dict[str, str]]:
    kept = (
        f"take a checkpoint from near step {best_step} if one was kept (checkpoint.every, "
        "checkpoint.keep); more data or fewer open parts go further"
    )
    opened = max((step.step for step in reading.steps if step.opened), default=0)
    if best_step <= opened:  # a recipe of fewer steps than its stages wait is refused
        return (
            f"Begin again without the stage of thaw that opened with step {opened}, or at a lower "
            f"rate of it, or {kept}",
            {},
        )
    return f"Begin again with fewer steps, or {kept}", {"train.steps": str(best_step)}


def _has_left_behind(reading: Reading) -> bool:
    """Whether training is done and validation stands half-way, no better than half the run ago."""
    assert reading.recent is not None
    rows = reading.validation_losses
    _, middle, chance = rows[(len(rows) - 1) // 2]
    _, last, _ = rows[-1]
    gap = reading.recent.way - (chance - last) / chance
    return reading.recent.way > BY_HEART and gap > GAP and middle - last < STANDING * chance
