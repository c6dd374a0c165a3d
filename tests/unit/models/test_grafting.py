"""A grafted backbone out of two folders: every weight is theirs, but for what is said."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    ColQwen2Config,
    ColQwen2ForRetrieval,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
)

from colfolio.commands.init import init_command
from colfolio.data.prompts import IMAGE_TOKEN, VIDEO_TOKEN, VISION_END, VISION_START
from colfolio.data.video import Clip
from colfolio.errors import CheckpointError, ColfolioError
from colfolio.models import Retriever, base_from_graft
from colfolio.models.grafting import grafted_backbone
from colfolio.mrope import graft

SPECIAL = ("<|endoftext|>", VISION_START, VISION_END, IMAGE_TOKEN, VIDEO_TOKEN)
WIDTH = 32
DECODERS = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen2": (Qwen2Config, Qwen2ForCausalLM)}
VOCABULARY = {token: number for number, token in enumerate(["<|endoftext|>", "a", "b", "c"])}


def write_tokenizer(folder, vocabulary=VOCABULARY):
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))


@pytest.fixture
def write_decoder(tmp_path):
    """Writes a language model of the library, with a tokenizer that knows no images."""

    def write(kind="llama", dtype=torch.float32, after=None, **values):
        torch.manual_seed(0)
        config_of, model_of = DECODERS[kind]
        sizes = {
            "vocab_size": len(VOCABULARY),
            "hidden_size": WIDTH,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        model = model_of(config_of(**(sizes | values))).to(dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        if after is not None:
            after(model)
        folder = tmp_path / "decoder"
        model.save_pretrained(folder)
        write_tokenizer(folder)
        return folder

    return write


@pytest.fixture
def write_tower(tmp_path):
    """Writes a Qwen2-VL whose tower ends in a width, by one of the library's classes."""

    def write(width=WIDTH, layout="head", dtype=torch.float32):
        torch.manual_seed(1)
        rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
        text = {
            "vocab_size": 16,
            "hidden_size": width,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": width // 8,
            "num_key_value_heads": 1,
            "rope_parameters": rope,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        vision = {"depth": 2, "embed_dim": 16, "hidden_size": width, "num_heads": 2, "mlp_ratio": 2}
        ids = {"image_token_id": 1, "video_token_id": 2}
        config = Qwen2VLConfig(text_config=text, vision_config=vision, **ids)
        if layout == "retrieval":
            config = ColQwen2Config(vlm_config=config, embedding_dim=8)
        builders = {
            "head": Qwen2VLForConditionalGeneration,
            "backbone": Qwen2VLModel,
            "retrieval": ColQwen2ForRetrieval,
        }
        model = builders[layout](config).to(dtype)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        model.save_pretrained(tmp_path / "tower")
        return tmp_path / "tower"

    return write


def weights_of(folder, prefix):
    """Tensors of a folder whose names hold a prefix, by what stands behind it."""
    found = load_file(folder / "model.safetensors").items()
    return {name.split(prefix, 1)[1]: tensor for name, tensor in found if prefix in name}


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, edit):
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("layout", ["head", "backbone", "retrieval"])
@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("tied", [True, False])
def test_both_towers_keep_every_weight(decoder, tied, layout, write_decoder, write_tower):
    text = write_decoder(decoder, tie_word_embeddings=tied)
    vision = write_tower(layout=layout)
    grafted = grafted_backbone(text, vision, SPECIAL)
    mine = grafted.weights
    expected = {f"visual.{name}": w for name, w in weights_of(vision, "visual.").items()}
    expected |= {f"language_model.{name}": w for name, w in weights_of(text, "model.").items()}
    assert mine.keys() == expected.keys()
    embedding = "language_model.embed_tokens.weight"
    for name, tensor in expected.items():
        assert torch.equal(mine[name][: len(tensor)], tensor), name
        assert mine[name].shape == tensor.shape or name == embedding
    assert len(mine[embedding]) == len(VOCABULARY) + 4
    (told,) = grafted.drawn
    assert all(token in told for token in SPECIAL[1:])


def test_tokens_that_the_decoder_lacks_are_added_and_the_configuration_knows_them(
    write_decoder, write_tower
):
    grafted = grafted_backbone(write_decoder(), write_tower(), SPECIAL)
    config, tokenizer = grafted.config, grafted.tokenizer
    assert [tokenizer.token_to_id(token) for token in SPECIAL] == [0, 4, 5, 6, 7]
    assert tokenizer.encode(f"b{IMAGE_TOKEN}c").ids == [2, 6, 3]
    assert (config.vision_start_token_id, config.vision_end_token_id) == (4, 5)
    assert (config.image_token_id, config.video_token_id) == (6, 7)
    assert config.text_config.vocab_size == 8


