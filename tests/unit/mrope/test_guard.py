"""The guard on real models: right ones pass, and every fault is made once and named."""

import copy
import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    ColQwen2Config,
    ColQwen2ForRetrieval,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2_5_VLConfig,
    Qwen2_5_VLModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLModel,
)

from colfolio.mrope.faults import Verdict
from colfolio.mrope.graft import graft
from colfolio.mrope.guard import Watch, watch
from colfolio.mrope.positions import padded_position_ids
from colfolio.mrope.schemes import SCHEMES, Qwen2VL

IMAGE_ID, VIDEO_ID, MERGE = 3, 4, 2
TEXT = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]},
}
VISION = {"depth": 1, "num_heads": 2, "patch_size": 2, "spatial_merge_size": MERGE}
IDS = {"image_token_id": IMAGE_ID, "video_token_id": VIDEO_ID, "tie_word_embeddings": False}
QWEN2_VISION = VISION | {"embed_dim": 8, "hidden_size": 16, "mlp_ratio": 1}
OTHER_VISION = VISION | {"hidden_size": 8, "intermediate_size": 8, "out_hidden_size": 16}


def qwen2_config():
    return Qwen2VLConfig(text_config=dict(TEXT), vision_config=dict(QWEN2_VISION), **IDS)


def qwen2_5_config():
    vision = OTHER_VISION | {"tokens_per_second": 3, "fullatt_block_indexes": [0]}
    return Qwen2_5_VLConfig(text_config=dict(TEXT), vision_config=vision, **IDS)


def qwen3_config():
    vision = OTHER_VISION | {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    return Qwen3VLConfig(text_config=TEXT | {"head_dim": 8}, vision_config=vision, **IDS)


class EngineRetriever(Qwen2VLModel):
    """As colpali-engine has it: a subclass whose forward names no argument."""

    def forward(self, *args, **kwargs):
        hidden = super().forward(*args, **kwargs, use_cache=False).last_hidden_state
        return hidden / hidden.norm(dim=-1, keepdim=True)


BUILDERS = {
    "Qwen2-VL": lambda: Qwen2VLModel(qwen2_config()),
    "Qwen2-VL generating": lambda: Qwen2VLForConditionalGeneration(qwen2_config()),
    "Qwen2.5-VL": lambda: Qwen2_5_VLModel(qwen2_5_config()),
    "Qwen3-VL": lambda: Qwen3VLModel(qwen3_config()),
    "colpali-engine": lambda: EngineRetriever(qwen2_config()),
    "ColQwen2ForRetrieval": lambda: ColQwen2ForRetrieval(
        ColQwen2Config(vlm_config=qwen2_config().to_dict(), embedding_dim=8)
    ),
}
FAMILIES = ["Qwen2-VL", "Qwen2-VL generating", "Qwen2.5-VL", "Qwen3-VL", "colpali-engine"]


@pytest.fixture(scope="module")
def built():
    made = {}
    for name, build in BUILDERS.items():
        torch.manual_seed(0)
        made[name] = build().eval()
    return made


@pytest.fixture
def model(built):
    """Any of the tiny models, without memory of the tests before."""

    def fresh(name="Qwen2-VL"):
        chosen = built[name]
        for module in chosen.modules():
            if "rope_deltas" in vars(module):
                module.rope_deltas = None
        return chosen

    return fresh


@dataclass
class Inputs:
    """A batch as a processor would make it; `grids` by kind, in patches."""

    input_ids: torch.Tensor
    mm_token_type_ids: torch.Tensor
    attention_mask: torch.Tensor
    grids: dict
    seconds: float | None = None

    def kwargs(self, family="Qwen2-VL"):
        """What a call of a family takes."""
        made = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "mm_token_type_ids": self.mm_token_type_ids,
        }
        names = {"image": "pixel_values", "video": "pixel_values_videos"}
        for kind, grid in self.grids.items():
            patches = torch.randn(int(grid.prod(1).sum()), 3 * 2 * 2 * 2)
            made |= {f"{kind}_grid_thw": grid, names[kind]: patches}
        if family == "Qwen2.5-VL" and "video" in self.grids:
            made["second_per_grid_ts"] = torch.full((len(self.grids["video"]),), self.seconds or 1)
        return made

    def positions(self, scheme="qwen2_vl", **changed):
        grids = {f"{kind}_grid_thw": grid for kind, grid in self.grids.items()} | changed
        return padded_position_ids(
            self.mm_token_type_ids, self.attention_mask, **grids, scheme=scheme
        )

    def embeddings(self):
        torch.manual_seed(1)
        return torch.randn(*self.input_ids.shape, TEXT["hidden_size"])


def batch_of(*rows, pad="right", is_split=False, seconds=None):
    """A padded batch of rows of text (a number of tokens) and grids (`("image", t, h, w)`)."""
    types, grids = [], {"image": [], "video": []}
    for row in rows:
        types.append([])
        for part in row:
            if isinstance(part, int):
                types[-1] += [0] * part
                continue
            kind, frames, height, width = part
            grids[kind].append((frames, MERGE * height, MERGE * width))
            frame = [1 if kind == "image" else 2] * (height * width)
            separator = [0] if is_split and kind == "video" else []
            types[-1] += (frame + separator) * frames
    longest = max(map(len, types))
    masks = [[1] * len(row) for row in types]
    for row in (*types, *masks):
        padding = [0] * (longest - len(row))
        row[:] = padding + row if pad == "left" else row + padding
    types = torch.tensor(types)
    ids = torch.arange(10, 10 + longest).repeat(len(rows), 1) % 50 + 8
    ids[types == 1], ids[types == 2] = IMAGE_ID, VIDEO_ID
    return Inputs(
        *(ids, types, torch.tensor(masks)),
        {kind: torch.tensor(found) for kind, found in grids.items() if found},
        seconds,
    )


