"""Verdicts on position ids made by hand: right ones pass, and each recipe names its own fault."""

from dataclasses import replace

import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from colfolio.mrope.calls import Call
from colfolio.mrope.faults import FAULTS, Finding, Verdict, judge
from colfolio.mrope.positions import padded_position_ids
from colfolio.mrope.schemes import IMAGE, SCHEMES, TEXT, VIDEO, Qwen2_5VL, VideoRoPE

MERGE = 2
NAMES = [fault.name for fault in FAULTS]

sides = st.integers(1, 4)
images = st.tuples(st.just(IMAGE), st.just(1), sides, sides)
clips = st.tuples(st.just(VIDEO), st.integers(1, 5), sides, sides)
rows = st.tuples(
    st.integers(0, 4), st.lists(st.tuples(images | clips, st.integers(1, 3)), max_size=3)
)
batches = st.tuples(
    st.lists(rows.filter(lambda row: row[0] + len(row[1])), min_size=1, max_size=4),
    st.sampled_from(["left", "right"]),
    st.sampled_from(list(SCHEMES)),
)


def call_of(batch):
    """A right call of rows, a side of padding, and the name of a scheme."""
    types, grids, (parts, pad, scheme) = [], {IMAGE: [], VIDEO: []}, batch
    for before, visuals in parts:
        types.append([TEXT] * before)
        for (kind, frames, height, width), after in visuals:
            grids[kind].append((frames, MERGE * height, MERGE * width))
            # text between frames does no harm to schemes that do without
            frame = [kind] * (height * width) + [TEXT] * (scheme == "qwen3_vl")
            types[-1] += frame * frames + [TEXT] * after
    longest = max(map(len, types))
    masks = [[1] * len(row) for row in types]
    for row in (*types, *masks):
        padding = [0] * (longest - len(row))
        row[:] = padding + row if pad == "left" else row + padding
    images, clips = (torch.tensor(grids[kind]).reshape(-1, 3).long() for kind in (IMAGE, VIDEO))
    seconds = [1.25 + 0.75 * number for number in range(len(clips))]
    call = Call(
        seen=torch.zeros(3, len(types), longest).long(),
        token_types=torch.tensor(types),
        scheme=SCHEMES[scheme],
        attention_mask=torch.tensor(masks),
        image_grid_thw=images if len(images) else None,
        video_grid_thw=clips if len(clips) else None,
        second_per_grid_ts=seconds if clips.numel() else None,
    )
    return replace(call, seen=call.expected)


def one_row(*visuals, scheme="qwen2_vl"):
    return call_of(([(2, [(visual, 2) for visual in visuals])], "right", scheme))


@given(batches)
@settings(max_examples=200)
def test_right_ids_are_never_named(batch):
    call = call_of(batch)
    earlier = [replace(call, seen=torch.flip(call.seen, [2])), call]
    verdict = judge(call, earlier)
    assert verdict == Verdict((), call.seen.shape[1])
    assert verdict.is_right


@given(batches)
@settings(max_examples=200)
def test_each_row_by_itself_has_the_same_expected_ids(batch):
    call = call_of(batch)
    alone = [row.expected for row in call.rows()]
    assert torch.equal(torch.cat(alone, dim=1), call.expected)
    assert torch.equal(torch.cat([row.seen for row in call.rows()], dim=1), call.seen)


@given(batches, st.tuples(*[st.integers(-9, 9)] * 3).filter(any))
def test_a_constant_on_an_axis_of_all_tokens_is_harmless(batch, shift):
    call = call_of(batch)
    verdict = judge(replace(call, seen=call.seen + torch.tensor(shift)[:, None, None]))
    assert len(verdict.findings) == verdict.num_rows
    assert all(finding.harmless for finding in verdict.findings)
    assert verdict.faults <= {"shifted", "padding"}
    assert verdict.is_right


