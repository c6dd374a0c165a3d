"""Causes that lie in the model before its first step: what was loaded, and how it is called."""

from __future__ import annotations

import math
from collections.abc import Mapping

from colfolio.diagnosis.causes.finding import Finding, RuledOut
from colfolio.diagnosis.causes.reading import Reading

_NO_EFFECT = 1e-6
# of the numbers of a unit vector, that rounding alone makes; of a precision that is not known, most
_ROUNDING = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
_POSITIONS = {
    "flattened": "image tokens get the positions of text, one after the other, not of a grid",
    "stale": "positions of another batch are used again",
    "padding": "positions are made for another padding than the rows have",
    "constant_time": "time stands still in the positions of a clip",
    "transposed": "height and width are exchanged in the positions",
    "swapped_time": "time and another side are exchanged in the positions",
    "other_scheme": "positions follow another scheme than the model was trained with",
    "misfit": "token ids and grids do not fit each other, so that no positions are right",
    "unexplained": "positions are wrong in a way of which no cause is known",
}
_NAMED = 3
_NO_STAGES = {"train.thaw": "[]"}  # a stage with nothing left to open is refused


def fresh_tensors(reading: Reading) -> Finding | RuledOut | None:
    """Weights that a load draws at random, so that nothing learnt fits them."""
    model = reading.evidence.model
    if model is None or model.fresh is None:
        return None
    if not model.fresh:
        return RuledOut("fresh_tensors", "every tensor comes from the files, twice alike")
    named = ", ".join(model.fresh[:_NAMED])
    more = f" and {len(model.fresh) - _NAMED} more" if len(model.fresh) > _NAMED else ""
    is_projection = any("proj" in name for name in model.fresh)
    what = "the projection is" if is_projection else "some weights are"
    return Finding(
        "fresh_tensors",
        f"{what} drawn anew at every load",
        (
            f"Two loads give {len(model.fresh)} tensors other values ({named}{more}), so what one "
            "run learns fits no other.",
        ),
        "certain",
        "Draw them once and save them: colfolio init MODEL --out BASE, then train from BASE",
    )


def adapter(reading: Reading) -> Finding | RuledOut | None:
    """Adapters that do nothing, or that were trained on another base."""
    model = reading.evidence.model
    if model is None or (model.adapter_effect is None and model.adapter_is_of_base is None):
        return None
    if model.adapter_is_of_base is False:
        return Finding(
            "adapter_of_another_base",
            "the adapters were trained on another base than the one they lie on",
            ("The hash of the base's weights is not the one that the adapters name.",),
            "certain",
            "Load them on the base that their contract names, or make it anew from its source",
        )
    if model.adapter_effect is not None and model.adapter_effect < _NO_EFFECT:
        return Finding(
            "adapter_not_loaded",
            "the adapters have no effect: the model is its base",
            (
                f"Vectors with and without them differ by {model.adapter_effect:.1e}; trained "
                "adapters change them.",
            ),
            "certain",
            "Look at the names of the tensors in the adapter file: those that match no module of "
            "the base are passed over by some loaders; colfolio check --model names them",
        )
    measured = {
        "change the vectors": model.adapter_effect is not None,
        "name this base": model.adapter_is_of_base is True,
    }
    told = " and ".join(what for what, is_known in measured.items() if is_known)
    return RuledOut("adapter_not_loaded", f"the adapters {told}")


def positions(reading: Reading) -> Finding | RuledOut | None:
    """Positions other than the model's scheme gives."""
    model = reading.evidence.model
    if model is None or model.positions is None:
        return None
    if model.positions == "right":
        return RuledOut("positions", "the positions that reach the decoder are those of its scheme")
    other = model.positions.replace("_", " ")
    told = _POSITIONS.get(
        model.positions, f"positions have a fault of which no more is known: {other}"
    )
    return Finding(
        f"positions_{model.positions.replace(' ', '_')}",
        told,
        (model.positions_told,) if model.positions_told else (),
        "certain",
        "Hand over the grids with the token ids, or position_ids of colfolio.mrope, in every call; "
        "colfolio positions MODEL shows what reaches the decoder",
    )