PAGE = (3, ("image", 1, 2, 3), 2)
CLIP = (2, ("video", 3, 2, 2), 4)
ROWS = {
    "images": (PAGE, (1, ("image", 1, 4, 1), 2, ("image", 1, 1, 1), 1)),
    "clips": (CLIP, (1, ("video", 2, 1, 3), 1)),
    "mixed": ((2, ("image", 1, 2, 2), 1, ("video", 2, 3, 2), 3), PAGE, CLIP, (4,)),
    "long clip": ((2, ("video", 7, 2, 1), 5), (3,)),
    "text": ((5,), (2,), (1,)),
}


@torch.no_grad()
def seen_by(model, *calls, **truth):
    """The watch behind calls with these arguments."""
    with watch(model, **truth) as watched:
        for kwargs in calls:
            model(**kwargs)
    return watched


def only_fault(watched):
    """The one fault that a watch found, and that it says what is wrong."""
    verdict = watched.verdict
    assert not verdict.is_right
    harmful = {finding.fault for finding in verdict.findings if not finding.harmless}
    assert len(harmful) == 1
    said = str(watched)
    for part in ("Evidence: row", "expected (", ", seen (", "Mend: "):
        assert part in said
    assert "\n" not in said
    return harmful.pop()


@pytest.mark.parametrize("pad", ["left", "right"])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_models_called_as_their_processors_do_are_right(model, family, rows, pad):
    inputs = batch_of(*ROWS[rows], pad=pad, is_split=family == "Qwen3-VL", seconds=0.7)
    watched = seen_by(model(family), inputs.kwargs(family))
    verdict = watched.verdict
    assert verdict.is_right, str(verdict)
    if rows != "text":  # given no grid, the library counts padding
        assert not verdict.findings
        number = len(ROWS[rows])
        told = f"all {number} rows" if number > 1 else "1 row"
        assert str(watched) == f"Positions are right in {told}."


def test_text_behind_padding_on_the_left_is_shifted_but_harmless(model):
    verdict = seen_by(model(), batch_of(*ROWS["text"], pad="left").kwargs()).verdict
    assert verdict.is_right
    assert verdict.faults == {"padding"}
    assert [(finding.row, finding.harmless) for finding in verdict.findings] == [
        (1, True),
        (2, True),
    ]
    assert "harmless" in str(verdict)


@pytest.mark.parametrize("pad", ["left", "right"])
def test_a_fresh_colqwen2_of_transformers_is_flattened_until_it_gets_position_ids(model, pad):
    retriever = model("ColQwen2ForRetrieval")
    inputs = batch_of(PAGE, (1, ("image", 1, 3, 2), 1), (4,), pad=pad)
    given = {name: value for name, value in inputs.kwargs().items() if "pixel" not in name}
    flattened = seen_by(retriever, given)
    assert only_fault(flattened) == "flattened"
    assert {finding.row for finding in flattened.verdict.findings if not finding.harmless} == {0, 1}
    assert "one step a token from 0 on" in flattened.verdict.findings[1].evidence
    mended = seen_by(retriever, given | {"position_ids": inputs.positions()})
    assert not mended.verdict.findings


def test_embeddings_without_tokens_are_flattened_by_the_truth_given_to_watch(model):
    inputs = batch_of(PAGE, PAGE)
    truth = {
        "token_types": inputs.mm_token_type_ids,
        "image_grid_thw": inputs.grids["image"],
    }
    call = {"inputs_embeds": inputs.embeddings(), "attention_mask": inputs.attention_mask}
    assert only_fault(seen_by(model(), call, **truth)) == "flattened"


def test_images_without_any_grids_are_flattened(model):
    inputs = batch_of(PAGE, PAGE)
    verdict = seen_by(model(), {"input_ids": inputs.input_ids}).verdict
    assert verdict.faults == {"flattened"}
    assert "image_grid_thw is missing" in str(verdict)


@pytest.mark.parametrize("is_watched", [True, False])
def test_deltas_that_the_model_kept_from_another_call_are_stale(model, is_watched):
    qwen, inputs = model(), batch_of((1, ("image", 1, 2, 2), 3), (7, ("image", 1, 3, 3), 1))
    truth = {"token_types": inputs.mm_token_type_ids, "image_grid_thw": inputs.grids["image"]}
    first = batch_of((4, ("image", 1, 4, 4), 1)).kwargs()
    second = {"inputs_embeds": inputs.embeddings(), "attention_mask": inputs.attention_mask}
    if is_watched:  # no truth is given that the first call would be judged by
        with watch(qwen) as watched, torch.no_grad():
            qwen(**first)
            qwen(**second | {"mm_token_type_ids": inputs.mm_token_type_ids} | truth_of(inputs))
    else:
        with torch.no_grad():
            qwen(**first)
        watched = seen_by(qwen, second, **truth)
    assert only_fault(watched) == "stale"
    assert "plus -12" in str(watched)


def truth_of(inputs):
    return {f"{kind}_grid_thw": grid for kind, grid in inputs.grids.items()}


def test_ids_of_another_batch_are_stale(model):
    first, second = batch_of((2, ("image", 1, 2, 3), 3)), batch_of((3, ("image", 1, 3, 2), 2))
    kept = {"position_ids": first.positions()}
    watched = seen_by(model(), first.kwargs() | kept, second.kwargs() | kept)
    assert watched.verdicts[0].is_right
    assert only_fault(watched) == "stale"
    assert str(watched).startswith("Call 1 of 2: ")
    assert "call 0, row 0" in str(watched)


def test_the_first_wrong_call_is_the_verdict_on_all(model):
    inputs = batch_of(PAGE)
    turned = inputs.positions(image_grid_thw=inputs.grids["image"][:, [0, 2, 1]])
    right, wrong = inputs.kwargs(), inputs.kwargs() | {"position_ids": turned}
    later = wrong | {"position_ids": turned + turned.flip(2)}
    watched = seen_by(model(), right, wrong, later, right)
    assert [verdict.is_right for verdict in watched.verdicts] == [True, False, False, True]
    assert watched.verdict is watched.verdicts[1]
    assert seen_by(model(), right, right).verdict.is_right


