"""What is each family's own: windows, deepstack, time stamps, borders, full-size shapes."""

import copy
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import Qwen3VLProcessor
from transformers.vision_utils import get_vision_window_index

from colfolio import attention
from colfolio.data.prompts import VIDEO_TOKEN, Prompter, Templates
from colfolio.data.video import Clip
from colfolio.errors import CheckpointError
from colfolio.models.border import Border, frozen_border, frozen_parts
from colfolio.models.families import FAMILIES, family_of, position_scheme_of
from colfolio.models.gradient_checkpointing import checkpoint_layers
from colfolio.models.vision_positions import vision_windows

NAMES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]
# Parameters without the head of a language model, as the published files count them; a tied head is
# in none of them. Qwen2-VL-7B has one of its own: 8,291,375,616 - 152,064 * 3,584.
PUBLISHED = {
    "qwen2-vl-2b": 2_208_985_600,
    "qwen2-vl-7b": 7_746_378_240,
    "qwen2.5-vl-3b": 3_754_622_976,
    "qwen3-vl-2b": 2_127_532_032,
}
BORDERS = [
    *(("qwen2_vl", "vision", n) for n in (1, 2)),
    *(("qwen2_5_vl", "vision", n) for n in (1, 2, 3)),  # in a window, at full attention, in one
    *(("qwen3_vl", "vision", n) for n in (1, 2)),
    *((name, "text", 0) for name in NAMES),
    *(("qwen2_vl", "text", n) for n in (1, 2)),
    *(("qwen2_5_vl", "text", n) for n in (1, 2)),
    *(("qwen3_vl", "text", n) for n in (2, 3)),
]


@pytest.fixture
def clip():
    generator = np.random.default_rng(5)
    return Clip(generator.integers(0, 256, (5, 56, 96, 3), dtype=np.uint8), 0.4)


@pytest.fixture
def documents(pages, clip):
    return [*pages, clip]


def in_float64(retriever, documents):
    retriever.to(torch.float64)
    packed = retriever.collator.documents(documents)
    return dataclasses.replace(packed, patches=packed.patches.double())


@pytest.mark.parametrize(("name", "tower", "layers"), BORDERS)
def test_both_sides_of_a_border_make_the_whole(
    make_family_retriever, documents, name, tower, layers
):
    retriever = make_family_retriever(name)
    packed = in_float64(retriever, documents)
    border = Border(tower, layers)
    below = retriever.run_below(packed, border)
    assert len(below.states) == border.lengths(packed, 2).sum()
    whole = retriever(packed).vectors
    torch.testing.assert_close(retriever(packed, below).vectors, whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "tower", "layers"), BORDERS)
def test_a_row_has_the_same_states_at_a_border_alone_and_in_company(
    make_family_retriever, documents, name, tower, layers
):
    retriever = make_family_retriever(name)
    packed, border = in_float64(retriever, documents), Border(tower, layers)
    together = retriever.run_below(packed, border).states
    alone = [
        retriever.run_below(packed.rows(row, row + 1), border).states for row in range(len(packed))
    ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "tower", "layers"), BORDERS)
def test_frozen_parts_are_what_decides_the_states_at_a_border(
    make_family_retriever, documents, name, tower, layers
):
    retriever = make_family_retriever(name)
    packed, border = in_float64(retriever, documents), Border(tower, layers)
    expected = retriever.run_below(packed, border).states
    inside = {id(w) for part in frozen_parts(retriever.backbone, border) for w in part.parameters()}
    for path, weight in retriever.named_parameters():
        before = weight.detach().clone()
        with torch.no_grad():
            weight.mul_(torch.linspace(1.5, 2.5, weight.numel()).view_as(weight))
            weight.add_(torch.linspace(0, 0.5, weight.numel()).view_as(weight))
            is_decisive = not torch.equal(retriever.run_below(packed, border).states, expected)
            weight.copy_(before)
        assert is_decisive == (id(weight) in inside), path


@pytest.mark.parametrize(
    ("frozen", "border"),
    [
        (["visual"], Border("text", 0)),
        (["visual.patch_embed", "visual.blocks"], None),  # its position embeddings train
        (["visual.patch_embed", "visual.pos_embed", "visual.blocks.0"], Border("vision", 1)),
        (["visual.patch_embed", "visual.pos_embed", "visual.blocks"], Border("vision", 2)),
        (["visual", "language_model.embed_tokens", "language_model.layers.0"], Border("text", 0)),
        (["visual", "language_model.embed_tokens", "language_model.layers"], Border("text", 3)),
    ],
)
def test_deepstack_lies_on_one_side_of_a_border(make_family_retriever, frozen, border):
    backbone = make_family_retriever("qwen3_vl").backbone
    for part in frozen:
        backbone.get_submodule(part).requires_grad_(False)
    assert frozen_border(backbone, is_visual=True) == border


