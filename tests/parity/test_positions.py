"""Packed position ids equal `Qwen2VLModel.get_rope_index` of each row, and the published rule."""

import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_position_ids

from colfolio.batch import offsets_of
from colfolio.models.vision_positions import vision_position_ids
from colfolio.mrope import IMAGE, TEXT, VIDEO, position_ids

MERGE = 2
sides = st.integers(1, 5)
images = st.tuples(st.just(IMAGE), st.tuples(st.just(1), sides, sides))
videos = st.tuples(st.just(VIDEO), st.tuples(st.integers(1, 8), sides, sides))
# text, then any number of images or clips, each with text behind it
rows = st.tuples(
    st.integers(1, 4), st.lists(st.tuples(images | videos, st.integers(1, 3)), max_size=3)
)
batches = st.lists(rows, min_size=1, max_size=5)


def token_types(row):
    before, visuals = row
    types = [TEXT] * before
    for (kind, grid), after in visuals:
        types += [kind] * (grid[0] * grid[1] * grid[2]) + [TEXT] * after
    return types


def grids_of(row, kinds=(IMAGE, VIDEO)):
    grids = [(t, MERGE * h, MERGE * w) for (kind, (t, h, w)), _ in row[1] if kind in kinds]
    return torch.tensor(grids, dtype=torch.int64).reshape(-1, 3)


def packed_positions(batch):
    types = [token_types(row) for row in batch]
    return position_ids(
        torch.tensor([kind for row in types for kind in row]),
        offsets_of([len(row) for row in types]),
        torch.cat([grids_of(row) for row in batch]),
        MERGE,
    )


def rule_of_the_paper(row):
    """Qwen2-VL, section 2.1: what follows starts at one more than the largest position so far."""
    positions = [(place,) * 3 for place in range(row[0])]
    for (_, (frames, height, width)), after in row[1]:
        start = max(map(max, positions)) + 1
        positions += [
            (start + t, start + h, start + w)
            for t in range(frames)
            for h in range(height)
            for w in range(width)
        ]
        start = max(map(max, positions)) + 1
        positions += [(start + place,) * 3 for place in range(after)]
    return torch.tensor(positions).T


@given(batch=batches)
@example(batch=[(1, [])])
@example(batch=[(1, []), (2, [((IMAGE, (1, 1, 1)), 1)]), (1, [])])
def test_packed_positions_equal_get_rope_index_of_each_row(shared_retriever, batch):
    # since 5.x the library goes on behind the longer SIDE of a clip, so that the text behind a clip
    # of more times than that repeats positions; the next test holds those to the paper
    for _, visuals in batch:
        assume(all(t <= max(h, w) for (_, (t, h, w)), _ in visuals))
    theirs = []
    for row in batch:
        types = torch.tensor([token_types(row)])
        positions, _ = shared_retriever.backbone.get_rope_index(
            torch.zeros_like(types), types, grids_of(row, (IMAGE,)), grids_of(row, (VIDEO,))
        )
        theirs.append(positions[:, 0])
    assert torch.equal(packed_positions(batch), torch.cat(theirs, dim=1))


@given(batch=batches)
@example(batch=[(1, [((VIDEO, (8, 1, 1)), 2)])])
def test_packed_positions_follow_the_rule_of_the_paper_for_clips_of_any_length(batch):
    plain = torch.cat([rule_of_the_paper(row) for row in batch], dim=1)
    assert torch.equal(packed_positions(batch), plain)


@given(st.lists(st.tuples(st.integers(1, 3), sides, sides), min_size=1, max_size=4))
def test_positions_inside_the_vision_tower_equal_the_library(grids):
    grid_thw = torch.tensor([(t, MERGE * h, MERGE * w) for t, h, w in grids])
    assert torch.equal(
        vision_position_ids(grid_thw, MERGE), get_vision_position_ids(grid_thw, MERGE)
    )