def test_a_fault_in_two_calls_is_not_called_stale_in_the_second(model):
    inputs = batch_of(PAGE)
    turned = inputs.positions(image_grid_thw=inputs.grids["image"][:, [0, 2, 1]])
    call = inputs.kwargs() | {"position_ids": turned}
    assert [verdict.faults for verdict in seen_by(model(), call, call).verdicts] == [
        {"transposed"},
        {"transposed"},
    ]


@pytest.mark.parametrize(("pad", "other"), [("left", "right"), ("right", "left")])
def test_ids_made_for_padding_on_the_other_side_are_named(model, pad, other):
    inputs, made = (batch_of(PAGE, (2, ("image", 1, 1, 2), 1), pad=side) for side in (pad, other))
    call = inputs.kwargs() | {"position_ids": made.positions()}
    watched = seen_by(model(), call)
    assert only_fault(watched) == "padding"
    assert f"for padding on the {other}" in str(watched)
    assert [finding.row for finding in watched.verdict.findings] == [1]


def test_ids_without_the_mask_are_shifted_by_padding_but_harmless(model):
    inputs = batch_of(PAGE, (2, ("image", 1, 1, 2), 1), pad="left")
    unmasked = padded_position_ids(inputs.mm_token_type_ids, image_grid_thw=inputs.grids["image"])
    verdict = seen_by(model(), inputs.kwargs() | {"position_ids": unmasked}).verdict
    assert verdict.is_right
    assert verdict.faults == {"padding"}


def test_any_other_shift_of_a_whole_row_is_harmless(model):
    inputs = batch_of(PAGE, PAGE)
    shifted = inputs.positions() + torch.tensor([5, 0, 9])[:, None, None]
    verdict = seen_by(model(), inputs.kwargs() | {"position_ids": shifted}).verdict
    assert verdict.is_right
    assert verdict.faults == {"shifted"}


def test_transposed_grids_in_positions_made_by_hand_are_named(model):
    inputs = batch_of(PAGE, (1, ("image", 1, 2, 2), 1))
    turned = inputs.positions(image_grid_thw=inputs.grids["image"][:, [0, 2, 1]])
    watched = seen_by(model(), inputs.kwargs() | {"position_ids": turned})
    assert only_fault(watched) == "transposed"
    assert len(watched.verdict.findings) == 1  # a square looks the same


@pytest.mark.parametrize(
    ("side", "wrong"),
    [((4, 2, 3), (2, 4, 3)), ((4, 2, 3), (3, 2, 4)), ((3, 4, 2), (4, 2, 3))],
)
def test_time_and_another_side_exchanged_are_named(model, side, wrong):
    inputs = batch_of((2, ("video", *side), 3))
    grid = torch.tensor([[wrong[0], MERGE * wrong[1], MERGE * wrong[2]]])
    call = inputs.kwargs() | {"position_ids": inputs.positions(video_grid_thw=grid)}
    assert only_fault(seen_by(model(), call)) == "swapped_time"


def test_a_call_whose_own_grids_lie_is_judged_by_the_truth_given_to_watch(model):
    inputs = batch_of((2, ("video", 4, 3, 2), 3))
    swapped = inputs.grids["video"][:, [1, 0, 2]]  # in patches: as many tokens, all elsewhere
    call = inputs.kwargs()
    del call["pixel_values_videos"]
    lying = call | {"video_grid_thw": swapped}
    assert seen_by(model(), lying).verdict.is_right
    told = seen_by(model(), lying, video_grid_thw=inputs.grids["video"])
    assert only_fault(told) == "swapped_time"
    assert "in patches" in str(told)


@pytest.mark.parametrize("family", ["Qwen2-VL", "Qwen2.5-VL"])
def test_a_temporal_row_that_stands_still_is_named(model, family, monkeypatch):
    qwen = model(family)
    right = type(qwen).get_vision_position_ids

    def of_5_3(self, start_position, grid_thw, *args, time_interval=1.0, **kwargs):
        args, interval = args[:2], args[2] if len(args) > 2 else time_interval
        ids = right(self, start_position, grid_thw, *args, time_interval=interval, **kwargs)
        ids[0] = int(start_position * interval)
        return ids

    monkeypatch.setattr(type(qwen), "get_vision_position_ids", of_5_3)
    inputs = batch_of(CLIP, (1, ("video", 2, 2, 3), 1, ("video", 1, 1, 1), 2), seconds=2)
    watched = seen_by(qwen, inputs.kwargs(family))
    assert only_fault(watched) == "constant_time"
    assert "5.3" in str(watched)


def test_the_published_rule_for_text_behind_a_long_clip_is_another_scheme(model):
    inputs = batch_of(*ROWS["long clip"])
    published = {"position_ids": inputs.positions("qwen2_vl_published")}
    watched = seen_by(model(), inputs.kwargs() | published)
    assert only_fault(watched) == "other_scheme"
    assert "qwen2_vl_published" in str(watched)
    trained = seen_by(model(), inputs.kwargs() | published, scheme="qwen2_vl_published")
    assert not trained.verdict.findings


def test_seconds_that_were_lost_are_named(model):
    inputs = batch_of(CLIP, seconds=2.0)
    call = inputs.kwargs("Qwen2.5-VL")
    truth = {"second_per_grid_ts": call.pop("second_per_grid_ts")}
    watched = seen_by(model("Qwen2.5-VL"), call, **truth)
    assert only_fault(watched) == "other_scheme"
    assert "without second_per_grid_ts" in str(watched)


def test_seconds_that_were_cut_to_whole_ones_are_named(model):
    inputs = batch_of(CLIP, seconds=2.5)
    call = inputs.kwargs("Qwen2.5-VL")
    truth = {"second_per_grid_ts": call["second_per_grid_ts"].clone()}
    call["second_per_grid_ts"] = call["second_per_grid_ts"].floor()
    watched = seen_by(model("Qwen2.5-VL"), call, **truth)
    assert only_fault(watched) == "other_scheme"
    assert "cut to whole seconds" in str(watched)


def test_random_ids_are_unexplained(model):
    inputs = batch_of(PAGE)
    ids = torch.randint(0, 30, (3, *inputs.input_ids.shape), generator=torch.manual_seed(0))
    assert only_fault(seen_by(model(), inputs.kwargs() | {"position_ids": ids})) == "unexplained"


