"""Positions equal `get_rope_index` of `transformers` on thousands of batches, and published rules.

A row is text, then images and clips with text behind each. The plain rules here place one token at
a time.
"""

from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import prod
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLModel, Qwen2VLModel, Qwen3VLModel
from transformers.vision_utils import get_vision_position_ids

from colfolio.batch import offsets_of
from colfolio.models.vision_positions import vision_position_ids
from colfolio.mrope import (
    IMAGE,
    TEXT,
    VIDEO,
    Qwen2_5VL,
    Qwen2VL,
    Qwen3VL,
    VideoRoPE,
    padded_position_ids,
    position_ids,
)

MERGE = 2
LIBRARY = {"qwen2_vl": Qwen2VLModel, "qwen2_5_vl": Qwen2_5_VLModel, "qwen3_vl": Qwen3VLModel}


class Visual(NamedTuple):
    kind: int
    sides: tuple  # frames, height and width in merged tokens
    seconds: float | Fraction
    gap: int  # text tokens behind it


class Row(NamedTuple):
    before: int
    visuals: list


class Border(NamedTuple):
    """How a batch is handed over."""

    side: str
    extra: int
    under: int
    types: torch.dtype
    mask: torch.dtype
    is_masked: bool


def runs(row, by_frame):
    """Kind, sides and seconds of each run of tokens; with `by_frame` text stands between frames."""
    found = [(TEXT, (row.before, 1, 1), None)]
    for kind, (frames, height, width), seconds, gap in row.visuals:
        text = (TEXT, (gap, 1, 1), None)
        if by_frame and kind == VIDEO:
            between = (TEXT, (max(gap, 1), 1, 1), None)
            found += [(kind, (1, height, width), seconds), between] * (frames - 1)
            found += [(kind, (1, height, width), seconds), text]
        else:
            found += [(kind, (frames, height, width), seconds), text]
    return found


def token_types(row, by_frame=False):
    return [kind for kind, sides, _ in runs(row, by_frame) for _ in range(prod(sides))]


def grids_of(batch, kind, merge=MERGE):
    found = [visual.sides for row in batch for visual in row.visuals if visual.kind == kind]
    return torch.tensor([(t, merge * h, merge * w) for t, h, w in found]).reshape(-1, 3).long()


def seconds_of(batch):
    return [visual.seconds for row in batch for visual in row.visuals if visual.kind == VIDEO]


def spelt_out(row):
    """The row with text where the library needs it: it tells visuals apart by a change of type."""
    last = Visual(TEXT, (), 0.0, 0)
    visuals = [
        visual._replace(gap=max(visual.gap, 1)) if visual.kind == behind.kind else visual
        for visual, behind in pairwise([*row.visuals, last])
    ]
    return Row(row.before if visuals else max(row.before, 1), visuals)