@given(batches, st.randoms(use_true_random=False))
def test_one_wrong_id_is_never_right_or_harmless(batch, random):
    call = call_of(batch)
    long_rows = [row for row, real in enumerate(call.real) if real.sum() > 1]
    assume(long_rows)
    row = random.choice(long_rows)
    token = random.choice(call.real[row].nonzero()[:, 0].tolist())
    seen = call.seen.clone()
    seen[random.randrange(3), row, token] += random.choice([-3, -1, 1, 50])
    verdict = judge(replace(call, seen=seen))
    assert [finding.row for finding in verdict.findings] == [row]
    assert not verdict.is_right
    assert f"token {token} " in verdict.findings[0].evidence


def flat_ids(call):
    return torch.arange(call.seen.shape[2]).expand_as(call.seen)


def other_grids(order, name=None):
    """Ids of the call's grids with their merged sides in another order."""

    def made(call):
        unit = torch.tensor([1, MERGE, MERGE])
        changed = {
            key: (grid // unit)[:, order] * unit
            for key, grid in (
                ("image_grid_thw", call.image_grid_thw),
                ("video_grid_thw", call.video_grid_thw),
            )
            if grid is not None and name in {None, key}
        }
        return replace(call, **changed).expected

    return made


def other_end(call):
    """Each row's right ids at the other end, zeros where they were."""
    seen = torch.zeros_like(call.seen)
    for row, real in enumerate(call.real):
        ids = call.expected[:, row, real]
        at = slice(None, int(real.sum())) if not real[0] else slice(len(real) - ids.shape[1], None)
        seen[:, row, at] = ids
    return seen


def still_time(call):
    seen = call.seen.clone()
    seen[0] = torch.where(call.types == VIDEO, 77, seen[0])
    return seen


PLANTED = {
    "flattened": flat_ids,
    "padding": other_end,
    "constant_time": still_time,
    "transposed": other_grids([0, 2, 1]),
    "swapped_time": other_grids([1, 0, 2]),
    "other_scheme": lambda call: replace(call, scheme=VideoRoPE()).expected,
}
EXCHANGED = [
    ("transposed", [0, 2, 1]),
    ("swapped_time", [1, 0, 2]),
    ("swapped_time", [2, 1, 0]),
    ("swapped_time", [1, 2, 0]),
]


@given(batches, st.sampled_from(EXCHANGED))
def test_rows_of_right_ids_that_are_exchanged_are_never_unexplained(batch, exchanged):
    call, (fault, order) = call_of(batch), exchanged
    verdict = judge(replace(call, seen=call.seen[order]))
    for finding in verdict.findings:
        if not finding.harmless:
            assert NAMES.index(finding.fault) <= NAMES.index(fault), finding


@pytest.mark.parametrize(("fault", "order"), EXCHANGED)
def test_rows_of_right_ids_that_are_exchanged_are_named(fault, order):
    call = one_row((IMAGE, 1, 2, 3), (VIDEO, 3, 4, 2))
    verdict = judge(replace(call, seen=call.seen[order]))
    assert verdict.faults == {fault}
    axes = ", ".join(("temporal", "height", "width")[axis] for axis in order)
    assert f"the right ones with their rows exchanged: {axes} for temporal" in str(verdict)


@given(batch=batches)
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named_or_one_that_gives_the_same_ids(fault, batch):
    parts, pad, scheme = batch
    assume(fault not in {"constant_time", "swapped_time"} or scheme != "qwen3_vl")
    call = call_of((parts, pad, scheme))
    seen = PLANTED[fault](call)
    assume(seen is not None)
    verdict = judge(replace(call, seen=seen))
    difference = (seen - call.expected).masked_fill(~call.real, 0)
    first = call.real.int().argmax(dim=1)  # [rows]
    rows = torch.arange(len(first))
    moved = (difference != difference[:, rows, first][:, :, None]) & call.real
    assert verdict.is_right == (not moved.any())
    for finding in verdict.findings:
        if not finding.harmless:
            assert NAMES.index(finding.fault) <= NAMES.index(fault), finding


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("fault", PLANTED)
def test_a_planted_fault_is_named(fault, pad):
    clip = (VIDEO, 3, 4, 2)
    parts = [(3, [((IMAGE, 1, 2, 3), 2), (clip, 3)]), (2, [((IMAGE, 1, 2, 4), 1), (clip, 1)])]
    call = call_of((parts, pad, "qwen2_vl"))
    verdict = judge(replace(call, seen=PLANTED[fault](call)))
    assert verdict.faults == {fault}
    assert not verdict.is_right


@pytest.mark.parametrize("name", ["image_grid_thw", "video_grid_thw"])
def test_grids_of_one_kind_alone_can_be_transposed(name):
    call = one_row((IMAGE, 1, 2, 3), (VIDEO, 2, 3, 2), (IMAGE, 1, 4, 1))
    verdict = judge(replace(call, seen=other_grids([0, 2, 1], name)(call)))
    assert verdict.faults == {"transposed"}
    assert name.removesuffix("_grid_thw") in verdict.findings[0].evidence


def test_text_that_follows_a_clip_without_time_may_go_on_behind_its_ids():
    call = one_row((VIDEO, 3, 2, 2), (IMAGE, 2, 1, 1), scheme="qwen2_vl_published")
    stuck, later = call.seen.clone(), call.types[0].argmax()
    stuck[0, 0, later : later + 12] = 20
    stuck[:, 0, later + 12 :] += 21 - (2 + 3)
    assert judge(replace(call, seen=stuck)).findings[0].fault == "unexplained"  # its second moves
    second = later + 14
    stuck[0, 0, second : second + 2] = 40
    stuck[:, 0, second + 2 :] = torch.tensor([41, 42])
    assert judge(replace(call, seen=stuck)).faults == {"constant_time"}


def test_a_frame_of_its_own_has_no_time_to_stand_still():
    call = one_row((VIDEO, 2, 2, 2), scheme="qwen3_vl")
    assert judge(replace(call, seen=still_time(call))).faults == {"unexplained"}


def test_a_clip_of_one_frame_that_is_all_shifted_is_just_that():
    call = call_of(([(0, [((VIDEO, 1, 2, 2), 0)])], "right", "qwen2_vl"))
    verdict = judge(replace(call, seen=still_time(call)))
    assert verdict.faults == {"shifted"}
    assert verdict.is_right


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("fill", [0, 1, "counted"])
def test_ids_for_padding_on_the_other_side_are_known_whatever_stands_at_padding(pad, fill):
    call = call_of(([(2, [((IMAGE, 1, 2, 3), 2)]), (1, [((IMAGE, 1, 2, 2), 2)])], pad, "qwen2_vl"))
    types, num_padding = call.types[1, call.real[1]], int((~call.real[1]).sum())
    if fill == "counted":
        padding = torch.zeros(num_padding).long()
        moved = [types, padding] if pad == "left" else [padding, types]
        laid = padded_position_ids(
            torch.cat(moved)[None], image_grid_thw=call.image_grid_thw[1:]
        ).squeeze(1)
    else:
        ids, filled = call.seen[:, 1, call.real[1]], torch.full((3, num_padding), fill)
        laid = torch.cat([ids, filled] if pad == "left" else [filled, ids], dim=1)
    verdict = judge(replace(call, seen=torch.stack([call.seen[:, 0], laid], dim=1)))
    assert [(finding.row, finding.fault) for finding in verdict.findings] == [(1, "padding")]
    assert not verdict.is_right


@pytest.mark.parametrize(
    ("scheme", "other", "told"),
    [
        ("qwen2_vl", "qwen2_vl_published", "those of qwen2_vl_published"),
        ("qwen2_vl_published", "qwen2_vl", "those of qwen2_vl"),
        ("qwen2_vl", "videorope", "those of videorope"),
        ("qwen2_5_vl", "qwen2_vl", "those of qwen2_vl"),
    ],
)
def test_ids_of_another_scheme_say_which(scheme, other, told):
    call = one_row((VIDEO, 5, 2, 2), scheme=scheme)
    verdict = judge(replace(call, seen=replace(call, scheme=SCHEMES[other]).expected))
    assert verdict.faults == {"other_scheme"}
    assert verdict.findings[0].evidence.endswith(told)


def test_the_other_rule_behind_clips_is_told_with_its_settings():
    call = replace(one_row((VIDEO, 5, 2, 2)), scheme=Qwen2_5VL(tokens_per_second=3))
    published = Qwen2_5VL(tokens_per_second=3, behind_time=True)
    verdict = judge(replace(call, seen=replace(call, scheme=published).expected))
    assert "behind_time=True, tokens_per_second=3" in str(verdict)


def test_the_same_deltas_or_ids_without_an_earlier_call_are_not_stale():
    before, call = one_row((IMAGE, 1, 3, 3)), one_row((IMAGE, 1, 2, 3))
    shifted = replace(call, seen=flat_ids(call) - 6)
    assert judge(shifted).faults == {"flattened"}
    assert judge(shifted, [before]).faults == {"stale"}
    kept = replace(shifted, rope_deltas=torch.tensor([[-6]]))
    assert judge(kept).faults == {"stale"}
    assert "kept by the model" in str(judge(kept))


def test_ids_of_an_earlier_call_are_stale_only_if_they_were_right_there():
    before, call = one_row((IMAGE, 1, 1, 6)), one_row((IMAGE, 1, 2, 3))
    wrong = call.seen.clone()
    wrong[1, 0, 5] += 9
    assert judge(replace(call, seen=before.seen), [before]).faults == {"stale"}
    repeated = [replace(before, seen=wrong), replace(call, seen=wrong)]
    assert judge(replace(call, seen=wrong), repeated).faults == {"unexplained"}


def test_a_delta_of_zero_is_no_evidence_of_an_earlier_call():
    call = one_row((IMAGE, 1, 2, 2))
    flat = replace(call, seen=flat_ids(call), rope_deltas=torch.zeros(1, 1))
    assert judge(flat, [one_row()]).faults == {"flattened"}
    text = call_of(([(1, []), (4, [])], "left", "qwen2_vl"))
    counted = replace(text, seen=flat_ids(text), rope_deltas=torch.zeros(1, 1))
    assert judge(counted, [text]).faults == {"padding"}


@given(batches, st.integers(1, 3), st.integers(0, 2))
def test_text_behind_any_call_goes_on_one_behind_its_largest_id(batch, length, since):
    call = call_of(batch)
    num_rows, own = call.seen.shape[1:]
    past = call.followed(own + since, None)
    largest = torch.stack([call.seen[:, row, call.real[row]].max() for row in range(num_rows)])
    right = (largest + 1 + since)[:, None] + torch.arange(length)  # [B, length]
    step = replace(
        call,
        seen=right.expand(3, -1, -1),
        token_types=torch.zeros_like(right),
        attention_mask=None,
        past=past,
        is_step=True,
    )
    assert judge(step, [call]) == Verdict((), num_rows)
    wrong = judge(replace(step, seen=step.seen + 1000), [call])
    assert not wrong.is_right
    assert wrong.faults == {"unexplained"}
    assert len(wrong.findings) == num_rows


def test_padding_between_tokens_is_left_out_too():
    call = one_row((IMAGE, 1, 2, 2))
    mask = torch.ones(1, 8).long()
    mask[0, 1] = 0
    gap = replace(call, attention_mask=mask)
    right = padded_position_ids(call.types, mask, call.image_grid_thw)
    assert judge(replace(gap, seen=right)).is_right
    assert judge(replace(gap, seen=call.seen)).faults == {"padding"}
    counted = (mask.cumsum(1) - 1).expand(3, 1, 8)
    assert judge(replace(gap, seen=counted)).faults == {"flattened"}


def test_a_row_of_padding_alone_is_passed_over():
    call = call_of(([(3, []), (2, [])], "right", "qwen2_vl"))
    call.attention_mask[1] = 0
    assert judge(replace(call, seen=call.seen + 0)).is_right


@example(seen=torch.tensor([0.0, 1.0, 2.5]))
@example(seen=torch.tensor([0.0, float("nan"), 2.0]))
@example(seen=torch.tensor([float("nan")] * 3))
@example(seen=torch.tensor([float("inf"), 1.0, 2.0]))
@given(seen=st.just(torch.tensor([0.5, 1.0, 2.0])))
def test_ids_that_are_no_whole_numbers_are_told_as_they_are(seen):
    call = call_of(([(3, [])], "right", "qwen2_vl"))
    verdict = judge(replace(call, seen=seen.expand(3, 1, 3)))
    assert verdict.faults == {"unexplained"}
    assert any(f"{value:g}" in str(verdict) for value in seen.tolist())


def test_a_misfit_row_that_is_flattened_is_named_so_and_text_beside_it_is_right():
    call = call_of(([(2, [((IMAGE, 1, 2, 3), 2)]), (4, [])], "right", "qwen2_vl"))
    lying = replace(call, image_grid_thw=torch.tensor([[1, 4, 4]]))
    verdict = judge(replace(lying, seen=flat_ids(call)))
    assert [(finding.row, finding.fault) for finding in verdict.findings] == [(0, "flattened")]
    misfit = judge(lying)
    assert misfit.findings == (Finding(None, "misfit", False, lying.misfit),)
    assert "needs 4 placeholder tokens" in str(misfit) or "belongs to no grid" in str(misfit)


def test_a_grid_without_any_placeholder_is_a_misfit():
    call = replace(one_row(), image_grid_thw=torch.tensor([[1, 4, 4]]))
    assert judge(call).faults == {"misfit"}
    assert "left over" in str(judge(call))


def test_placeholders_without_grids_are_not_judged_unless_flattened():
    call = replace(one_row((IMAGE, 1, 2, 3)), image_grid_thw=None)
    verdict = judge(call)
    assert not verdict.is_right
    assert "image_grid_thw" in verdict.unjudged
    assert judge(replace(call, seen=flat_ids(call))).faults == {"flattened"}


def test_a_visual_token_by_itself_is_not_called_flattened():
    call = replace(one_row((IMAGE, 1, 1, 1)), image_grid_thw=None)
    assert "image_grid_thw" in judge(call).unjudged


def test_what_does_not_fit_the_ids_seen_is_not_judged():
    call = one_row((IMAGE, 1, 2, 3))
    for changed in (
        {"token_types": torch.zeros(1, 3).long()},
        {"attention_mask": torch.ones(2, 10)},
        {"token_types": None},
        {"unjudged": "a reason"},
    ):
        verdict = judge(replace(call, **changed))
        assert verdict.unjudged
        assert not verdict.is_right
        assert str(verdict) == f"Positions not judged: {verdict.unjudged}."


def test_every_fault_has_a_sentence_of_cause_and_of_mend():
    assert len(set(NAMES)) == len(NAMES)
    for fault in FAULTS:
        for sentence in (fault.cause, fault.mend):
            assert sentence
            assert not sentence.endswith(".")
            assert "\n" not in sentence


def test_a_verdict_names_all_rows_of_a_fault_and_the_harmful_first():
    call = call_of(
        (
            [(1, []), (2, [((IMAGE, 1, 2, 3), 2)]), (2, [((IMAGE, 1, 2, 2), 1)])],
            "left",
            "qwen2_vl",
        )
    )
    said = str(judge(replace(call, seen=flat_ids(call))))
    assert said.startswith("Positions are wrong in 2 of 3 rows. flattened (rows 1, 2): ")
    assert "padding (row 0), harmless" in said
    assert said.index("flattened") < said.index("harmless")
    assert "\n" not in said
