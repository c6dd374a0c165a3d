"""A grafted decoder: text as before, images by three rows, nothing left behind."""

import copy
import io
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlavaConfig
from transformers import AutoModelForImageTextToText as AutoModelForImages

from colfolio.mrope.graft import MultimodalRotary, graft, ungraft
from colfolio.mrope.positions import padded_position_ids
from colfolio.mrope.schemes import Qwen2_5VL, VideoRoPE

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
# name: (model type, layout of cos and sin, settings); all turn 8 frequencies
FAMILIES = {
    "llama": ("llama", "halves", {"rope_parameters": ROPE}),
    "llama linear": (
        "llama",
        "halves",
        {"rope_parameters": ROPE | {"rope_type": "linear", "factor": 2.0}},
    ),
    "llama dynamic": (
        "llama",
        "halves",
        {
            "rope_parameters": ROPE | {"rope_type": "dynamic", "factor": 2.0},
            "max_position_embeddings": 6,
        },
    ),
    "llama yarn": (
        "llama",
        "halves",
        {
            "rope_parameters": ROPE
            | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
        },
    ),
    "llama llama3": (
        "llama",
        "halves",
        {
            "rope_parameters": ROPE
            | {
                "rope_type": "llama3",
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "qwen2": ("qwen2", "halves", {"rope_parameters": ROPE}),
    "qwen3": ("qwen3", "halves", {"rope_parameters": ROPE, "head_dim": 16}),
    "mistral": ("mistral", "halves", {"rope_parameters": ROPE}),
    "smollm3": ("smollm3", "halves", {"rope_parameters": ROPE}),
    "gemma2": ("gemma2", "halves", {"rope_parameters": ROPE, "head_dim": 16} | MIXED),
    "gemma3": ("gemma3_text", "halves", {"head_dim": 16} | MIXED),
    "phi3, half of each head": (
        "phi3",
        "halves",
        {
            "rope_parameters": ROPE | {"partial_rotary_factor": 0.5},
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
        },
    ),
    "granite": ("granite", "halves", {"rope_parameters": ROPE}),
    "olmo2": ("olmo2", "halves", {"rope_parameters": ROPE}),
    "gpt-neox": (
        "gpt_neox",
        "halves",
        {"rope_parameters": ROPE | {"partial_rotary_factor": 1.0}},
    ),
    "cohere": ("cohere", "pairs", {"rope_parameters": ROPE}),
    "gpt-oss": (
        "gpt_oss",
        "single",
        {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1} | MIXED,
    ),
}
# not the default, so that a lost one is seen
SECTIONS = (1, 5, 2)
AXES = [0, 1, 1, 1, 1, 1, 2, 2]
COLUMNS = {
    "halves": AXES + AXES,
    "pairs": [axis for axis in AXES for _ in range(2)],
    "single": AXES,
}


def config_of(family="llama", **settings):
    kind, _, own = FAMILIES[family]
    return AutoConfig.for_model(kind, **(SIZES | own | settings))


def build(family="llama", **settings):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_of(family, **settings)).eval()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def tokens(rows=2, length=10, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, 64, (rows, length), generator=generator)


def image_positions(rows=2):
    """A row of 2 text tokens, an image of 2 x 3, 2 text tokens: `[3, rows, 10]`."""
    types = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 0, 0]]).expand(rows, -1)
    return padded_position_ids(types, None, torch.tensor([[1, 4, 6]] * rows))