def test_text_without_images_is_frozen_as_far_as_its_layers_are(make_family_retriever):
    backbone = make_family_retriever("qwen3_vl").backbone
    for part in ("embed_tokens", "layers.0"):
        backbone.language_model.get_submodule(part).requires_grad_(False)
    assert frozen_border(backbone, is_visual=False) == Border("text", 1)


@pytest.mark.parametrize("name", NAMES)
def test_units_hold_every_parameter_once_and_each_is_called(make_family_retriever, documents, name):
    retriever = make_family_retriever(name)
    held = [id(weight) for unit in retriever.units() for weight in unit.parameters()]
    assert sorted(held) == sorted(id(weight) for weight in retriever.parameters())
    called = []
    for number, unit in enumerate(retriever.units()):
        unit.register_forward_hook(lambda *_, number=number: called.append(number))
    retriever(retriever.collator.documents(documents))
    assert sorted(called) == list(range(len(retriever.units())))


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_reached(make_family_retriever, documents, name):
    retriever = make_family_retriever(name)
    vectors = retriever(retriever.collator.documents(documents)).vectors
    (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
    for path, weight in retriever.named_parameters():
        assert weight.grad is not None, path
        assert weight.grad.abs().sum() > 0, path


@pytest.mark.parametrize("name", NAMES)
def test_layers_that_are_computed_again_give_the_same_gradient(
    make_family_retriever, own_gradients, documents, name
):
    retriever = make_family_retriever(name).train()
    packed = in_float64(retriever, documents)
    found = []
    for which in ("none", "all"):
        checkpoint_layers(retriever.backbone, which)
        retriever.zero_grad()
        vectors = retriever(packed).vectors
        (vectors * torch.linspace(-1, 1, vectors.numel()).view_as(vectors)).sum().backward()
        found.append(own_gradients(retriever))
    for path, gradient in found[0].items():
        torch.testing.assert_close(found[1][path], gradient, rtol=0, atol=1e-13)


@pytest.mark.parametrize("side", [1, 2, 4])
def test_windows_are_those_of_the_library_whatever_their_order(side):
    grids = torch.tensor([[1, 2, 2], [1, 8, 8], [3, 6, 10], [1, 14, 2], [2, 18, 22]])
    order, bounds = vision_windows(grids, 2, side)
    theirs, their_bounds = get_vision_window_index(grids, 2, 28 * side, 14)
    assert _windows(order, bounds) == _windows(theirs, their_bounds)
    # full attention reads frame by frame
    frames = (grids[:, 1] * grids[:, 2] // 4).repeat_interleave(grids[:, 0]).tolist()
    for mine, their in zip(order.split(frames), theirs.split(frames), strict=True):
        assert set(mine.tolist()) == set(their.tolist())


def _windows(order, bounds):
    lengths = (bounds.diff() // 4).tolist()
    return {tuple(window.tolist()) for window in order.split(lengths)}


def test_windows_of_equal_size_share_a_call():
    _, bounds = vision_windows(torch.tensor([[1, 18, 22]]), 2, 4)  # 9 x 11 tokens
    sizes = (bounds.diff() // 4).tolist()
    assert sizes == [16] * 4 + [12] * 2 + [4] * 2 + [3]


def test_many_equal_windows_go_through_one_call(make_family_retriever, random_image, monkeypatch):
    shapes, attend = [], attention._batched

    def counted(query, *others):
        shapes.append(tuple(query.shape))
        return attend(query, *others)

    retriever = make_family_retriever("qwen2_5_vl")
    monkeypatch.setattr(attention, "_batched", counted)
    retriever(retriever.collator.documents([random_image(112, 168)] * 3))
    in_windows, whole = (2, 3 * 2 * 3, 16, 8), (2, 3, 8 * 12, 8)
    assert shapes[:3] == [in_windows, whole, in_windows]
    assert len(shapes) == 3 + len(retriever.backbone.language_model.layers)


def test_a_clip_of_qwen3_vl_is_written_as_its_processor_does(tiny_tokenizer):
    processor = Qwen3VLProcessor.__new__(Qwen3VLProcessor)
    processor.video_token = VIDEO_TOKEN
    processor.vision_start_token, processor.vision_end_token = "<|vision_start|>", "<|vision_end|>"
    processor.video_processor = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    metadata = SimpleNamespace(fps=2.5, frames_indices=[0, 1, 2, 3, 4])
    inputs = {"video_grid_thw": torch.tensor([[3, 4, 6]]), "video_metadata": [metadata]}
    clip = processor.replace_video_token(inputs, 0)
    templates = FAMILIES["qwen3_vl"].templates
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    text = templates.document.replace(image, clip)
    assert "<|im_start|>user\n<0.2 seconds><|vision_start|><|video_pad|>" in text
    prompter = Prompter(tiny_tokenizer, templates)
    ids = prompter.document_ids([5, 18], {1: [0.2, 1.0, 1.6]})
    assert ids[1] == tiny_tokenizer.encode(text).ids
    assert ids[0] == prompter.document_ids([5])[0]


def test_time_stamps_of_a_clip_say_the_middle_of_each_step(make_family_retriever, clip):
    retriever = make_family_retriever("qwen3_vl")
    (mine,) = retriever.collator.documents([clip]).token_ids.unsqueeze(0).tolist()
    steps = [0.2, 1.0, 1.6]  # frames at 0, 0.4, 0.8, 1.2 and 1.6 s, the last one twice
    assert [mine] == retriever.collator.prompter.document_ids([3 * 6], {0: steps})


@pytest.mark.parametrize(
    "values",
    [
        {"time_stamp": "<now>"},
        {"time_stamp": "<{seconds} of {seconds}>"},
        {"time_stamp": "<{seconds}><|im_end|>"},
        {"time_stamp": "<{seconds}>", "document": "<|image_pad|>"},
    ],
)
def test_time_stamps_without_slot_or_marks_are_refused(tiny_tokenizer, values):
    with pytest.raises(CheckpointError, match=r"\{seconds\} once"):
        Prompter(tiny_tokenizer, Templates(**values))


def test_clips_without_time_stamps_are_refused_where_the_scheme_needs_them(
    make_family_retriever, tiny_shape, clip
):
    templates = tiny_shape.templates.model_copy(update={"time_stamp": ""})
    retriever = make_family_retriever("qwen3_vl", templates=templates)
    with pytest.raises(ValueError, match="text between"):
        retriever.collator.documents([clip])


def test_temporal_positions_follow_the_configured_tokens_a_second(make_family_retriever, clip):
    retriever = make_family_retriever("qwen2_5_vl")
    scheme = {"scheme": "qwen2_5_vl", "tokens_per_second": 3}
    assert retriever.contract.position_scheme == scheme
    packed = retriever.collator.documents([clip])
    times = packed.position_ids[0, packed.token_ids == retriever.collator.prompter.video_token_id]
    assert (times - times[0]).unique().tolist() == [0, 2, 4]  # floor(3 * 0.8 * t)


@pytest.mark.parametrize("name", NAMES)
def test_a_contract_of_a_family_survives_its_file(make_family_retriever, tmp_path, pages, name):
    retriever = make_family_retriever(name).eval()
    retriever.save_pretrained(tmp_path / "model")
    loaded = type(retriever).from_pretrained(tmp_path / "model", device="cpu")
    for field in ("position_scheme", "pixel_budget", "templates"):
        assert getattr(loaded.contract, field) == getattr(retriever.contract, field)
    assert torch.equal(
        loaded.encode_documents(pages).vectors, retriever.encode_documents(pages).vectors
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_full_size_shape_has_as_many_parameters_as_published(name):
    path = Path(__file__).parent / "shapes" / f"{name}.json"
    values = json.loads(path.read_text(encoding="utf-8"))
    family = family_of(values["model_type"], name)
    config = family.config.from_dict(copy.deepcopy(values))
    with torch.device("meta"):
        backbone = family.backbone(config)
    assert sum(weight.numel() for weight in backbone.parameters()) == PUBLISHED[name]
    assert position_scheme_of(config, name) == family.model_type
    assert family.pixel_budget.patch == config.vision_config.patch_size
    head = values.get("hidden_size", 0) * values.get("vocab_size", 0)
    assert name != "qwen2-vl-7b" or PUBLISHED[name] + head == 8_291_375_616
