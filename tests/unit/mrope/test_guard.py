"""The guard on real models: right ones pass, and every fault is made once and named."""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import (
    ColQwen2Config,
    ColQwen2ForRetrieval,
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
from colfolio.mrope.guard import watch
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
    assert seen_by(llama, {"input_ids": ids}).verdict == Verdict((), 2)
    unknown = seen_by(llama, {"inputs_embeds": torch.randn(2, 6, 16)}).verdict
    assert not unknown.is_right
    assert "token_types" in unknown.unjudged
    assert not unknown.findings


def test_generation_is_judged_by_its_first_step(model):
    qwen, inputs = model("Qwen2-VL generating"), batch_of(PAGE)
    with watch(qwen, image_grid_thw=inputs.grids["image"]) as watched, watch(qwen) as untold:
        qwen.generate(**inputs.kwargs(), max_new_tokens=3, do_sample=False)
    assert len(watched.verdicts) > 1
    assert watched.verdicts[0].is_right
    assert all("cache" in verdict.unjudged for verdict in watched.verdicts[1:])
    assert watched.verdict is watched.verdicts[0]
    # the library makes features and ids before the forward, and passes no grids on
    assert "pass image_grid_thw" in untold.verdict.unjudged


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
        assert watched.calls == []
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
    assert entered[0].calls == []


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
    verdict = seen_by(model(), inputs.kwargs(), token_types=torch.zeros(2, 4)).verdict
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


def test_a_table_without_expected_positions_still_shows_those_seen(llama):
    place = seen_by(llama, {"inputs_embeds": torch.randn(1, 3, 16)}).table()[-1]
    assert (place.index, place.kind, place.seen, place.expected) == (2, "unknown", (2, 2, 2), ())


def test_models_that_cannot_be_watched_are_refused():
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
