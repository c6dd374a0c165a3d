"""A grafted backbone: packed as row by row, text as before, images by three positions."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from colfolio.data.video import Clip
from colfolio.errors import CheckpointError
from colfolio.models import Retriever, base_from_shape
from colfolio.models.border import Border
from colfolio.models.gradient_checkpointing import checkpoint_layers
from colfolio.models.grafted import DECODERS, GraftedConfig, GraftedModel
from colfolio.models.linear import speed_up_linears
from colfolio.models.towers import run_text
from colfolio.mrope import graft, watch
from colfolio.mrope.graft import MultimodalRotary

# what differs from the tiny decoder, whose vocabulary and heads are small
OWN = {
    "mistral": {"sliding_window": None},
    "phi3": {"pad_token_id": 0},
    "qwen3": {"head_dim": 8},
    "smollm3": {"pad_token_id": 0},
}


@pytest.fixture
def make_grafted(tiny_shape_of, tiny_tokenizer):
    """Builds a tiny grafted retriever; its biases are drawn too, so that a lost one is seen."""

    def make(decoder="qwen2", seed=0, text=None, vision=None, **backbone):
        shape = tiny_shape_of("colfolio_grafted")
        values = copy.deepcopy(shape.backbone) | backbone
        values["text_config"] |= {"model_type": decoder} | OWN.get(decoder, {}) | (text or {})
        values["vision_config"] |= vision or {}
        shape = shape.model_copy(update={"backbone": values})
        retriever = base_from_shape(shape, tiny_tokenizer, seed).eval()
        generator = torch.Generator().manual_seed(1)
        for name, parameter in retriever.named_parameters():
            if name.endswith("bias"):
                torch.nn.init.normal_(parameter, generator=generator)
        return retriever

    return make


@pytest.fixture
def grafted(make_grafted):
    return make_grafted()


class PlainTowers:
    """The weights of a grafted retriever in towers of the library, run one row at a time."""

    def __init__(self, retriever, attention="sdpa"):
        backbone, dtype = retriever.backbone, retriever.projection.weight.dtype
        config = copy.deepcopy(backbone.config)
        del config.text_config.mrope
        self.text = AutoModel.from_config(config.text_config, attn_implementation=attention)
        config.vision_config._attn_implementation = attention
        self.visual = Qwen2VisionTransformerPretrainedModel(config.vision_config)
        for mine, theirs in (
            (self.text, backbone.language_model),
            (self.visual, backbone.visual),
        ):
            mine.to(dtype).eval().load_state_dict(theirs.state_dict(), strict=True)
        graft(self.text, retriever.contract.position_scheme, config.mrope_section)
        self.projection = copy.deepcopy(retriever.projection)
        self.visual_ids = (config.image_token_id, config.video_token_id)

    def vectors(self, packed):
        """Vectors of all rows."""
        patches = iter(packed.patches.split(packed.grid_thw.prod(dim=1).tolist()))
        grids = iter(packed.grid_thw)
        lengths = packed.lengths.tolist()
        rows = zip(
            packed.token_ids.split(lengths), packed.position_ids.split(lengths, dim=1), strict=True
        )
        return torch.cat([self._row(*row, patches, grids) for row in rows])

    def _row(self, token_ids, positions, patches, grids):
        states = self.text.embed_tokens(token_ids)
        is_visual = torch.isin(token_ids, torch.tensor(self.visual_ids))
        if is_visual.any():
            features = self.visual(next(patches), next(grids)[None]).pooler_output
            states = states.masked_scatter(is_visual[:, None], features)
        hidden = self.text(
            inputs_embeds=states[None], position_ids=positions[:, None], use_cache=False
        ).last_hidden_state[0]
        return F.normalize(self.projection(hidden), dim=-1)

    def gradients(self):
        parts = {
            "backbone.language_model": self.text,
            "backbone.visual": self.visual,
            "projection": self.projection,
        }
        return {
            f"{part}.{name}": parameter.grad
            for part, module in parts.items()
            for name, parameter in module.named_parameters()
        }


@pytest.fixture
def clip():
    frames = np.random.default_rng(3).integers(0, 256, (3, 56, 84, 3), dtype=np.uint8)
    return Clip(frames, 0.5)


@pytest.fixture
def batches(texts, pages, clip):
    """Pages of several sizes and a clip in one batch, texts in another."""

    def of(retriever):
        packed = retriever.collator.documents([pages[0], clip, pages[3], pages[6]])
        dtype = retriever.projection.weight.dtype
        return [
            dataclasses.replace(packed, patches=packed.patches.to(dtype)),
            retriever.collator.queries(texts),
        ]

    return of


@pytest.mark.parametrize("scheme", ["qwen2_vl", "videorope"])
@pytest.mark.parametrize("decoder", DECODERS)
def test_packed_equals_one_by_one_forward_and_backward(decoder, scheme, make_grafted, batches):
    retriever = make_grafted(decoder, scheme=scheme).to(torch.float64)
    plain = PlainTowers(retriever)
    generator = torch.Generator().manual_seed(1)
    for packed in batches(retriever):
        mine, theirs = retriever(packed).vectors, plain.vectors(packed)
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)
        weights = torch.randn(mine.shape, generator=generator, dtype=mine.dtype)
        for vectors in (mine, theirs):
            (vectors * weights).sum().backward()
    expected = plain.gradients()
    for name, parameter in retriever.named_parameters():
        difference = (parameter.grad - expected[name]).abs().max()
        assert difference <= 1e-10 * max(1, expected[name].abs().max()), name


@pytest.mark.parametrize("decoder", DECODERS)
def test_text_alone_is_what_the_decoder_without_a_graft_makes_of_it(decoder, make_grafted, texts):
    retriever = make_grafted(decoder)
    mine = retriever.backbone.language_model
    config = copy.deepcopy(mine.config)
    del config.mrope
    plain = AutoModel.from_config(config, attn_implementation=config._attn_implementation).eval()
    plain.load_state_dict(mine.state_dict())
    speed_up_linears(plain)
    assert not isinstance(plain.rotary_emb, MultimodalRotary)
    packed = retriever.collator.queries(texts)
    states = mine.embed_tokens(packed.token_ids)
    expected = plain(
        inputs_embeds=states[None],
        position_ids=packed.position_ids[:1],
        cu_seq_lens_q=packed.offsets,
        use_cache=False,
    ).last_hidden_state[0]
    assert torch.equal(run_text(mine, states, packed), expected)


def test_images_turn_by_all_three_positions(grafted, pages):
    packed = grafted.collator.documents(pages[3:4])
    right = grafted(packed).vectors
    text_alike = torch.arange(packed.position_ids.shape[1]).expand(3, -1)
    flattened = dataclasses.replace(packed, position_ids=text_alike)
    transposed = dataclasses.replace(packed, position_ids=packed.position_ids[[0, 2, 1]])
    for wrong in (flattened, transposed):
        assert (grafted(wrong).vectors - right).abs().max() > 1e-3


def test_a_layer_ends_where_it_is_told_to(grafted, batches):
    for packed in batches(grafted):
        whole = grafted(packed).vectors
        borders = [Border("text", 1), Border("text", 2)]
        if len(packed.grid_thw):
            borders += [Border("vision", 1), Border("text", 0)]
        for border in borders:
            vectors = grafted(packed, grafted.run_below(packed, border)).vectors
            torch.testing.assert_close(vectors, whole, rtol=0, atol=1e-6)


def test_the_guard_finds_positions_right_and_flattened_ones_flattened(grafted, pages, texts):
    with watch(grafted) as watched:
        grafted(grafted.collator.documents(pages))
        grafted(grafted.collator.queries(texts))
    assert [verdict.is_right for verdict in watched.verdicts] == [True, True]
    packed = grafted.collator.documents(pages[3:4])
    text_alike = torch.arange(packed.position_ids.shape[1]).expand(3, -1)
    with watch(grafted) as watched:
        grafted(dataclasses.replace(packed, position_ids=text_alike))
    assert watched.verdict.faults == {"flattened"}


def test_layers_computed_again_give_the_same_gradient(make_grafted, batches):
    gradients = []
    for which in ("none", "all"):
        retriever = make_grafted().train()
        checkpoint_layers(retriever.backbone, which)
        sum(retriever(packed).vectors[:, 0].sum() for packed in batches(retriever)).backward()
        gradients.append([parameter.grad for parameter in retriever.parameters()])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-6)


def test_one_seed_gives_one_set_of_weights(tiny_shape_of, tiny_tokenizer):
    shape = tiny_shape_of("colfolio_grafted")
    first, again, other = (
        base_from_shape(shape, tiny_tokenizer, seed).contract.base_hash for seed in (0, 0, 1)
    )
    assert first == again != other


@pytest.mark.parametrize("decoder", ["llama", "qwen2"])
@pytest.mark.parametrize("scheme", ["qwen2_vl", {"scheme": "videorope", "temporal_spacing": 3}])
def test_a_saved_model_loads_to_the_bit(decoder, scheme, make_grafted, batches, tmp_path):
    retriever = make_grafted(decoder, scheme=scheme)
    assert retriever.contract.position_scheme == scheme
    retriever.save_pretrained(tmp_path / "first")
    loaded = Retriever.from_pretrained(tmp_path / "first", device="cpu")
    assert loaded.contract.position_scheme == scheme
    assert {name.split(".")[0] for name in loaded.backbone.state_dict()} == {
        "visual",
        "language_model",
    }
    for name, buffer in retriever.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name
    for packed in batches(retriever):
        assert torch.equal(loaded(packed).vectors, retriever(packed).vectors)
    loaded.save_pretrained(tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_the_backbone_alone_loads_as_any_model_of_the_library(grafted, tmp_path):
    grafted.backbone.save_pretrained(tmp_path)
    loaded = GraftedModel.from_pretrained(tmp_path)
    for name, tensor in grafted.backbone.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for name, buffer in grafted.backbone.named_buffers():
        assert torch.equal(loaded.get_buffer(name), buffer), name


def test_a_scheme_other_than_the_contract_says_is_refused(grafted, tmp_path):
    grafted.save_pretrained(tmp_path / "model")
    path = tmp_path / "model" / "colfolio.json"
    path.write_text(path.read_text().replace('"qwen2_vl"', '"videorope"'))
    with pytest.raises(CheckpointError, match=r"position_scheme.*videorope"):
        Retriever.from_pretrained(tmp_path / "model")


def test_building_a_model_leaves_the_configuration_of_its_decoder_alone():
    text = AutoConfig.for_model("llama", hidden_size=32, num_attention_heads=4)
    config = GraftedConfig(text, {"hidden_size": 32}, scheme="qwen2_vl")
    with torch.device("meta"):
        GraftedModel(config)
    assert config.text_config.mrope["scheme"] == "qwen2_vl"
    assert not hasattr(text, "mrope")


def test_a_scheme_other_than_that_of_an_earlier_graft_is_refused():
    text = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 4}
    config = GraftedConfig(text | {"mrope": {"scheme": "videorope"}}, {"hidden_size": 32})
    with torch.device("meta"), pytest.raises(ValueError, match="says VideoRoPE"):
        GraftedModel(config)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ({"model_type": "gpt2"}, "'gpt2' cannot be grafted here"),
        ({"model_type": "qwen2_vl_text"}, "'qwen2_vl_text' cannot be grafted here"),
        ({"model_type": "no such"}, "'no such' cannot be grafted here; what can is llama"),
        ({"model_type": "gemma2"}, "'gemma2' cannot be grafted here"),
        ({"model_type": "mistral", "sliding_window": 64}, "mistral.*sliding_window to null"),
        (
            {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1},
            "layers of full_attention, sliding_attention",
        ),
        (
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
            "'dynamic' turns every row by the longest of its batch",
        ),
        ({"hidden_size": 64}, "is 32, but the decoder reads vectors of 64"),
    ],
)
def test_a_decoder_that_cannot_be_grafted_or_packed_is_refused_by_name(make_grafted, text, reason):
    with pytest.raises(CheckpointError, match=reason):
        make_grafted(text=text)


@pytest.mark.parametrize(
    ("backbone", "reason"),
    [
        ({"scheme": "flat"}, "'flat' is none of qwen2_vl"),
        ({"scheme": {"scheme": "videorope", "spacing": 2}}, "no settings"),
        ({"mrope_section": [2, 1, 2]}, "sum to 5"),
        ({"image_size": 3}, "image_size"),
    ],
)
def test_what_a_graft_does_not_know_is_refused(make_grafted, backbone, reason):
    with pytest.raises(CheckpointError, match=reason):
        make_grafted(**backbone)


def test_a_tower_of_another_family_is_refused_by_name(make_grafted):
    with pytest.raises(CheckpointError, match=r"tower of Qwen2-VL.*'qwen2_5_vl_vision'"):
        make_grafted(vision={"model_type": "qwen2_5_vl_vision"})
