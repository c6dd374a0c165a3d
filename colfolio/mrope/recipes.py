"""Recipes of wrong position ids: what each fault would have given for a row.

A recipe takes a call of one row and the calls before it, and yields ids `[3, L]` with words that
say what they are. Plain arithmetic on the CPU, run only for rows that are wrong.

Letters: L padded length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations, product

import torch
from torch import Tensor

from .calls import Call, Past
from .schemes import SCHEMES, TEXT, VIDEO, Qwen2VL, Scheme

_AXES = ("temporal", "height", "width")


def flattened(row: Call, earlier: Sequence[Call]) -> Iterator[tuple[Tensor, str]]:
    """One step a token; from any place on but the rope delta of an earlier call."""
    if row.past is not None:
        for start, ids in _counts(row) if row.past.deltas.any() else ():
            if start == 0:
                yield ids, "the number of tokens before, those of images counted one by one"
        return
    is_inside = (row.types[0, 1:] != TEXT) & (row.types[0, 1:] == row.types[0, :-1])
    if not is_inside.any():  # a visual token by itself is placed like text
        return
    counts = _counts(row)
    if any(start == 0 or _origin(start, row, earlier) is None for start, _ in counts):
        for start, ids in counts:
            yield ids, f"one-dimensional, one step a token from {start} on"


def stale(row: Call, earlier: Sequence[Call]) -> Iterator[tuple[Tensor, str]]:
    """One step a token from the rope delta of an earlier call on, or ids that were right there."""
    own = None if row.past is None else int(row.past.deltas)
    for start, ids in _counts(row):
        origin = None if start == own else _origin(start, row, earlier)
        if origin is not None:
            what = f"one-dimensional, one step a token, plus {start}, the rope delta of {origin}"
            yield ids, what
    if row.past is not None:  # a token or two have the same ids as others by chance
        return
    real = row.real[0]
    for number in reversed(range(len(earlier))):
        other = earlier[number]
        if other.seen.shape[2] != len(real):
            continue
        is_same = (other.seen[:, :, real] == row.seen[:, :, real]).all(-1).all(0)
        for match in (is_same & other.right_rows).nonzero()[:, 0].tolist():
            yield other.seen[:, match], f"those of call {number}, row {match}, and right there"


def padding(row: Call, _: Sequence[Call]) -> Iterator[tuple[Tensor, str]]:
    """Padding counted as text, or the right ids laid at the other end of the row."""
    if row.past is not None:
        yield from _padding_before(row, row.past)
        return
    real, types = row.real[0], row.types[0]
    if row.expected is None or real.all():
        return
    unmasked = replace(row, attention_mask=None)
    if unmasked.expected is not None:
        yield unmasked.expected[:, 0], "those of the row with its padding counted as text"
    num_padding = int((~real).sum())
    laid = "the right ones for padding on the {}" + ", which is on another side here"
    ids, kept = row.expected[:, 0, real], types[real]
    padding = torch.full((num_padding,), TEXT)
    for fill in (0, 1):  # what libraries write at padding
        filled = ids.new_full((3, num_padding), fill)
        yield torch.cat([ids, filled], dim=1), laid.format("right")
        yield torch.cat([filled, ids], dim=1), laid.format("left")
    for side, moved in (("right", (kept, padding)), ("left", (padding, kept))):
        counted = replace(unmasked, token_types=torch.cat(moved)[None])
        if counted.expected is not None:
            yield counted.expected[:, 0], f"{laid.format(side)}, and counted as text"


def constant_time(row: Call, _: Sequence[Call]) -> Iterator[tuple[Tensor, str]]:
    """Right, but for a temporal row that stands still over each clip, at any value."""
    clips = [
        (places, span)
        for places, span in row.spans()
        if row.types[0, places[0]] == VIDEO or len(span.coordinates[0].unique()) > 1
    ]
    # where every frame is an image of its own, it stands still by right
    is_moving = len(row.scheme.spans(VIDEO, 2, 1, 1, None)) == 1
    if row.expected is None or not clips or not is_moving:
        return
    for is_moved in (False, True):
        ids = row.expected[:, 0].to(row.seen.dtype, copy=True)
        for places, span in clips:
            start = ids[1, places[0]] - span.coordinates[1, 0]
            ids[0, places] = row.seen[0, 0, places[0]]
            if is_moved:  # what follows goes on behind the largest of the ids as they now are
                ids[:, places[-1] + 1 :] += ids[:, places].max() + 1 - (start + span.advance)
        values = sorted({f"{ids[0, places[0]].item():g}" for places, _ in clips}, key=float)
        yield ids, f"right, but for the temporal row, constant over each clip ({', '.join(values)})"


def transposed(row: Call, _: Sequence[Call]) -> Iterator[tuple[Tensor, str]]:
    """The ids of grids with height and width exchanged, or the right ids with those two rows so."""
    yield from _permuted(row, [(0, 2, 1)])


def swapped_time(row: Call, _: Sequence[Call]) -> Iterator[tuple[Tensor, str]]:
    """The ids of grids whose time stands in another place, or the right ids with such rows."""
    yield from _permuted(row, [order for order in permutations(range(3)) if order[0] != 0])


def other_scheme(row: Call, _: Sequence[Call]) -> Iterator[tuple[Tensor, str]]:
    """The ids of another scheme, of the other rule for text behind a clip, or of lost seconds."""
    others = list(SCHEMES.items())
    if isinstance(row.scheme, Qwen2VL):
        other = replace(row.scheme, behind_time=not row.scheme.behind_time)
        others.append((_name(other), other))
    for name, scheme in others:
        ids = replace(row, scheme=scheme).expected
        if ids is not None:
            yield ids[:, 0], f"those of {name}"
    if row.seconds is None:
        return
    lost = {
        "without second_per_grid_ts": None,
        # get_rope_index of Qwen2.5-VL in transformers 5.17 and before did this
        "with second_per_grid_ts cut to whole seconds": [float(int(time)) for time in row.seconds],
    }
    for name, scheme in [(_name(row.scheme), row.scheme), *others]:
        for what, seconds in lost.items():
            ids = replace(row, scheme=scheme, second_per_grid_ts=seconds).expected
            if ids is not None:
                yield ids[:, 0], f"those of {name} {what}"


def _counts(row: Call) -> list[tuple[int, Tensor]]:
    """Ids `[3, L]` of one step a token, padding counted or not, that start where those seen do."""
    real = row.real[0]
    first = int(real.nonzero()[0])
    if not row.seen[0, 0, first].isfinite():
        return []
    num_real, length = (0, 0) if row.past is None else (int(row.past.num_real), row.past.length)
    counts = []
    for plain in (num_real + real.cumsum(0) - 1, length + torch.arange(len(real))):
        start = int(row.seen[0, 0, first] - plain[first])
        counts.append((start, (plain + start).expand(3, -1)))
    return sorted(counts, key=lambda count: abs(count[0]))


def _origin(delta: int, row: Call, earlier: Sequence[Call]) -> str | None:
    """Which call before this one has this rope delta."""
    for number in reversed(range(len(earlier))):
        if delta in earlier[number].deltas:
            return f"call {number}, row {earlier[number].deltas.index(delta)}"
    if row.rope_deltas is not None and (row.rope_deltas == delta).any():
        return "an earlier call, kept by the model"
    return None


def _permuted(row: Call, orders: list[tuple[int, ...]]) -> Iterator[tuple[Tensor, str]]:
    """Ids of the row's grids with sides in other orders, of merged tokens or of patches."""
    given = {"image": row.image_grid_thw, "video": row.video_grid_thw}
    grids = {kind: grid_thw for kind, grid_thw in given.items() if grid_thw is not None}
    kinds = [kind for kind, grid_thw in grids.items() if len(grid_thw)]
    choices = [kinds, *([kind] for kind in kinds)] if len(kinds) > 1 else [kinds] * len(kinds)
    units = {"": row.spatial_merge_size, " in patches": 1}
    for order, (unit, merge), chosen in product(orders, units.items(), choices):
        merged = torch.tensor([1, merge, merge])
        changed = {
            f"{kind}_grid_thw": (grids[kind] // merged)[:, list(order)] * merged for kind in chosen
        }
        ids = replace(row, **changed).expected
        if ids is not None:
            sides = " ".join("THW"[side] for side in order)
            what = f"those of {' and '.join(chosen)} grids with sides {sides} for T H W{unit}"
            yield ids[:, 0], what
    if row.expected is None:
        return
    for order in orders:
        axes = ", ".join(_AXES[axis] for axis in order)
        what = f"the right ones with their rows exchanged: {axes} for {', '.join(_AXES)}"
        yield row.expected[list(order), 0], what


def _padding_before(row: Call, past: Past) -> Iterator[tuple[Tensor, str]]:
    """The right ids of a step, moved by the padding before it."""
    num_padding = past.length - int(past.num_real)
    if row.expected is not None and num_padding:
        for sign, how in ((1, "counted"), (-1, "left out, while the cache has it counted")):
            yield row.expected[:, 0] + sign * num_padding, f"those with the padding before it {how}"


def _name(scheme: Scheme) -> str:
    return next((name for name, known in SCHEMES.items() if known == scheme), str(scheme))
