import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from colfolio.data.prompts import IMAGE_TOKEN
from colfolio.errors import CheckpointError
from colfolio.models import Shape, base_from_shape, base_from_weights, train_tokenizer
from colfolio.models.contract import hash_weights
from colfolio.models.families import FAMILIES
from colfolio.models.shape import TokenizerSettings


def test_one_seed_gives_one_set_of_weights(make_retriever):
    first, again, other = (make_retriever(seed=seed) for seed in (0, 0, 1))
    assert first.contract.base_hash == again.contract.base_hash == hash_weights(first.weights())
    assert first.contract.base_hash != other.contract.base_hash


def test_drawing_weights_leaves_every_global_generator_alone(make_retriever, monkeypatch):
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _seed: pytest.fail("seeded a GPU"))
    torch.default_generator.manual_seed(5)
    before = torch.get_rng_state()
    make_retriever(seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_state_of_the_global_generator_does_not_reach_the_weights(make_retriever):
    hashes = set()
    for state in (1, 2):
        torch.default_generator.manual_seed(state)
        hashes.add(make_retriever(seed=0).contract.base_hash)
    assert len(hashes) == 1


def test_special_tokens_of_the_tokenizer_reach_the_configuration(retriever, tiny_tokenizer):
    config = retriever.backbone.config
    assert config.image_token_id == tiny_tokenizer.token_to_id(IMAGE_TOKEN)
    assert config.text_config.vocab_size == tiny_tokenizer.get_vocab_size()


def test_the_contract_says_what_the_shape_said(retriever, tiny_shape):
    contract = retriever.contract
    assert (contract.dim, contract.templates) == (tiny_shape.dim, tiny_shape.templates)
    assert (contract.pixel_budget, contract.views) == (tiny_shape.pixel_budget, tiny_shape.views)
    assert contract.position_scheme == "qwen2_vl"


def test_a_shape_can_be_half_precision(make_retriever):
    retriever = make_retriever(dtype="bfloat16")
    assert {weight.dtype for weight in retriever.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize(
    ("text", "vision", "culprit"),
    [
        ({"hiden_size": 64}, {}, "text_config.*hiden_size"),
        ({}, {"dept": 9}, "vision_config.*dept"),
        ({"hidden_size": "wide"}, {}, "hidden_size"),
        ({"num_attention_heads": 5}, {}, "shape"),
        ({}, {"patch_size": 16}, "patch"),
        ({}, {"spatial_merge_size": 4}, "merge"),
        ({}, {"temporal_patch_size": 1}, "temporal"),
        ({}, {"hidden_size": 64}, "hidden_size"),
        ({"vocab_size": 20}, {}, "vocab_size is 20"),
    ],
)
def test_a_shape_whose_parts_do_not_fit_is_refused(make_retriever, text, vision, culprit):
    with pytest.raises(CheckpointError, match=culprit):
        make_retriever(text=text, vision=vision)


def test_an_unknown_key_beside_the_towers_is_refused(tiny_shape, tiny_tokenizer):
    backbone = tiny_shape.backbone | {"image_size": 3}
    with pytest.raises(CheckpointError, match="image_size"):
        base_from_shape(tiny_shape.model_copy(update={"backbone": backbone}), tiny_tokenizer, 0)


def test_an_unknown_family_is_named(make_retriever):
    with pytest.raises(CheckpointError, match="'qwen9' is none of qwen2_vl"):
        make_retriever(family="qwen9")


def test_an_unknown_key_of_a_shape_is_refused():
    with pytest.raises(ValueError, match="dims"):
        Shape.model_validate({"backbone": {}, "dims": 3})


@pytest.fixture
def publish(tmp_path, tiny_tokenizer):
    """Writes a backbone as its authors do: in a layout, with the head of a language model."""

    def publish(backbone, layout="nested", dtype=torch.float32, **more):
        folder = tmp_path / "published"
        folder.mkdir(exist_ok=True)
        weights = {
            PUBLISHED[layout](name): tensor.to(dtype).contiguous()
            for name, tensor in backbone.state_dict().items()
        }
        head = {} if layout == "engine" else {"lm_head.weight": torch.ones(2, 3, dtype=dtype)}
        weights |= head | more
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        backbone.config.to_json_file(folder / "config.json", use_diff=False)
        tiny_tokenizer.save(str(folder / "tokenizer.json"))
        return folder

    return publish


def outer(name):
    """The older layout: the decoder lies beside the vision tower."""
    return name.replace("language_model.", "model.")


PUBLISHED = {"nested": lambda name: f"model.{name}", "hub": outer, "engine": str}


@pytest.mark.parametrize("layout", PUBLISHED)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_base_from_published_weights_keeps_them_and_draws_one_projection(
    make_family_retriever, publish, family, layout
):
    published = make_family_retriever(family).backbone
    folder = publish(published, layout, torch.bfloat16)
    first, again, other = (base_from_weights(folder, 24, seed) for seed in (0, 0, 1))
    for base in (first, other):
        for name, tensor in base.backbone.state_dict().items():
            assert torch.equal(tensor, published.state_dict()[name].to(torch.bfloat16)), name
        assert {weight.dtype for weight in base.parameters()} == {torch.bfloat16}
    assert first.dim == 24
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_a_base_says_where_its_weights_are_from(retriever, publish):
    contract = base_from_weights(publish(retriever.backbone), 8, 0).contract
    assert (contract.source.name, contract.source.revision) == ("published", None)
    assert contract.base_hash != contract.projection_hash != ""


def test_the_projection_keeps_the_variance_of_what_it_reads(retriever, publish):
    projection = base_from_weights(publish(retriever.backbone), 4096, 0).projection
    states = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
    assert abs(projection(states).var() - 1) < 0.1
    assert not projection.bias.any()


def test_images_enter_a_base_as_its_processor_says_but_no_larger_than_a_retriever_takes(
    retriever, publish
):
    folder = publish(retriever.backbone)
    silent = base_from_weights(folder, 8, 0).contract
    assert silent.pixel_budget == FAMILIES["qwen2_vl"].pixel_budget
    assert any("preprocessor_config.json" in sentence for sentence in silent.assumed)
    said = {
        "min_pixels": 784,
        "max_pixels": 12845056,
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.5, 0.5, 0.5],
        "patch_size": 14,
        "merge_size": 2,
        "temporal_patch_size": 2,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(said))
    contract = base_from_weights(folder, 8, 0).contract
    budget = contract.pixel_budget
    assert (budget.min_pixels, budget.mean) == (784, (0.1, 0.2, 0.3))
    assert budget.max_pixels == FAMILIES["qwen2_vl"].pixel_budget.max_pixels
    assert contract.assumed == ()


def test_a_processor_that_cuts_other_patches_than_the_tower_reads_is_refused(retriever, publish):
    folder = publish(retriever.backbone)
    (folder / "preprocessor_config.json").write_text(json.dumps({"patch_size": 16}))
    with pytest.raises(CheckpointError, match=r"pixel_budget\.patch is 16, not 14"):
        base_from_weights(folder, 8, 0)


def test_published_weights_that_lack_a_tensor_are_refused(retriever, publish):
    folder = publish(retriever.backbone)
    weights = load_file(folder / "model.safetensors")
    weights.pop("model.language_model.layers.0.self_attn.q_proj.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"Missing: language_model\.layers\.0.*q_proj"):
        base_from_weights(folder, 8, 0)


@pytest.mark.parametrize("name", ["lm_head.bias", "model.visual.gate.weight", "classifier.weight"])
def test_no_tensor_but_the_head_is_left_out(retriever, publish, name):
    folder = publish(retriever.backbone, **{name: torch.ones(2)})
    with pytest.raises(CheckpointError, match=rf"Unexpected: .*{name.removeprefix('model.')}"):
        base_from_weights(folder, 8, 0)


def test_code_that_comes_with_weights_is_never_run(retriever, publish):
    folder = publish(retriever.backbone)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"auto_map": {"AutoModel": "a.B"}}))
    with pytest.raises(CheckpointError, match="auto_map"):
        base_from_weights(folder, 8, 0)