@torch.no_grad()
def text_logits(model):
    """Logits of text in every form in which it is given."""
    model = copy.deepcopy(model)  # some types of RoPE remember the longest text
    ids, mask = tokens(), torch.ones(2, 10, dtype=torch.int64)
    mask[0, :3] = 0
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    packed = torch.cat([torch.arange(6), torch.arange(4)])[None]
    start = model(ids[:, :7], use_cache=True)
    steps, cache = [start.logits], start.past_key_values
    for place in range(7, 10):
        step = model(ids[:, place : place + 1], past_key_values=cache, use_cache=True)
        steps.append(step.logits)
    return {
        "plain": model(ids).logits,
        "embeddings": model(inputs_embeds=model.get_input_embeddings()(ids)).logits,
        "left padding": model(ids, attention_mask=mask).logits,
        "left padding, own ids": model(ids, attention_mask=mask, position_ids=counted).logits,
        "packed": model(ids[:1], position_ids=packed, use_cache=False).logits,
        "behind a cache": torch.cat(steps, 1),
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for form, logits in expected.items():
        assert torch.equal(found[form], logits), form


def test_text_stays_bit_for_bit(family, tmp_path):
    model = build(family)
    keys, before = list(model.state_dict()), text_logits(model)
    assert graft(model, sections=SECTIONS) is model
    assert list(model.state_dict()) == keys
    assert_same(text_logits(model), before)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert list(again.state_dict()) == keys
    assert_same(text_logits(graft(again)), before)
    assert again.base_model.rotary_emb.sections == SECTIONS
    assert_same(text_logits(ungraft(model)), before)


def test_three_equal_rows_are_text_bit_for_bit(family):
    model = graft(build(family), sections=SECTIONS)
    ids, rows = tokens(), torch.arange(10).expand(3, 2, 10)
    assert torch.equal(model(ids, position_ids=rows).logits, model(ids).logits)


def test_three_rows_of_an_image_have_an_effect(family):
    model = graft(build(family), sections=SECTIONS)
    ids, rows = tokens(), image_positions()
    flat, lifted = model(ids).logits, model(ids, position_ids=rows).logits
    # the image begins at token 2, whose distances to what precedes it are those of text
    torch.testing.assert_close(flat[:, :3], lifted[:, :3])
    assert ((flat - lifted)[:, 3:].abs().amax(-1) > 1e-4).all()
    for row in rows:
        assert (model(ids, position_ids=row).logits - lifted).abs().max() > 1e-4


def test_each_column_turns_by_the_row_of_its_axis(family):
    model = build(family)
    decoder = model.base_model
    layer_types = {"gemma3_text": ["sliding_attention", "full_attention"]}
    for layer_type in layer_types.get(FAMILIES[family][0], [None]):
        kwargs = {} if layer_type is None else {"layer_type": layer_type}
        original = copy.deepcopy(decoder.rotary_emb)
        rotary = graft(copy.deepcopy(model), sections=SECTIONS).base_model.rotary_emb
        # all rows reach as far, for a dynamic RoPE looks at the longest position
        rows = torch.stack([torch.randperm(9).expand(2, 9) for _ in range(3)])
        x = torch.zeros(2, 9, 1)
        found = rotary(x, rows, **kwargs)
        single = [original(x, row, **kwargs) for row in rows]
        for part in (0, 1):
            assert torch.equal(rotary(x, rows[1], **kwargs)[part], single[1][part])
            columns = COLUMNS[FAMILIES[family][1]]
            assert found[part].shape == (2, 9, len(columns))
            for column, axis in enumerate(columns):
                expected = single[axis][part][..., column]
                assert torch.equal(found[part][..., column], expected), column


def test_a_step_behind_a_cache_equals_the_whole(family):
    model = graft(build(family), sections=SECTIONS)
    ids, rows = tokens(), image_positions()
    whole = model(ids, position_ids=rows).logits
    if "dynamic" in family:
        # its keys in the cache were turned by other frequencies than the whole's
        rows, whole = rows * 0, model(ids, position_ids=rows * 0).logits
    start = model(ids[:, :8], position_ids=rows[..., :8], use_cache=True)
    logits, cache = [start.logits], start.past_key_values
    for place in (8, 9):
        step = slice(place, place + 1)
        out = model(ids[:, step], position_ids=rows[..., step], past_key_values=cache)
        logits.append(out.logits)
    torch.testing.assert_close(torch.cat(logits, 1), whole, rtol=1e-4, atol=1e-4)


def test_a_graft_never_changes_what_a_rotary_embedding_remembers():
    model = build("llama dynamic")
    model(tokens(length=20))
    remembered = model.model.rotary_emb.inv_freq.clone()
    graft(model)
    assert torch.equal(model.model.rotary_emb.original.inv_freq, remembered)
    assert model.model.rotary_emb.original.max_seq_len_cached == 20


def test_every_published_scheme_is_restored_from_a_checkpoint(tmp_path):
    for scheme in ("qwen2_vl_published", Qwen2_5VL(True, 4.0), "qwen3_vl", VideoRoPE(3)):
        model = graft(build(), scheme)
        before = model.base_model.rotary_emb
        model.save_pretrained(tmp_path)
        for kind in (AutoModel, AutoModelForCausalLM):
            after = graft(kind.from_pretrained(tmp_path)).base_model.rotary_emb
            assert (after.scheme, after.sections) == (before.scheme, before.sections)
            assert torch.equal(after.axes, before.axes)


def test_the_configuration_says_the_scheme_in_plain_words(tmp_path):
    model = graft(build(), VideoRoPE(temporal_spacing=3))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["mrope"]
    assert saved == {"scheme": "videorope", "temporal_spacing": 3, "sections": [2, 3, 3]}


def tiny_llava():
    vision = AutoConfig.for_model(
        "clip_vision_model",
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1},
        **{"num_attention_heads": 2, "image_size": 28, "patch_size": 14},
    )
    return AutoModelForImages.from_config(
        LlavaConfig(vision_config=vision, text_config=config_of())
    )