def test_a_call_that_does_not_fit_itself_is_a_misfit(model):
    inputs = batch_of(PAGE, (5,))
    call = inputs.kwargs() | {"position_ids": inputs.positions()}
    call |= {"image_grid_thw": torch.tensor([[1, 4, 4]]), "pixel_values": None}
    verdict = seen_by(model(), call).verdict
    assert verdict.faults == {"misfit"}
    assert str(verdict).startswith("Positions cannot be right. misfit: ")
    assert "row 0: token 7" in str(verdict)


def test_a_retriever_of_packed_rows_is_right(shared_retriever, pages, texts):
    collator = shared_retriever.collator
    watched = seen_by_packed(shared_retriever, collator.documents(pages), collator.queries(texts))
    assert [len(verdict.findings) for verdict in watched.verdicts] == [0, 0]
    assert [verdict.num_rows for verdict in watched.verdicts] == [len(pages), len(texts)]


def test_a_packed_batch_of_one_dimensional_positions_is_flattened(shared_retriever, pages):
    packed = shared_retriever.collator.documents(pages)
    flat = torch.cat([torch.arange(length) for length in packed.lengths.tolist()])
    for ids in (flat, torch.arange(len(flat))):
        lying = copy.copy(packed)
        object.__setattr__(lying, "position_ids", ids.expand(3, -1).contiguous())
        assert only_fault(seen_by_packed(shared_retriever, lying)) == "flattened"


@pytest.mark.parametrize("fault", [None, "flattened"])
def test_rows_behind_one_another_are_cut_by_the_offsets_that_attention_gets(model, fault):
    rows = [
        batch_of((2, ("image", 1, 2, 3), 2)),
        batch_of((1, ("image", 1, 3, 1), 1)),
        batch_of((3,)),
    ]
    ids = [row.positions() for row in rows]
    if fault:
        ids[1] = torch.arange(ids[1].shape[2]).expand_as(ids[1])
    patches = [row.kwargs().get("pixel_values", torch.zeros(0, 24)) for row in rows]
    lengths = torch.tensor([row.input_ids.shape[1] for row in rows])
    call = {
        "input_ids": torch.cat([row.input_ids for row in rows], dim=1),
        "image_grid_thw": torch.cat([row.grids["image"] for row in rows if row.grids]),
        "pixel_values": torch.cat(patches),
        "position_ids": torch.cat(ids, dim=2),
        "cu_seq_lens_q": torch.cat([torch.zeros(1).long(), lengths.cumsum(0)]).int(),
    }
    verdict = seen_by(model(), call).verdict
    assert verdict.num_rows == 3
    expected = [(1, "flattened")] if fault else []
    assert [(finding.row, finding.fault) for finding in verdict.findings] == expected


def packed_call(rows, is_text_row_given=True):
    ids = [row.positions() for row in rows]
    text = torch.cat([torch.arange(row.shape[2]) for row in ids])[None, None]
    call = {
        "input_ids": torch.cat([row.input_ids for row in rows], dim=1),
        "image_grid_thw": torch.cat([row.grids["image"] for row in rows]),
        "pixel_values": torch.cat([row.kwargs()["pixel_values"] for row in rows]),
        "position_ids": torch.cat(ids, dim=2),
    }
    if is_text_row_given:
        call["position_ids"] = torch.cat([text, call["position_ids"]])
    return call


PACKED = [batch_of((2, ("image", 1, 2, 3), 2)), batch_of((1, ("image", 1, 3, 1), 1))]


def test_rows_are_cut_where_their_row_of_text_ids_restarts(model, llama):
    call = packed_call(PACKED)
    verdict = seen_by(model(), call).verdict
    assert verdict == Verdict((), 2)
    types = torch.cat([row.mm_token_type_ids for row in PACKED], dim=1)
    given = {name: call[name] for name in ("input_ids", "position_ids")}
    truth = {"token_types": types, "image_grid_thw": call["image_grid_thw"]}
    assert seen_by(llama, given, **truth).verdict == Verdict((), 2)
    flat = {**given, "position_ids": call["position_ids"][0]}
    verdict = seen_by(llama, flat, **truth).verdict
    assert [(finding.row, finding.fault) for finding in verdict.findings] == [
        (0, "flattened"),
        (1, "flattened"),
    ]


def test_text_behind_one_another_is_right_in_each_row(llama):
    call = {"input_ids": torch.arange(9)[None], "position_ids": torch.arange(9)[None] % 5}
    assert seen_by(llama, call).verdict.num_rows == 2
    assert seen_by(llama, call).verdict.is_right


def test_what_only_looks_like_packed_rows_is_one(model, llama):
    restarts = packed_call(PACKED, is_text_row_given=False)
    assert only_fault(seen_by(model(), restarts)) == "unexplained"
    masked = packed_call(PACKED) | {"attention_mask": torch.ones(1, 15).long()}
    assert seen_by(model(), masked).verdict.num_rows == 1
    text = {"input_ids": torch.arange(6)[None]}
    for ids in ([0] * 6, [0, 0, 0, 1, 2, 3], [3, 4, 0, 1, 2, 3], [0, 1, 4, 0, 1, 2]):
        verdict = seen_by(llama, text | {"position_ids": torch.tensor([ids])}).verdict
        assert (verdict.num_rows, verdict.is_right) == (1, False)


@pytest.mark.parametrize("has_grids", [True, False])
def test_token_types_that_deny_the_images_of_the_token_ids_are_a_misfit(model, has_grids):
    inputs = batch_of((4,), PAGE)
    call = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    lying = call | {"mm_token_type_ids": torch.zeros_like(inputs.mm_token_type_ids)}
    if has_grids:
        lying |= truth_of(inputs) | {"position_ids": inputs.positions()}
    verdict = seen_by(model(), lying).verdict
    assert [(finding.row, finding.fault) for finding in verdict.findings] == [(1, "misfit")]
    assert "row 1, token 3: its token id, 3, is that of image, its type" in str(verdict)
    told = seen_by(model(), lying, token_types=inputs.mm_token_type_ids, **truth_of(inputs))
    assert told.verdict.faults == (set() if has_grids else {"flattened"})