def test_rows_to_spare_take_new_tokens_and_nothing_is_drawn(write_decoder, write_tower):
    text = write_decoder(vocab_size=64)
    grafted = grafted_backbone(text, write_tower(), SPECIAL)
    assert grafted.drawn == ()
    embedding = grafted.weights["language_model.embed_tokens.weight"]
    assert torch.equal(embedding, weights_of(text, "model.")["embed_tokens.weight"])


def test_a_tokenizer_of_another_embedding_is_refused(write_decoder, write_tower):
    text = write_decoder()
    write_tokenizer(text, VOCABULARY | {"d": 4})
    with pytest.raises(CheckpointError, match=r"5 tokens.*embedding has 4 rows"):
        base_from_graft(text, write_tower(), 8, 0)


def test_a_tower_of_another_width_gets_a_last_layer_drawn_by_the_seed(write_decoder, write_tower):
    text, vision = write_decoder(), write_tower(width=48)
    first, again, other = (grafted_backbone(text, vision, SPECIAL, seed=s) for s in (0, 0, 1))
    assert "visual.merger.mlp.2" in first.drawn[1]
    assert "48 wide and the decoder 32" in first.drawn[1]
    published = weights_of(vision, "visual.")
    changed = {"merger.mlp.2.weight", "merger.mlp.2.bias"}
    for name, tensor in published.items():
        mine, same, otherwise = (each.weights[f"visual.{name}"] for each in (first, again, other))
        assert torch.equal(mine, same), name
        if name not in changed:
            assert torch.equal(mine, tensor), name
            assert torch.equal(mine, otherwise), name
    weight = first.weights["visual.merger.mlp.2.weight"]
    assert weight.shape == (WIDTH, 64)
    assert 0.015 < weight.std() < 0.025
    assert not torch.equal(weight, other.weights["visual.merger.mlp.2.weight"])
    assert not first.weights["visual.merger.mlp.2.bias"].any()


def test_the_wider_dtype_holds_for_both_so_that_no_weight_is_rounded(write_decoder, write_tower):
    text, vision = write_decoder(dtype=torch.bfloat16), write_tower()
    grafted = grafted_backbone(text, vision, SPECIAL)
    assert {tensor.dtype for tensor in grafted.weights.values()} == {torch.float32}


def test_the_scheme_is_the_one_asked_for_or_that_of_an_earlier_graft(write_decoder, write_tower):
    vision = write_tower()
    plain = write_decoder()
    assert grafted_backbone(plain, vision, SPECIAL).config.scheme == "qwen2_vl"
    assert grafted_backbone(plain, vision, SPECIAL, "videorope").config.scheme == "videorope"
    earlier = write_decoder(after=lambda model: graft(model, "videorope", (2, 1, 1)))
    retriever = base_from_graft(earlier, vision, 8, 0)
    assert retriever.contract.position_scheme == "videorope"
    assert retriever.backbone.language_model.rotary_emb.sections == (2, 1, 1)
    with pytest.raises(CheckpointError, match="says VideoRoPE"):
        base_from_graft(earlier, vision, 8, 0, "qwen2_vl")


def test_a_base_reads_pages_and_clips_is_saved_and_says_what_was_drawn(
    write_decoder, write_tower, pages, tmp_path
):
    text, vision = write_decoder(dtype=torch.bfloat16), write_tower(48, dtype=torch.bfloat16)
    retriever = base_from_graft(text, vision, 8, 0, "videorope").eval()
    assert {parameter.dtype for parameter in retriever.parameters()} == {torch.bfloat16}
    assert retriever.contract.source.name == "decoder + tower"
    assert "embed_tokens" in retriever.contract.assumed[0]
    assert "merger" in retriever.contract.assumed[1]
    retriever.save_pretrained(tmp_path / "base")
    loaded = Retriever.from_pretrained(tmp_path / "base", device="cpu")
    frames = np.zeros((4, 56, 56, 3), dtype=np.uint8)
    documents = [*pages[:2], Clip(frames, 0.5)]
    vectors = retriever.encode_documents(documents).vectors
    assert torch.equal(loaded.encode_documents(documents).vectors, vectors)
    again = base_from_graft(text, vision, 8, 0, "videorope")
    assert again.contract.base_hash == retriever.contract.base_hash