def test_in_a_composite_model_the_text_configuration_has_it(tmp_path):
    model = tiny_llava()
    keys = list(model.state_dict())
    graft(model, "qwen3_vl").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["text_config"]["mrope"] == {"scheme": "qwen3_vl", "sections": [4, 2, 2]}
    assert "mrope" not in saved
    again = graft(AutoModelForImages.from_pretrained(tmp_path))
    assert list(again.state_dict()) == keys
    assert again.model.language_model.rotary_emb.sections == (4, 2, 2)


def test_ungraft_leaves_the_very_same_model():
    model = build()
    decoder = model.model
    modules, config = dict(model.named_modules()), model.config.to_dict()
    graft(model)
    assert isinstance(decoder.rotary_emb, MultimodalRotary)
    assert ungraft(model) is model
    assert list(dict(model.named_modules())) == list(modules)
    assert all(part is modules[name] for name, part in model.named_modules())
    assert model.config.to_dict() == config
    hooks = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks")
    for name in (*hooks, "_forward_hooks_always_called"):
        assert not getattr(decoder, name), name
    graft(model, "qwen3_vl")
    assert decoder.rotary_emb.sections == (4, 2, 2)


class Held(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)


def test_the_decoder_is_found_wherever_it_is_held():
    model = build()
    decoder = model.model
    for outer in (decoder, model, Held(nn.Linear(2, 2), model)):
        assert graft(outer) is outer
        assert isinstance(decoder.rotary_emb, MultimodalRotary)
        assert ungraft(outer) is outer


def test_the_decoder_is_found_under_adapters():
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build(), peft.LoraConfig(target_modules=["q_proj"]))
    graft(adapted)
    ids = tokens()
    lifted = adapted(input_ids=ids, position_ids=image_positions()).logits
    assert (lifted - adapted(input_ids=ids).logits).abs().max() > 1e-4
    ungraft(adapted)


def test_copies_and_pickles_have_hooks_of_their_own():
    model = graft(build())
    ids, rows = tokens(), image_positions()
    expected = model(ids, position_ids=rows).logits
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for other in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert torch.equal(other(ids, position_ids=rows).logits, expected)
        flat = ungraft(other)(ids).logits
        assert not other.model._forward_pre_hooks
        assert (flat - expected).abs().max() > 1e-4
    assert torch.equal(model(ids, position_ids=rows).logits, expected)


def test_positional_arguments_are_taken_as_by_name():
    decoder = graft(build()).model
    ids, mask, rows = tokens(), torch.ones(2, 10, dtype=torch.int64), image_positions()
    expected = decoder(ids, attention_mask=mask, position_ids=rows).last_hidden_state
    assert torch.equal(decoder(ids, mask, rows).last_hidden_state, expected)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_never_changes_the_gradient(use_reentrant):
    model = graft(build()).train()
    ids, rows = tokens(), image_positions()

    def gradients():
        model.zero_grad()
        model(ids, position_ids=rows, use_cache=False).logits.square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    for found, wanted in zip(gradients(), expected, strict=True):
        assert torch.equal(found, wanted)