def test_a_misfit_in_a_packed_call_names_the_row_that_it_is_in(model):
    call = packed_call(PACKED)
    types = torch.cat([row.mm_token_type_ids for row in PACKED], dim=1)
    assert seen_by(model(), call | {"mm_token_type_ids": types}).verdict.is_right
    types[0, -4:] = 0
    verdict = seen_by(model(), call | {"mm_token_type_ids": types}).verdict
    assert [(finding.row, finding.fault) for finding in verdict.findings] == [(1, "misfit")]
    assert "row 1, token 1: " in str(verdict)


def test_token_types_of_images_where_the_token_ids_have_none_are_a_misfit(model):
    inputs = batch_of(PAGE, (5,))
    inputs.input_ids[0, 3:5] = torch.tensor([VIDEO_ID, 20])
    call = inputs.kwargs() | {"position_ids": inputs.positions(), "pixel_values": None}
    verdict = seen_by(model(), call).verdict
    assert verdict.faults == {"misfit"}
    assert "row 0, token 3: its token id, 4, is that of video" in str(verdict)
    inputs.input_ids[0, 3] = IMAGE_ID
    verdict = seen_by(model(), inputs.kwargs() | {"pixel_values": None}).verdict
    assert "row 0, token 4: its token id, 20, is that of text, its type" in str(verdict)
    inputs.attention_mask[0, 3:] = 0  # what stands at padding says nothing
    inputs.mm_token_type_ids[0, 3:] = 0
    inputs.input_ids[0, 3:] = IMAGE_ID
    call = {"input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask}
    call["mm_token_type_ids"] = inputs.mm_token_type_ids
    assert seen_by(model(), call).verdict.is_right


def test_grids_given_to_watch_that_fit_no_call_leave_it_unjudged(model):
    inputs, other = batch_of(PAGE, (4,)), batch_of(PAGE, PAGE, PAGE)
    verdict = seen_by(model(), inputs.kwargs(), **truth_of(other)).verdict
    assert "the grids given to watch(...) do not fit it: image grid 1" in verdict.unjudged
    alike = batch_of(PAGE, (2, *PAGE[1:], 1))  # as many image tokens, but no repeated row
    verdict = seen_by(model(), alike.kwargs(), **truth_of(inputs)).verdict
    assert "the grids given to watch(...) do not fit it: row 1" in verdict.unjudged


# unwrapped, because the types that tests execute refuse these before the code does
watch_anything = contextmanager(inspect.unwrap(watch))
REFUSED = {
    "token_types": [
        [[0, 1]],
        torch.zeros(4).long(),
        torch.zeros(1, 1, 4).long(),
        torch.zeros(1, 0).long(),
        torch.zeros(1, 4),
        torch.zeros(1, 4).bool(),
        torch.full((1, 4), 3),
        torch.zeros(1, 4).long().to("meta"),
    ],
    "image_grid_thw": [
        [[1, 4, 4]],
        torch.tensor([1, 4, 4]),
        torch.tensor([[4, 4]]),
        torch.tensor([[1.0, 4.0, 4.0]]),
        torch.tensor([[1, 4, 3]]),
        torch.tensor([[0, 4, 4]]),
        torch.tensor([[1, 4, 4]]).to("meta"),
    ],
    "video_grid_thw": [[[1, 4, 4]], torch.tensor([[1, -4, 4]])],
    "second_per_grid_ts": [
        1.0,
        "1",
        [None],
        [-1.0],
        [float("nan")],
        torch.ones(1, 1),
        torch.tensor(1.0),
        torch.ones(1).to("meta"),
        [1.0, 1.0],
    ],
    "spatial_merge_size": [0, -1, "2", 2.0, True],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values]
)
def test_arguments_that_say_nothing_are_refused_at_once(model, name, value):
    qwen, truth = model("Qwen2.5-VL"), {"video_grid_thw": torch.tensor([[1, 4, 4]])}
    before = hooks_of(qwen)
    with pytest.raises(ValueError, match=name), watch_anything(qwen, **truth | {name: value}):
        pytest.fail("entered")
    assert hooks_of(qwen) == before


def test_what_a_watch_hands_out_cannot_change_it(model):
    watched = seen_by(model(), SMALL.kwargs())
    assert isinstance(watched.calls, tuple)
    assert isinstance(watched.verdicts, tuple)


@torch.no_grad()
def seen_by_packed(retriever, *packed):
    with watch(retriever) as watched:
        for batch in packed:
            retriever(batch)
    return watched


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    rope = {"rope_type": "default", "rope_theta": 100.0}
    model = LlamaForCausalLM(LlamaConfig(**TEXT | {"rope_parameters": rope})).eval()
    return graft(model)


@pytest.mark.parametrize("name", ["right", "flattened"])
def test_a_grafted_decoder_is_judged_by_what_it_rotates_by(llama, name):
    inputs = batch_of(PAGE, (1, ("image", 1, 3, 2), 1), pad="left")
    call = {"inputs_embeds": inputs.embeddings(), "attention_mask": inputs.attention_mask}
    if name == "right":
        call["position_ids"] = inputs.positions()
    truth = {"token_types": inputs.mm_token_type_ids, "image_grid_thw": inputs.grids["image"]}
    watched = seen_by(llama, call, **truth)
    assert watched.verdict.faults == ({"flattened"} if name == "flattened" else set())


def test_text_of_a_plain_decoder_is_right_if_it_embeds_its_tokens_itself(llama):
    ids = torch.arange(12).view(2, 6)
    verdict = seen_by(llama, {"input_ids": ids}).verdict
    assert verdict == Verdict((), 2, remarks=verdict.remarks)
    assert "right in all 2 rows. All tokens were taken as text, since" in str(verdict)
    told = seen_by(llama, {"input_ids": ids}, token_types=torch.zeros_like(ids)).verdict
    assert told == Verdict((), 2)
    unknown = seen_by(llama, {"inputs_embeds": torch.randn(2, 6, 16)}).verdict
    assert not unknown.is_right
    assert "token_types" in unknown.unjudged
    assert not unknown.findings


