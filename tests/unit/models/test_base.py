import pytest
import torch

from colfolio.data.prompts import IMAGE_TOKEN
from colfolio.errors import CheckpointError
from colfolio.models import Shape, base_from_shape, base_from_weights, train_tokenizer
from colfolio.models.base import TokenizerSettings
from colfolio.models.contract import hash_weights


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


def test_a_base_from_published_weights_keeps_them_and_draws_one_projection(
    tmp_path, retriever, tiny_tokenizer
):
    retriever.backbone.save_pretrained(tmp_path / "published")
    tiny_tokenizer.save(str(tmp_path / "published" / "tokenizer.json"))
    bases = [base_from_weights(tmp_path / "published", 24, seed) for seed in (0, 0, 1)]
    first, again, other = bases
    published = retriever.backbone.state_dict()
    for base in bases:
        for name, tensor in base.backbone.state_dict().items():
            assert torch.equal(tensor, published[name]), name
    assert first.dim == 24
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_published_weights_that_lack_a_tensor_are_refused(tmp_path, retriever, tiny_tokenizer):
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "published"
    retriever.backbone.save_pretrained(folder)
    tiny_tokenizer.save(str(folder / "tokenizer.json"))
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="q_proj"):
        base_from_weights(folder, 8, 0)


def test_a_trained_retriever_is_no_base_to_draw_a_new_projection_for(tmp_path, retriever):
    retriever.save_pretrained(tmp_path / "trained")
    with pytest.raises(CheckpointError, match="custom_text_proj"):
        base_from_weights(tmp_path / "trained", 8, 0)


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