def test_a_grafted_decoder_goes_to_another_dtype():
    before, after = graft(build().bfloat16()), graft(build()).bfloat16()
    ids, rows = tokens(), image_positions()
    assert after.model.rotary_emb.axes.dtype == torch.int64
    found = after(ids, position_ids=rows).logits
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, before(ids, position_ids=rows).logits)
    ungraft(after)
    assert torch.equal(after(ids).logits, build().bfloat16()(ids).logits)


def test_generation_goes_on_from_three_rows():
    model = graft(build())
    ids, rows = tokens(), image_positions()
    found = model.generate(
        ids,
        position_ids=rows,
        attention_mask=torch.ones_like(ids),
        **{"max_new_tokens": 4, "do_sample": False, "eos_token_id": None},
    )
    for _ in range(4):
        best = model(ids, position_ids=rows).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, best[:, None]], 1)
        rows = torch.cat([rows, rows[..., -1:] + 1], -1)
    assert torch.equal(found, ids)


def test_text_ids_first_make_the_mask_of_packed_sequences():
    model = graft(build())
    ids, rows = tokens(), image_positions(1)
    alone = [model(row[None], position_ids=rows).logits for row in ids]
    text = torch.arange(10).expand(1, 1, 10)
    packed = torch.cat([torch.cat([text, rows]), torch.cat([text, rows])], -1)  # [4, 1, 20]
    together = model(ids.reshape(1, 20), position_ids=packed, use_cache=False).logits
    torch.testing.assert_close(together, torch.cat(alone, 1))


def test_masks_and_layers_never_see_three_rows():
    decoder = graft(build()).model
    seen = []
    decoder.layers[0].register_forward_pre_hook(
        lambda *call: seen.append(call[2]["position_ids"]), with_kwargs=True
    )
    rows, text = image_positions(), torch.arange(10).expand(2, 10)
    decoder(tokens(), position_ids=rows)
    decoder(tokens(), position_ids=torch.cat([text[None], rows]))
    assert torch.equal(seen[0], text[:1])
    assert torch.equal(seen[1], text)


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_decoder_leaves_no_positions_behind(stop, monkeypatch):
    model = graft(build())
    expected = model(tokens()).logits

    def fail(*args, **kwargs):
        raise stop

    monkeypatch.setattr(model.model.layers[1], "forward", fail)
    with pytest.raises(stop):
        model(tokens(), position_ids=image_positions())
    monkeypatch.undo()
    if stop is RuntimeError:
        assert model.model.rotary_emb.pending is None
    assert torch.equal(model(tokens()).logits, expected)


def test_the_positions_used_are_those_of_this_call():
    model = graft(build())
    decoder, seen = model.model, []
    decoder.rotary_emb.register_forward_pre_hook(
        lambda *call: seen.append(call[0].positions_used(call[2]["position_ids"])),
        with_kwargs=True,
    )
    rows = image_positions()
    model(tokens(), position_ids=rows)
    model(tokens())
    assert torch.equal(seen[0], rows)
    assert torch.equal(seen[1], torch.arange(10)[None])
    given = torch.zeros(1, 1)
    assert decoder.rotary_emb.positions_used(given) is given


@pytest.mark.parametrize(
    ("position_ids", "message"),
    [
        (torch.zeros(3, 2, 10), r"LlamaModel: .*float32.* whole numbers.*long"),
        (torch.zeros(3, 2, 10, dtype=torch.bool), r"whole numbers"),
        (torch.zeros(2, 2, 10).long(), r"\[2, 2, 10\].*\[4, batch, length\]"),
        (torch.zeros(1, 3, 2, 10).long(), r"\[1, 3, 2, 10\].*must be \[batch, length\]"),
        (torch.zeros(3, 2, 9).long(), r"\[3, 2, 9\].*inputs \[2, 10\]"),
        (torch.zeros(3, 1, 10).long(), r"\[3, 1, 10\].*inputs \[2, 10\]"),
        (torch.zeros(4, 2, 11).long(), r"\[4, 2, 11\].*inputs \[2, 10\]"),
        (torch.zeros(3, 10).long(), r"\[3, 10\].*position_ids\[:, None\]"),
    ],
)
def test_position_ids_that_do_not_fit_are_named(position_ids, message):
    model = graft(build())
    with pytest.raises(ValueError, match=message):
        model(tokens(), position_ids=position_ids)
    embeddings = model.get_input_embeddings()(tokens())
    with pytest.raises(ValueError, match=message):
        model(inputs_embeds=embeddings, position_ids=position_ids)
    assert model.model.rotary_emb.pending is None