def test_three_different_rows_are_not_judged_as_text(llama):
    call = {"input_ids": torch.arange(6)[None], "position_ids": torch.arange(18).view(3, 1, 6)}
    verdict = seen_by(llama, call).verdict
    assert not verdict.findings
    assert "token_types" in verdict.unjudged


# what a random model must not write
NO_IMAGES = {"suppress_tokens": [IMAGE_ID, VIDEO_ID], "min_new_tokens": 3, "max_new_tokens": 3}


@pytest.mark.parametrize("settings", [{}, {"num_beams": 2}, {"use_cache": False}])
@pytest.mark.parametrize("rows", [ROWS["images"], (PAGE, (1, ("image", 1, 3, 1), 1)), ((5,), (2,))])
def test_all_of_a_generation_is_right(model, rows, settings):
    qwen, inputs = model("Qwen2-VL generating"), batch_of(*rows, pad="left")
    with watch(qwen, **truth_of(inputs)) as watched:
        qwen.generate(**inputs.kwargs(), **NO_IMAGES, **settings, do_sample=False)
    assert len(watched.verdicts) == 3
    assert not any(verdict.findings for verdict in watched.verdicts)
    assert all(verdict.is_right for verdict in watched.verdicts), str(watched)
    assert "not judged" not in str(watched)


def test_steps_behind_what_was_not_judged_are_counted(model):
    qwen, inputs = model("Qwen2-VL generating"), batch_of(PAGE)
    with watch(qwen) as untold:
        qwen.generate(**inputs.kwargs(), **NO_IMAGES, do_sample=False)
    # the library makes features and ids before the forward, and passes no grids on
    assert "pass image_grid_thw" in untold.verdict.unjudged
    assert all("cache" in verdict.unjudged for verdict in untold.verdicts[1:])
    assert str(untold.verdict).endswith("watch(...). 2 steps behind a cache were not judged.")
    assert str(untold).startswith("Call 0 of 3: ")


def stepped(model, *calls, **truth):
    """The watch behind calls, each with kwargs, and the number of the call whose cache it takes."""
    outputs = []
    with watch(model, **truth) as watched, torch.no_grad():
        for kwargs, before in calls:
            cache = {} if before is None else {"past_key_values": outputs[before].past_key_values}
            outputs.append(model(**kwargs, **cache, use_cache=True))
    return watched


STEP = {"input_ids": torch.tensor([[30]])}
SMALL, LARGE = batch_of(PAGE), batch_of((2, ("image", 1, 4, 6), 2))


def test_a_step_that_takes_the_rope_delta_of_another_page_is_stale(model):
    calls = [(LARGE.kwargs(), None), (SMALL.kwargs(), None)]
    watched = stepped(model(), *calls, (STEP, 0), (STEP, 1))
    assert [verdict.is_right for verdict in watched.verdicts] == [True, True, False, True]
    assert only_fault(watched) == "stale"
    assert "behind 28 tokens in the cache" in str(watched)
    assert "expected (10, 10, 10), seen (25, 25, 25)" in str(watched)
    assert "the rope delta of call 1, row 0" in str(watched)
    right = stepped(model(), calls[0], (STEP, 0), (STEP, 0))
    assert [verdict.findings for verdict in right.verdicts] == [(), (), ()]
    assert right.calls[2].expected.flatten().tolist() == [11, 11, 11]


def test_a_rope_delta_from_before_the_watch_is_stale_in_a_step(model):
    qwen = model()
    with torch.no_grad():
        cache = qwen(**SMALL.kwargs(), use_cache=True)
    given = LARGE.kwargs() | {"position_ids": LARGE.positions()}  # the model keeps its own delta
    watched = stepped(qwen, (given, None), (STEP, 0))
    assert only_fault(watched) == "stale"
    assert "kept by the model" in str(watched)
    assert cache.past_key_values.get_seq_length() == SMALL.input_ids.shape[1]


def test_a_grafted_decoder_that_counts_images_one_by_one_in_a_step_is_flattened(llama):
    truth = {"token_types": SMALL.mm_token_type_ids, **truth_of(SMALL)}
    begin = {"input_ids": SMALL.input_ids, "position_ids": SMALL.positions()}
    watched = stepped(llama, (begin, None), (STEP, 0), **truth)
    assert only_fault(watched) == "flattened"
    assert "expected (8, 8, 8), seen (11, 11, 11)" in str(watched)
    told = {"input_ids": torch.tensor([[30, 31]]), "position_ids": torch.tensor([[8, 9]])}
    last = {**STEP, "position_ids": torch.full((3, 1, 1), 10)}
    assert stepped(llama, (begin, None), (told, 0), (last, 0), **truth).verdict.is_right
    last["position_ids"] += 3
    assert only_fault(stepped(llama, (begin, None), (told, 0), (last, 0), **truth)) == "flattened"


def test_a_step_that_counts_the_padding_before_it_is_named(model):
    inputs = batch_of(PAGE, (2, ("image", 1, 1, 2), 1), pad="left")
    step = {"input_ids": torch.tensor([[30], [31]])}  # without the mask
    watched = stepped(model(), (inputs.kwargs(), None), (step, 0))
    assert only_fault(watched) == "padding"
    assert [finding.row for finding in watched.verdict.findings] == [1]


def test_a_step_goes_on_from_ids_that_are_off_by_a_constant(llama):
    begin = {"input_ids": SMALL.input_ids, "position_ids": SMALL.positions() + 5}
    truth = {"token_types": SMALL.mm_token_type_ids, **truth_of(SMALL)}
    step = {**STEP, "position_ids": torch.full((3, 1, 1), 8)}
    watched = stepped(llama, (begin, None), (step, 0), **truth)
    assert not watched.verdict.is_right
    assert watched.verdict.faults == {"unexplained"}
    step["position_ids"] += 5
    assert stepped(llama, (begin, None), (step, 0), **truth).verdict.is_right