def test_a_trained_retriever_is_no_base_to_draw_a_new_projection_for(tmp_path, retriever, publish):
    retriever.save_pretrained(tmp_path / "trained")
    foreign = publish(retriever.backbone, "engine", **{"custom_text_proj.weight": torch.ones(3)})
    for folder in (tmp_path / "trained", foreign):
        with pytest.raises(CheckpointError, match=r"is a retriever already.*custom_text_proj"):
            base_from_weights(folder, 8, 0)


def test_a_tokenizer_of_another_model_is_refused(retriever, publish):
    folder = publish(retriever.backbone)
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace(IMAGE_TOKEN, "<|other|>"))
    with pytest.raises(CheckpointError, match="image_pad"):
        base_from_weights(folder, 8, 0)


def test_a_tokenizer_reads_every_text_and_knows_the_special_tokens():
    tokenizer = train_tokenizer(["plain words"], TokenizerSettings(vocab_size=300))
    for text in ["plain words", "Ünïcödé 漢字 🎉", "", " \n\t"]:
        assert tokenizer.decode(tokenizer.encode(text).ids).strip() == text.lower().strip()
    assert tokenizer.get_vocab_size() <= 300
    assert tokenizer.token_to_id(IMAGE_TOKEN) is not None


def test_a_tokenizer_depends_on_its_texts_alone():
    settings = TokenizerSettings(vocab_size=320)
    texts = ["the quick brown fox", "jumps over the lazy dog"] * 3
    first, again = (train_tokenizer(iter(texts), settings).to_str() for _ in range(2))
    assert first == again


def test_a_tokenizer_keeps_case_where_told():
    settings = TokenizerSettings(vocab_size=300, lowercase=False)
    tokenizer = train_tokenizer(["a"], settings)
    assert tokenizer.encode("A").ids != tokenizer.encode("a").ids
    assert train_tokenizer(["a"], TokenizerSettings()).encode("A").ids == (
        train_tokenizer(["a"], TokenizerSettings()).encode("a").ids
    )