def test_three_rows_of_text_ids_for_three_sequences_are_text():
    model = graft(build())
    ids = tokens(rows=3)
    rows = torch.arange(10).expand(3, 10)
    assert torch.equal(model(ids, position_ids=rows).logits, model(ids).logits)


def refusal(model, *args):
    """The message with which a graft is refused, and that it changed nothing."""
    config, keys = copy.deepcopy(model.config.to_dict()), list(dict(model.named_modules()))
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        graft(model, *args)
    assert model.config.to_dict() == config
    assert list(dict(model.named_modules())) == keys
    assert not any(part._forward_pre_hooks for part in model.modules())
    return str(caught.value)


@pytest.mark.parametrize("sections", [(16, 24, 24), (2, 3, 4)])
def test_sections_must_sum_to_the_frequencies(sections):
    message = refusal(build(), None, sections)
    assert f"sections {sections} sum to {sum(sections)}" in message
    assert "LlamaModel turn 8 frequencies (head size 16): e.g. (2, 3, 3)" in message


@pytest.mark.parametrize("sections", [(4, 4), (), torch.tensor([2.0, 3.0, 3.0])])
def test_sections_are_three_whole_numbers(sections):
    told = "three whole numbers, time, height and width"
    assert told in refusal(build(), None, sections)
    assert "e.g. (2, 3, 3)" in refusal(build(), None, sections)


@pytest.mark.parametrize("kind", [torch.tensor, list, tuple])
def test_sections_of_any_kind_are_saved_as_plain_numbers(kind, tmp_path):
    model = graft(build(), sections=kind([4, 2, 2]))
    model.save_pretrained(tmp_path)
    again = graft(type(model).from_pretrained(tmp_path))
    assert again.config.mrope == {"scheme": "qwen2_vl", "sections": [4, 2, 2]}


def test_threads_never_see_each_other_s_positions():
    model = graft(build()).eval()
    tokens, rows = torch.arange(6)[None], torch.randint(0, 9, (3, 1, 6))
    with torch.no_grad():
        text, seen = model(tokens).logits, model(tokens, position_ids=rows).logits

    def run(number):
        with torch.no_grad():
            if number % 2:
                return torch.equal(model(tokens).logits, text)
            return torch.equal(model(tokens, position_ids=rows).logits, seen)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(run, range(400)))


def test_packed_sequences_are_apart_without_a_word_on_the_cache():
    model = graft(build()).eval()
    tokens = torch.randint(0, 60, (1, 6))
    rows = torch.tensor([[0, 1, 1, 1, 1, 3]] * 3)[:, None]  # [3, 1, 6]
    alone = model(tokens, position_ids=rows).logits
    packed_rows = torch.cat([torch.arange(6).expand(1, 1, -1), rows]).repeat(1, 1, 2)
    packed = model(tokens.repeat(1, 2), position_ids=packed_rows).logits
    torch.testing.assert_close(packed, alone.repeat(1, 2, 1), rtol=0, atol=1e-4)  # logits of 50


def test_sections_that_a_scheme_cannot_lay_out_are_refused():
    assert "interleaved" in refusal(build(), "qwen3_vl", (1, 1, 6))


def test_an_unknown_scheme_is_refused():
    assert "'qwen9' is none of qwen2_vl" in refusal(build(), "qwen9")


def test_learned_positions_are_refused():
    config = AutoConfig.for_model("gpt2", vocab_size=8, n_embd=8, n_layer=1, n_head=2)
    message = refusal(AutoModelForCausalLM.from_config(config))
    assert (
        "GPT2LMHeadModel cannot be grafted: it has learned positions (transformer.wpe)" in message
    )
    assert "what fits is LlamaModel" in message


def test_a_model_without_any_decoder_is_refused():
    with pytest.raises(ValueError, match=r"Linear cannot be grafted: no module of it has"):
        graft(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"Linear cannot be grafted"):
        ungraft(nn.Linear(2, 2))