def test_padding_among_the_tokens_of_a_step_is_not_counted(llama):
    steps = [torch.tensor([[3, 4], [9, 3]]), torch.tensor([[5], [4]])]
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 1, 1]])
    calls = [({"input_ids": torch.arange(6).view(2, 3)}, None)]
    for number, ids in enumerate(steps):
        end = 5 + number
        step = {"input_ids": torch.full_like(ids, 7), "attention_mask": mask[:, :end]}
        calls.append((step | {"position_ids": ids}, 0))
    watched = stepped(llama, *calls)
    assert [verdict.findings for verdict in watched.verdicts] == [(), (), ()]
    calls[2][0]["position_ids"] = torch.tensor([[5], [5]])
    watched = stepped(llama, *calls)
    assert [(finding.row, finding.fault) for finding in watched.verdict.findings] == [
        (1, "padding")
    ]


def test_ids_of_a_step_that_others_have_by_chance_are_not_stale(llama):
    truth = {"token_types": SMALL.mm_token_type_ids, **truth_of(SMALL)}
    begin = {"input_ids": SMALL.input_ids, "position_ids": SMALL.positions()}
    for wrong in (8, 12 + 8):  # that of the step before; its own added to the tokens before
        steps = [({**STEP, "position_ids": torch.full((3, 1, 1), at)}, 0) for at in (8, wrong)]
        watched = stepped(llama, (begin, None), *steps, **truth)
        assert [verdict.is_right for verdict in watched.verdicts] == [True, True, False]
        assert only_fault(watched) == "unexplained"


def test_a_step_behind_packed_rows_is_not_judged(llama):
    begin = {"input_ids": torch.arange(9)[None], "position_ids": torch.arange(9)[None] % 5}
    watched = stepped(llama, (begin, None), (STEP, 0))
    assert watched.verdicts[0].num_rows == 2
    assert "was not seen or judged" in watched.verdicts[1].unjudged


def test_a_cache_is_known_by_the_argument_too(model):
    qwen, cache = model(), DynamicCache()
    handle = qwen.language_model.register_forward_hook(without_cache)
    with watch(qwen) as watched, torch.no_grad():
        for call in (SMALL.kwargs(), STEP, STEP | {"position_ids": torch.full((3, 1, 1), 10)}):
            qwen(**call, past_key_values=cache)
    handle.remove()
    assert [verdict.is_right for verdict in watched.verdicts] == [True, True, False]


def without_cache(module, args, output):
    output.past_key_values = None
    return output


def test_a_cache_cut_back_is_judged_from_where_it_is_cut(model):
    qwen = model()
    with watch(qwen) as watched, torch.no_grad():
        cache = qwen(**SMALL.kwargs(), use_cache=True).past_key_values
        for _ in range(2):
            qwen(**STEP, past_key_values=cache)
        cache.crop(-2)
        qwen(**STEP, past_key_values=cache)
        cache.crop(-2)
        qwen(**STEP, past_key_values=cache)
    assert [verdict.is_right for verdict in watched.verdicts] == [True] * 4 + [False]
    assert "was not seen or judged" in watched.verdicts[-1].unjudged
    assert "1 step behind a cache was not judged" in str(watched)
    assert watched.calls[1].expected.equal(watched.calls[3].expected)


def test_steps_that_bring_images_or_hide_their_past_are_not_judged(model):
    qwen = model()
    visual = {"input_ids": torch.tensor([[IMAGE_ID]])}
    untyped = {"inputs_embeds": torch.zeros(1, 1, TEXT["hidden_size"])}
    begin = (SMALL.kwargs(), None)
    for step, told in ((visual, "tokens of images"), (untyped, "does not tell the types")):
        watched = stepped(qwen, begin, (step, 0), (STEP, 0))
        assert told in watched.verdicts[1].unjudged
        assert "was not seen or judged" in watched.verdicts[2].unjudged
        assert watched.verdict.is_right
        assert str(watched).startswith("Call 0 of 3: Positions are right in 1 row. 2 steps behind")
    with torch.no_grad():
        cache = qwen(**SMALL.kwargs(), use_cache=True).past_key_values
        with watch(qwen) as late:
            qwen(**STEP, past_key_values=cache)
    assert "was not seen or judged" in late.verdict.unjudged
    with torch.no_grad(), watch(model()) as inner:
        cache = qwen(**SMALL.kwargs(), use_cache=True).past_key_values
        qwen.language_model(**STEP, past_key_values=cache)  # past the watch
        qwen(**STEP, past_key_values=cache)
    assert "was not seen or judged" in inner.verdicts[1].unjudged


def test_a_table_of_a_step_shows_what_was_expected(model):
    place = stepped(model(), (SMALL.kwargs(), None), (STEP, 0)).table()[-1]
    assert (place.index, place.kind, place.seen, place.expected) == (0, "text", (8,) * 3, (8,) * 3)


def test_arguments_are_read_by_place_in_a_mapping_and_from_a_wrapper(model):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, features):
            return self.inner(**features)

    qwen, call = model(), batch_of(PAGE, (5,)).kwargs()
    with torch.no_grad(), watch(Wrapper(qwen)) as wrapped, watch(qwen) as inner:
        Wrapper(qwen)(call)  # not the watched one
        with pytest.raises(ValueError, match="no forward of the watched model"):
            _ = wrapped.verdict
        ids, mask = call.pop("input_ids"), call.pop("attention_mask")
        qwen(ids, mask, **call)
    assert [verdict.is_right for verdict in inner.verdicts] == [True, True]
    whole = Wrapper(qwen)
    with torch.no_grad(), watch(whole) as wrapped:
        whole(batch_of(PAGE, (5,)).kwargs())
    assert wrapped.verdict.is_right


