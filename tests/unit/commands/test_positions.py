"""Models are built by `transformers` and saved by its own `save_pretrained`, as users have them."""

import json

import av
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoConfig,
    ColQwen2Config,
    ColQwen2ForRetrieval,
    LlamaConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from colfolio.commands.positions import positions_command
from colfolio.errors import ColfolioError
from colfolio.models.shell import shell_of

TOKENS = {
    "image_token_id": 151,
    "video_token_id": 152,
    "vision_start_token_id": 153,
    "vision_end_token_id": 154,
}
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 160,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 100.0,
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
    },
}
WIDE = {"depth": 2, "num_heads": 2}
VISION_2 = WIDE | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2}
VISION = WIDE | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}


def qwen2_config():
    return Qwen2VLConfig(text_config=TEXT, vision_config=VISION_2, **TOKENS)


MODELS = {
    "Qwen2VLModel": lambda: Qwen2VLModel(qwen2_config()),
    "Qwen2VLForConditionalGeneration": lambda: Qwen2VLForConditionalGeneration(qwen2_config()),
    "Qwen2_5_VLForConditionalGeneration": lambda: Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=TEXT, vision_config=VISION | {"fullatt_block_indexes": [1]}, **TOKENS
        )
    ),
    "Qwen3VLForConditionalGeneration": lambda: Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=TEXT,
            vision_config=VISION
            | {"deepstack_visual_indexes": [1], "num_position_embeddings": 16, "patch_size": 16},
            **TOKENS,
        )
    ),
    "ColQwen2ForRetrieval": lambda: ColQwen2ForRetrieval(
        ColQwen2Config(vlm_config=qwen2_config().to_dict(), embedding_dim=16)
    ),
}
FAMILIES = [name for name in MODELS if name != "ColQwen2ForRetrieval"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Saves a model of `MODELS` once, and gives its folder."""
    root = tmp_path_factory.mktemp("models")

    def save(name):
        if not (root / name).is_dir():
            MODELS[name]().save_pretrained(root / name)
        return root / name

    return save


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """Three seconds of noise, at four frames a second."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    generator = np.random.default_rng(0)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width, stream.height, stream.pix_fmt = 112, 84, "yuv420p"
        for _ in range(12):
            pixels = generator.integers(0, 256, (84, 112, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def ask(capsys, model, **options):
    """Whether positions are right, and what was printed."""
    is_right = positions_command(str(model), **options)
    return is_right, capsys.readouterr().out


def test_the_image_tokens_of_a_fresh_colqwen2_are_said_to_be_flattened(saved, capsys):
    is_right, told = ask(capsys, saved("ColQwen2ForRetrieval"))
    assert not is_right
    assert "flattened" in told
    assert "ColQwen2ForRetrieval" in told
    # token 5 is the second of the image
    assert "5      image    5   5   5    4   4   5  differs" in told
    assert "padded_position_ids" in told


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_bad_is_said_of_models_called_with_token_types(saved, capsys, name):
    is_right, told = ask(capsys, saved(name))
    assert is_right
    assert told.count("Positions are right in 1 row.") == 2  # image and clip
    assert "differs" not in told


@pytest.mark.parametrize("name", FAMILIES)
def test_a_clip_of_the_user_is_read_and_asked_with(saved, capsys, clip_file, name):
    is_right, told = ask(capsys, saved(name), video=clip_file)
    assert is_right
    assert told.count("Positions are right") == 1
    assert "video" in told


def test_an_image_of_the_user_is_asked_with_in_its_own_grid(saved, capsys, tmp_path):
    path = tmp_path / "tall.png"
    Image.new("RGB", (28, 28 * 12)).save(path)
    is_right, told = ask(capsys, saved("ColQwen2ForRetrieval"), image=path)
    assert not is_right
    assert "5      image    5   5   5    4   5   4  differs" in told


def test_absolute_time_is_that_of_the_clip(saved, capsys, clip_file, monkeypatch):
    shell = shell_of(saved("Qwen2_5_VLForConditionalGeneration"))
    inputs = shell.inputs(shell.blank(4), 2, 0.25)
    assert inputs["second_per_grid_ts"].tolist() == [0.5]  # two frames enter as one
    # a clip of three seconds in at most four frames: one a second, two seconds a step
    monkeypatch.setattr("colfolio.commands.positions._MAX_FRAMES", 4)
    _, told = ask(capsys, saved("Qwen2_5_VLForConditionalGeneration"), video=clip_file)
    shell = shell_of(saved("Qwen2_5_VLForConditionalGeneration"))
    rate = shell.config.vision_config.tokens_per_second
    assert f"video  {4 + 2 * rate:3d}   4   4" in told


def test_a_time_that_transformers_5_puts_elsewhere_than_the_paper_is_noted(saved, capsys):
    _, told = ask(capsys, saved("Qwen2_5_VLForConditionalGeneration"))
    assert "in the paper and in transformers 4" in told
    _, told = ask(capsys, saved("Qwen2VLModel"))
    assert "in the paper and in transformers 4" not in told


def test_a_temporal_row_that_stands_still_is_found(saved, capsys, monkeypatch):
    # as in transformers 5.3, whose temporal row was full of one value
    own = Qwen2VLModel.get_vision_position_ids

    def stuck(self, start_position, *arguments, **options):
        positions = own(self, start_position, *arguments, **options)
        positions[0] = start_position
        return positions

    monkeypatch.setattr(Qwen2VLModel, "get_vision_position_ids", stuck)
    is_right, told = ask(capsys, saved("Qwen2VLModel"))
    assert not is_right
    image, clip = told.split("clip\n", maxsplit=1)
    assert "Positions are right" in image
    assert "constant_time" in clip


def test_colpali_engine_s_layout_is_asked_through_the_forward_that_it_calls(
    saved, capsys, tmp_path
):
    config = json.loads((saved("Qwen2VLModel") / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"architectures": ["ColQwen2"]}))
    is_right, told = ask(capsys, tmp_path)
    assert is_right
    assert "Qwen2VLModel (whose forward ColQwen2 of colpali-engine calls)" in told


def test_a_retriever_is_asked_as_it_encodes_documents(retriever, capsys, tmp_path):
    retriever.save_pretrained(tmp_path / "model")
    is_right, told = ask(capsys, tmp_path / "model")
    assert is_right
    assert "a retriever, as it encodes documents" in told
    assert told.count("Positions are right in 1 row.") == 2  # image and clip


def test_a_shell_has_one_layer_in_each_tower_and_needs_no_weights(saved):
    folder = saved("Qwen2VLForConditionalGeneration")
    shell = shell_of(folder)
    assert len(shell.model.model.language_model.layers) == 1
    assert len(shell.model.model.visual.blocks) == 1
    assert AutoConfig.from_pretrained(folder).text_config.num_hidden_layers == 2
    assert all(parameter.device == torch.device("cpu") for parameter in shell.model.parameters())


def test_a_published_configuration_of_a_large_model_is_asked(capsys, tmp_path):
    # flat, in half precision by the old key, with a head of its own, as Qwen2-VL-7B has it
    config = {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 2, 2]},
        "vision_config": VISION_2,
        **{name: value for name, value in TEXT.items() if name != "rope_parameters"},
        **TOKENS,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    is_right, told = ask(capsys, tmp_path)
    assert is_right
    assert told.count("Positions are right in 1 row.") == 2


def test_a_scheme_can_be_asked_for(saved, capsys):
    is_right, told = ask(capsys, saved("Qwen2VLModel"), scheme="videorope")
    assert not is_right
    assert "those of qwen2_vl" in told
    with pytest.raises(ColfolioError, match="scheme 'own' is none of qwen2_vl"):
        positions_command(str(saved("Qwen2VLModel")), scheme="own")


def test_an_image_is_asked_with_at_no_more_tokens_than_tell_its_grid(saved):
    shell = shell_of(saved("Qwen2VLModel"))
    inputs = shell.inputs(np.zeros((1, 2000, 1000, 3), dtype=np.uint8), 1)
    assert 128 <= int(inputs["image_grid_thw"].prod()) // 4 <= 256


@pytest.mark.parametrize("name", FAMILIES)
def test_no_text_token_is_a_placeholder(saved, name):
    shell = shell_of(saved(name))
    for kind, frames in ((1, 1), (2, 6)):
        inputs = shell.inputs(shell.blank(frames), kind)
        visual = 6 if kind == 1 else 18
        assert int((inputs["mm_token_type_ids"] == kind).sum()) == visual
        assert int((inputs["mm_token_type_ids"] == 3 - kind).sum()) == 0


def test_a_model_that_cannot_be_built_is_named(saved, tmp_path):
    config = json.loads((saved("Qwen2VLModel") / "config.json").read_text())
    for number, (change, reason) in enumerate(
        (
            ({"architectures": ["OwnVideoModel"]}, "'OwnVideoModel', which is none of.*watch"),
            ({"architectures": ["pipeline"]}, "'pipeline', which is none of"),
            ({"vision_config": config["vision_config"] | {"patch_size": 0}}, "must be above 0"),
            ({"vision_config": config["vision_config"] | {"embed_dim": 0}}, "cannot be built"),
        )
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ColfolioError, match=reason):
            positions_command(str(folder))


def test_an_adapter_points_to_its_base(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ColfolioError, match="holds an adapter; ask the model"):
        positions_command(str(tmp_path))


def test_what_cannot_be_asked_is_named(saved, capsys, tmp_path, clip_file):
    LlamaConfig(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text("{")
    image = tmp_path / "image.png"
    Image.new("RGB", (56, 56)).save(image)
    for model, options, reason in (
        (tmp_path / "llama", {}, "reads no images by itself.*watch"),
        (tmp_path / "empty", {}, "no config.json"),
        (tmp_path / "broken", {}, "cannot be built"),
        (tmp_path / "none", {}, "no such folder"),
        (saved("ColQwen2ForRetrieval"), {"video": clip_file}, "takes images only"),
        (saved("Qwen2VLModel"), {"video": image.with_suffix(".mp4")}, "does not exist"),
        (saved("Qwen2VLModel"), {"image": clip_file}, "is not an image"),
        (saved("Qwen2VLModel"), {"image": image, "video": clip_file}, "not both"),
    ):
        with pytest.raises(ColfolioError, match=reason):
            positions_command(str(model), **options)


def test_the_command_exits_with_1_where_positions_are_wrong(saved):
    from typer.testing import CliRunner

    from colfolio.cli import app

    for name, code in (("ColQwen2ForRetrieval", 1), ("Qwen2VLModel", 0)):
        assert CliRunner().invoke(app, ["positions", str(saved(name))]).exit_code == code