def tiny_qwen_vl(**rope):
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 64, "num_heads": 2}
    text = SIZES | {"rope_parameters": ROPE | rope}
    config = AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision)
    return AutoModelForImages.from_config(config)


@pytest.mark.parametrize("rope", [{"mrope_section": [2, 3, 3]}, {}])
def test_a_decoder_that_has_mrope_is_refused(rope):
    message = refusal(tiny_qwen_vl(**rope))
    assert "Qwen2VLTextModel has M-RoPE already" in message
    assert f"mrope_section {rope.get('mrope_section', [16, 24, 24])}" in message


def test_two_decoders_are_refused():
    with pytest.raises(
        ValueError,
        match=r"Held holds 2 decoders: parts.0.model \(LlamaModel\), "
        r"parts.1.model \(Qwen2Model\); pass the one",
    ):
        graft(Held(build(), build("qwen2")))


def test_a_tower_without_token_embeddings_does_not_count():
    tower, model = build(), build()
    del tower.model.embed_tokens
    graft(Held(tower, model))
    assert isinstance(model.model.rotary_emb, MultimodalRotary)
    assert not isinstance(tower.model.rotary_emb, MultimodalRotary)


def test_complex_frequencies_are_refused():
    config = AutoConfig.for_model("llama4_text", **SIZES, intermediate_size_mlp=48, head_dim=16)
    config.moe_layers, config.num_local_experts = [], 1
    message = refusal(AutoModelForCausalLM.from_config(config))
    assert "Llama4TextRotaryEmbedding of Llama4TextModel cannot be grafted" in message
    assert "returns [1, 4, 8] (torch.complex64)" in message


def test_frequencies_that_differ_between_layers_are_refused():
    model = build("gemma3")
    rotary = model.model.rotary_emb
    rotary.sliding_attention_inv_freq = rotary.sliding_attention_inv_freq[:4]
    message = refusal(model)
    assert "Gemma3TextModel turns other frequencies in other layers" in message
    assert "sliding_attention: 4 (halves)" in message
    assert "full_attention: 8 (halves)" in message


def test_learned_frequencies_are_refused():
    model = build()
    rotary = model.model.rotary_emb
    rotary.register_buffer("inv_freq", rotary.inv_freq, persistent=True)
    assert "LlamaRotaryEmbedding of LlamaModel saves inv_freq" in refusal(model)


def test_a_rotary_embedding_called_in_another_way_is_refused(monkeypatch):
    model = build()
    monkeypatch.setattr(model.model.rotary_emb, "forward", lambda length: length)
    assert "called as (x, position_ids), it raises TypeError" in refusal(model)


def test_a_model_without_weights_is_refused():
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of())
    assert "it is on the meta device; load the weights first" in refusal(model)


def test_a_graft_on_a_graft_is_refused():
    model = graft(build())
    with pytest.raises(ValueError, match=r"LlamaModel is grafted already: Qwen2VL.*ungraft"):
        graft(model)


def test_what_was_never_grafted_is_not_ungrafted():
    model = build()
    with pytest.raises(ValueError, match=r"LlamaModel is not grafted.*LlamaRotaryEmbedding"):
        ungraft(model)
    with pytest.raises(ValueError, match=r"not grafted"):
        ungraft(ungraft(graft(model)))


def test_settings_other_than_the_checkpoint_s_are_refused(tmp_path):
    graft(build(), "qwen3_vl").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    for asked in (("qwen2_vl",), (None, (2, 3, 3)), ("videorope", (4, 2, 2))):
        message = refusal(model, *asked)
        assert "says Qwen3VL(), sections (4, 2, 2), but" in message
        assert "sections (2, 3, 3) was asked for" in message or asked[0] == "videorope"
    assert graft(model, "qwen3_vl", (4, 2, 2)).model.rotary_emb.sections == (4, 2, 2)
    ungraft(model)
    assert graft(model, "qwen2_vl").model.rotary_emb.sections == (2, 3, 3)


def test_models_of_one_configuration_are_ungrafted_in_any_order():
    config = config_of()
    models = [AutoModelForCausalLM.from_config(config) for _ in range(2)]
    for model in models:
        graft(model)
    for model in models:
        ungraft(model)
        assert not isinstance(model.model.rotary_emb, MultimodalRotary)