def test_clips_of_a_decoder_with_positions_of_qwen3_vl_have_time_stamps(write_decoder, write_tower):
    retriever = base_from_graft(write_decoder(), write_tower(), 8, 0, "qwen3_vl")
    assert retriever.contract.templates.time_stamp
    frames = np.zeros((4, 56, 56, 3), dtype=np.uint8)
    assert len(retriever.encode_documents([Clip(frames, 0.5)])) == 1


def test_the_command_says_what_was_drawn(write_decoder, write_tower, tmp_path, capsys):
    text, vision = write_decoder(), write_tower(48)
    init_command(str(text), tmp_path / "base", dim=8, vision=str(vision), scheme="videorope")
    told = " ".join(capsys.readouterr().out.split())
    assert "had no rows for <|im_start|>" in told
    assert "is 48 wide and the decoder 32" in told
    assert "vectors of 8 dimensions" in told
    assert Retriever.from_pretrained(tmp_path / "base").contract.position_scheme == "videorope"


def test_options_of_a_graft_without_a_decoder_to_graft_are_refused(tmp_path):
    for base, options, reason in (
        ("folder", {"scheme": "videorope"}, "--scheme .* --vision"),
        ("shape.yaml", {"scheme": "videorope", "vision": "tower"}, "--scheme .* --vision"),
        ("shape.yaml", {"vision": "tower"}, "shape has a vision tower of its own"),
    ):
        with pytest.raises(ColfolioError, match=reason):
            init_command(base, tmp_path / "base", **options)


def test_a_decoder_that_cannot_be_grafted_is_refused_by_name(write_decoder, write_tower):
    text = write_decoder()
    change_json(text / "config.json", model_type="gpt2")
    with pytest.raises(CheckpointError, match="'gpt2' cannot be grafted here"):
        grafted_backbone(text, write_tower(), SPECIAL)


def test_a_decoder_with_code_of_its_own_is_refused(write_decoder, write_tower):
    text = write_decoder()
    change_json(text / "config.json", auto_map={"AutoModel": "modeling.Mine"})
    with pytest.raises(CheckpointError, match="auto_map"):
        grafted_backbone(text, write_tower(), SPECIAL)


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda weights: weights.pop("model.norm.weight"), r"Missing: language_model\.norm\.weigh"),
        (
            lambda weights: weights.update({"model.extra": torch.zeros(2)}),
            r"Unexpected: language_model\.extra",
        ),
        (
            lambda weights: weights.update({"model.norm.weight": torch.zeros(2)}),
            r"language_model\.norm\.weight \(2,\) instead of \(32,\)",
        ),
        (lambda weights: weights.pop("model.embed_tokens.weight"), "Missing: .*embed_tokens"),
    ],
)
def test_a_decoder_whose_tensors_are_others_is_refused_with_their_names(
    write_decoder, write_tower, edit, reason
):
    text = write_decoder()
    change_weights(text, edit)
    with pytest.raises(CheckpointError, match=reason):
        base_from_graft(text, write_tower(), 8, 0)


def test_a_tower_that_lacks_a_tensor_is_refused_with_its_name(write_decoder, write_tower):
    vision = write_tower(layout="backbone")
    change_weights(vision, lambda weights: weights.pop("visual.merger.mlp.2.weight"))
    with pytest.raises(CheckpointError, match=r"Missing: visual\.merger\.mlp\.2\.weight"):
        base_from_graft(write_decoder(), vision, 8, 0)


def test_a_folder_without_a_tower_is_refused(write_decoder):
    text = write_decoder()
    with pytest.raises(CheckpointError, match="a llama has no vision_config"):
        base_from_graft(text, text, 8, 0)


def test_a_folder_whose_weights_hold_no_tower_is_refused(write_decoder, write_tower):
    vision = write_tower()
    change_weights(
        vision, lambda weights: [weights.pop(name) for name in [*weights] if "visual" in name]
    )
    with pytest.raises(CheckpointError, match="must hold one vision tower"):
        base_from_graft(write_decoder(), vision, 8, 0)


def test_a_tower_of_another_family_is_refused(write_decoder, write_tower):
    vision = write_tower()
    tower = json.loads((vision / "config.json").read_text())["vision_config"]
    change_json(vision / "config.json", vision_config=tower | {"model_type": "qwen2_5_vl_vision"})
    with pytest.raises(CheckpointError, match="tower of Qwen2-VL"):
        base_from_graft(write_decoder(), vision, 8, 0)


def test_the_head_and_tables_of_old_files_are_left_out(write_decoder, write_tower):
    text, vision = write_decoder(), write_tower()
    expected = base_from_graft(text, vision, 8, 0).contract.base_hash
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change_weights(text, lambda weights: weights.update(old))
    assert base_from_graft(text, vision, 8, 0).contract.base_hash == expected