def padded(rows, border):
    """Token types and mask of rows laid at the left, at the right or in the middle."""
    length = max(map(len, rows)) + border.extra
    types = torch.full((len(rows), length), border.under, dtype=border.types)
    mask = torch.zeros(len(rows), length, dtype=border.mask)
    for number, row in enumerate(rows):
        room = length - len(row)
        begin = {"left": room, "right": 0, "both": room // 2}[border.side]
        types[number, begin : begin + len(row)] = torch.tensor(row, dtype=border.types)
        mask[number, begin : begin + len(row)] = 1
    return types, mask


@cache
def library(name, merge, tokens_per_second):
    """The model of a family without weights, which `get_rope_index` does not read."""
    model = LIBRARY[name].__new__(LIBRARY[name])
    torch.nn.Module.__init__(model)
    vision = SimpleNamespace(spatial_merge_size=merge, tokens_per_second=tokens_per_second)
    model.config = SimpleNamespace(vision_config=vision)
    return model


def packed_positions(batch, scheme, by_frame=False, seconds=None, merge=MERGE):
    types = [token_types(row, by_frame) for row in batch]
    return position_ids(
        torch.tensor([kind for row in types for kind in row], dtype=torch.int64),
        offsets_of([len(row) for row in types]),
        grids_of(batch, IMAGE, merge),
        grids_of(batch, VIDEO, merge),
        scheme,
        merge,
        seconds,
    )


sides = st.integers(1, 4)
grids = st.tuples(st.integers(1, 6), sides, sides)
images = grids.map(lambda grid: (IMAGE, (1, *grid[1:])))
clips = grids.map(lambda grid: (VIDEO, grid))


def rows_of(seconds):
    visuals = st.builds(
        lambda visual, seconds, gap: Visual(*visual, seconds, gap),
        *(images | clips, seconds, st.integers(0, 2)),
    )
    return st.builds(Row, st.integers(0, 3), st.lists(visuals, max_size=3))


batches = st.lists(
    rows_of(st.sampled_from([0.5, 1.0]) | st.floats(0, 5, width=32)).map(spelt_out),
    min_size=1,
    max_size=3,
)
integers = st.sampled_from([torch.int32, torch.int64])
borders = st.builds(
    Border,
    *(st.sampled_from(["left", "right", "both"]), st.integers(0, 2)),
    *(st.sampled_from([TEXT, IMAGE, VIDEO]), integers, integers | st.just(torch.bool)),
    st.booleans(),
)
clocks = st.tuples(st.sampled_from([1, 2, 4, 25, 2.5]), st.sampled_from(["none", "list", "tensor"]))
# eighths of a second, so that no rounding of a time has two answers
exact_batches = st.lists(
    rows_of(st.integers(0, 24).map(lambda n: Fraction(n, 8))), min_size=1, max_size=4
)
ONE_TOKEN = [Row(1, [])]
CLIP = Visual(VIDEO, (6, 2, 1), 0.5, 1)
LEFT = Border("left", 1, TEXT, torch.int64, torch.int64, True)


@pytest.mark.parametrize("name", LIBRARY)
@settings(max_examples=2000, deadline=None)
@given(batch=batches, border=borders, clock=clocks, merge=st.integers(1, 3))
@example(batch=ONE_TOKEN, border=LEFT, clock=(2, "none"), merge=2)
@example(batch=[Row(1, []), Row(2, [CLIP, CLIP])], border=LEFT, clock=(2, "tensor"), merge=2)
def test_positions_equal_the_library(name, batch, border, clock, merge):
    by_frame, (tokens_per_second, given_as) = name == "qwen3_vl", clock
    types, mask = padded([token_types(row, by_frame) for row in batch], border)
    if mask.bool().all() and not border.is_masked:
        mask = None
    visual = {kind: grids_of(batch, kind, merge) for kind in (IMAGE, VIDEO)}
    visual = {kind: grids if len(grids) else None for kind, grids in visual.items()}
    time, scheme = {}, name
    if name == "qwen2_5_vl":
        scheme = Qwen2_5VL(tokens_per_second=tokens_per_second)
        if given_as != "none" and visual[VIDEO] is not None:
            seconds = seconds_of(batch)
            seconds = torch.tensor(seconds) if given_as == "tensor" else seconds
            time = {"second_per_grid_ts": seconds}
    theirs, _ = library(name, merge, tokens_per_second).get_rope_index(
        *(torch.zeros_like(types).long(), types, visual[IMAGE], visual[VIDEO]),
        attention_mask=mask,
        **time,
    )
    ours = padded_position_ids(
        types, mask, visual[IMAGE], visual[VIDEO], scheme, merge, time.get("second_per_grid_ts")
    )
    assert ours.dtype == torch.int64
    assert torch.equal(ours, theirs)
    real = torch.ones_like(types).bool() if mask is None else mask.bool()
    packed = packed_positions(batch, scheme, by_frame, time.get("second_per_grid_ts"), merge)
    assert torch.equal(packed, theirs[:, real])


class Rule(NamedTuple):
    """A scheme, where it puts token `(t, h, w)` of a grid behind its start, and how far text moves.

    Args:
        token: of time, row, column, sides and seconds.
        advance: of the positions of a grid's tokens, in order, and of its sides.
    """

    scheme: object
    token: object
    advance: object


def behind_all(positions, sides):
    """The paper of Qwen2-VL, section 2.1: one more than the largest position so far."""
    return max(map(max, positions)) + 1


def behind_longer_side(positions, sides):
    return max(sides[1:])


def behind_last_step(positions, sides):
    return positions[-1][0] + 1


def whole(time, row, column, sides, seconds):
    return time, row, column


def by_the_second(time, row, column, sides, seconds):
    return int(4 * seconds * time), row, column


def on_the_diagonal(time, row, column, sides, seconds):
    _, height, width = sides
    return 3 * time, 3 * time + row - (height - 1) // 2, 3 * time + column - (width - 1) // 2


RULES = {
    "qwen2_vl": Rule(Qwen2VL(), whole, behind_longer_side),
    "qwen2_vl_published": Rule("qwen2_vl_published", whole, behind_all),
    "qwen2_5_vl": Rule(Qwen2_5VL(tokens_per_second=4), by_the_second, behind_longer_side),
    "qwen2_5_vl_published": Rule(
        Qwen2_5VL(behind_time=True, tokens_per_second=4), by_the_second, behind_all
    ),
    "qwen3_vl": Rule(Qwen3VL(), whole, behind_longer_side),
    "videorope": Rule(VideoRoPE(temporal_spacing=3), on_the_diagonal, behind_last_step),
}


def placed(row, rule, by_frame):
    """Positions of a row, one token after the other."""
    positions, start = [], 0
    for kind, run, seconds in runs(row, by_frame):
        if kind == TEXT:
            positions += [(start + place,) * 3 for place in range(run[0])]
            start += run[0]
            continue
        frames, height, width = run
        relative = [
            # an image has no time between steps to spread over
            rule.token(t, h, w, run, Fraction(1) if kind == IMAGE else seconds)
            for t in range(frames)
            for h in range(height)
            for w in range(width)
        ]
        positions += [tuple(start + axis for axis in token) for token in relative]
        start += rule.advance(relative, run)
    return torch.tensor(positions).reshape(-1, 3).T


# visuals stand beside one another here without text between, which the library cannot tell apart
@pytest.mark.parametrize("name", RULES)
@given(batch=exact_batches)
@example(batch=[Row(1, [Visual(VIDEO, (6, 1, 1), Fraction(1), 2)])])
@example(batch=[Row(0, [Visual(IMAGE, (1, 2, 3), Fraction(1), 0)] * 3), Row(0, []), Row(1, [])])
def test_positions_follow_the_plain_rule_of_each_scheme(name, batch):
    rule, by_frame = RULES[name], name == "qwen3_vl"
    seconds = None
    if name.startswith("qwen2_5"):
        seconds = [float(time) for time in seconds_of(batch)]
    plain = torch.cat([placed(row, rule, by_frame) for row in batch], dim=1)
    assert torch.equal(packed_positions(batch, rule.scheme, by_frame, seconds), plain)


@pytest.mark.parametrize("name", RULES)
@given(batch=exact_batches)
def test_rows_do_not_see_each_other(name, batch):
    scheme, by_frame = RULES[name].scheme, name == "qwen3_vl"
    alone = [packed_positions([row], scheme, by_frame) for row in batch]
    assert torch.equal(packed_positions(batch, scheme, by_frame), torch.cat(alone, dim=1))


@given(st.lists(st.tuples(st.integers(1, 3), sides, sides), min_size=1, max_size=4))
def test_positions_inside_the_vision_tower_equal_the_library(grids):
    grid_thw = torch.tensor([(t, MERGE * h, MERGE * w) for t, h, w in grids])
    assert torch.equal(
        vision_position_ids(grid_thw, MERGE), get_vision_position_ids(grid_thw, MERGE)
    )