def template(reading: Reading) -> Finding | RuledOut | None:
    """Strings around queries and images that are not the contract's."""
    model = reading.evidence.model
    if model is None or model.template_faults is None:
        return None
    if not model.template_faults:
        return RuledOut("wrong_template", "queries and images get the contract's templates")
    return Finding(
        "wrong_template",
        "queries or images are written otherwise than the checkpoint was trained with",
        tuple(model.template_faults[:_NAMED]),
        "certain",
        "Take the templates of the checkpoint's contract, colfolio.json, or retrain with these",
    )


def padding(reading: Reading) -> Finding | RuledOut | None:
    """Rows whose vectors are others beside another row, or its padding, than alone."""
    model = reading.evidence.model
    if model is None or model.row_difference is None or not math.isfinite(model.row_difference):
        return None
    told = f"{model.row_difference:.1e} at most between a row alone and beside another"
    precision = reading.settled.precision or ""
    limit = _ROUNDING.get(precision, max(_ROUNDING.values()))
    if model.row_difference <= limit:
        return RuledOut("padding_side", f"vectors differ by {told}")
    return Finding(
        "padding_side",
        "tokens of other rows, or padding, reach a row",
        (f"The numbers of a vector differ by {told}; rounding gives {limit:.0e}.",),
        "certain",
        "Let attention end where a row does: where rows are padded, set the side and the mask that "
        "the model was trained with; where they are packed, set train.attention to sdpa",
    )


def dead_part(reading: Reading) -> Finding | RuledOut | None:
    """A part that is open and gets no gradient."""
    if not reading.gradients:
        return None
    # of a model that has collapsed gradients become 0 too, but were not in its first steps
    dead = [part for part, norm in reading.largest_gradients.items() if norm == 0]
    if not dead or len(dead) == len(reading.gradients):
        return RuledOut("dead_part", "every open part gets a gradient")
    others = ", ".join(
        f"{part} {norm:.1e}" for part, norm in reading.gradients.items() if part not in dead
    )
    return Finding(
        "dead_part",
        f"no gradient reaches {' and '.join(dead)}, though open to train",
        (f"The gradient norm is 0 there in every step, and elsewhere {others} (median).",),
        "certain",
        "Look for a detach, a no_grad or an output that is not used on the way from there to the "
        "vectors; colfolio check names the parts that a step changes",
    )


def frozen_parts(reading: Reading) -> Finding | RuledOut | None:
    """Parts with random weights that never train."""
    model = reading.evidence.model
    if model is None or model.drawn is None or reading.recent is None:
        return None
    frozen = {part: count for part, count in model.frozen.items() if part not in model.trains}
    if not frozen:
        return RuledOut("frozen_parts", "no part is wholly frozen")
    held = {part: count for part, count in frozen.items() if part in model.drawn}
    if not held:
        return RuledOut("frozen_parts", "what is frozen was trained before")
    if reading.has_gained or reading.was_good or (reading.gain is None and not reading.is_poor):
        return RuledOut("frozen_parts", "the loss falls with them frozen")
    share = sum(held.values()) / (sum(frozen.values()) + sum(model.trains.values()))
    return Finding(
        "frozen_parts",
        f"{', '.join(held)} must learn and cannot: frozen at random weights",
        (
            f"{share:.0%} of the parameters are frozen as they were drawn, the rest moves, and the "
            f"loss stands at {reading.recent.loss:.3f} with chance at {reading.recent.chance:.3f}.",
        ),
        "likely",
        *_mend_of_frozen(held, has_adapters="adapters" in model.trains),
    )


def _mend_of_frozen(held: Mapping[str, int], *, has_adapters: bool) -> tuple[str, dict[str, str]]:
    if not has_adapters:
        return (
            "Open them from the start, which leaves nothing to a stage of thaw",
            {"train.frozen": "[]"} | _NO_STAGES,
        )
    if list(held) == ["projection"]:
        return (
            "Train it wholly beside the adapters from the start",
            {"train.lora.projection": "full"} | _NO_STAGES,
        )
    return "Train without train.lora: adapters are for a base that was trained before", {}