@torch.no_grad()
def test_a_forward_that_raises_is_no_call(model):
    qwen, inputs = model(), batch_of(PAGE)

    def fail(module, args):
        raise KeyError("planted")

    with watch(qwen) as watched:
        handle = qwen.language_model.norm.register_forward_pre_hook(fail)
        with pytest.raises(KeyError, match="planted"):
            qwen(**inputs.kwargs())
        handle.remove()
        assert watched.calls == ()
        qwen(**inputs.kwargs())
        assert len(watched.calls) == 1


@torch.no_grad()
def test_hooks_are_gone_behind_the_block_also_if_it_raises(model):
    qwen, inputs = model(), batch_of(PAGE)
    before, entered = hooks_of(qwen), []

    def raise_inside():
        with watch(qwen) as watched:
            entered.append(watched)
            assert hooks_of(qwen) != before
            raise KeyError("planted")

    with pytest.raises(KeyError, match="planted"):
        raise_inside()
    assert hooks_of(qwen) == before
    qwen(**inputs.kwargs())
    assert entered[0].calls == ()


def hooks_of(model):
    return [
        (name, len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.named_modules()
    ]


def test_a_watch_changes_no_output_and_no_gradient(model):
    qwen, inputs = model(), batch_of(*ROWS["mixed"])
    call = inputs.kwargs()
    results = []
    for is_watched in (False, True):
        qwen.zero_grad()
        qwen.rope_deltas = None
        if is_watched:
            with watch(qwen):
                hidden = qwen(**call).last_hidden_state
        else:
            hidden = qwen(**call).last_hidden_state
        hidden.square().sum().backward()
        gradients = [weight.grad for weight in qwen.parameters() if weight.grad is not None]
        results.append([hidden.detach(), *(gradient.clone() for gradient in gradients)])
    for plain, watched in zip(*results, strict=True):
        assert torch.equal(plain, watched)


def test_ids_changed_behind_the_call_are_judged_as_they_were(model):
    inputs = batch_of(PAGE)
    call = inputs.kwargs() | {"position_ids": inputs.positions()}
    watched = seen_by(model(), call)
    call["position_ids"].zero_()
    call["mm_token_type_ids"].zero_()
    assert watched.verdict.is_right


def test_a_decoder_that_runs_twice_in_one_forward_is_not_judged(model):
    class Twice(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, first, second):
            self.inner(**first)
            self.inner(**second)

    twice = Twice(model())
    calls = [batch_of(PAGE).kwargs(), batch_of(PAGE, (5,)).kwargs()]
    with torch.no_grad(), watch(twice) as watched:
        twice(*calls)
    assert "several times" in watched.verdict.unjudged


def test_token_types_of_another_shape_are_not_judged(model):
    inputs = batch_of(PAGE)
    verdict = seen_by(model(), inputs.kwargs(), token_types=torch.zeros(2, 4).long()).verdict
    assert "[2, 4]" in verdict.unjudged
    assert str([1, inputs.input_ids.shape[1]]) in verdict.unjudged


def test_a_table_begins_just_before_the_first_visual_token(model):
    inputs = batch_of((7, ("image", 1, 2, 2), 3), (6,), pad="left")
    watched = seen_by(model(), inputs.kwargs())
    table = watched.table(tokens=6)
    assert [place.index for place in table] == [3, 4, 5, 6, 7, 8]
    assert [place.kind for place in table] == ["text"] * 4 + ["image"] * 2
    assert table[-1].seen == table[-1].expected == (7, 7, 8)
    assert [place.index for place in watched.table(row=1)] == list(range(8, 14))
    with pytest.raises(ValueError, match="row 2 of 2"):
        watched.table(row=2)
    with pytest.raises(ValueError, match="call 1 of 1"):
        watched.table(call=1)
    for wrong in ({"tokens": -1}, {"tokens": None}, {"row": 0.0}, {"call": None}):
        with pytest.raises(ValueError, match="must be whole numbers, and tokens at least 0"):
            inspect.unwrap(Watch.table)(watched, **wrong)


def test_a_table_without_expected_positions_still_shows_those_seen(llama):
    place = seen_by(llama, {"inputs_embeds": torch.randn(1, 3, 16)}).table()[-1]
    assert (place.index, place.kind, place.seen, place.expected) == (2, "unknown", (2, 2, 2), ())


def test_models_that_cannot_be_watched_are_refused():
    for no_model in (None, "model"):
        with pytest.raises(ValueError, match=r"an nn\.Module, not"), watch_anything(no_model):
            pass
    plain = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"rotary_emb.*Linear: none"), watch(plain):
        pass
    rope = {"rope_type": "default", "rope_theta": 100.0}
    llama = LlamaForCausalLM(LlamaConfig(**TEXT | {"rope_parameters": rope}))
    with pytest.raises(ValueError, match=r"llama.*qwen2_5_vl.*scheme="), watch(llama):
        pass
    two = nn.ModuleList([llama.model, copy.deepcopy(llama.model)])
    with pytest.raises(ValueError, match="found in ModuleList: 0, 1"), watch(two):
        pass
    with pytest.raises(ValueError, match="none of"), watch(llama, scheme="qwen9"):
        pass
    with watch(llama, scheme=Qwen2VL()) as watched, pytest.raises(ValueError, match="no forward"):
        str(watched)


def test_a_forward_that_never_reaches_the_decoder_is_told(model):
    class Blind(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return x

    blind = Blind(model())
    with watch(blind) as watched:
        blind(torch.ones(1))
    with pytest.raises(ValueError, match=r"reached the rotary embedding.* in 1 "):
        _ = watched.verdict


def test_the_scheme_is_read_from_the_configuration(model):
    expected = {
        "Qwen2-VL": SCHEMES["qwen2_vl"],
        "ColQwen2ForRetrieval": SCHEMES["qwen2_vl"],
        "Qwen2.5-VL": SimpleNamespace(tokens_per_second=3),
        "Qwen3-VL": SCHEMES["qwen3_vl"],
    }
    for name, scheme in expected.items():
        watched = seen_by(model(name), {"input_ids": torch.arange(10, 15)[None]})
        found = watched.calls[0].scheme
        if name == "Qwen2.5-VL":
            assert found.tokens_per_second == scheme.tokens_per_second
        else:
            assert found == scheme
