import json
import shutil

import numpy as np
import pytest
import torch
from conversing import generator_of
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)

from colfolio.batch import UNLABELLED
from colfolio.data.video import Clip
from colfolio.errors import CheckpointError, ColfolioError, DocumentError
from colfolio.models import base_from_weights
from colfolio.models import generator as generator_module
from colfolio.models.adapters import LoraSettings, add_lora, merge
from colfolio.models.contract import Source
from colfolio.models.generator import Generator
from colfolio.models.generator_base import generator_from_graft, generator_from_weights
from colfolio.models.generator_files import TiedHead
from colfolio.models.generator_outline import model_outline_of
from colfolio.models.hub import Location
from colfolio.models.parts import inventory
from colfolio.models.retriever import Retriever

FAMILIES = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "colfolio_grafted"]


@pytest.fixture
def make_generator(tiny_shape_of):
    def make(family="qwen2_vl", **values):
        return generator_of(tiny_shape_of(family), **values)

    return make


@pytest.fixture
def saved(make_generator, tmp_path):
    """The folder of a generator, whose head is the embedding or not."""

    def save(tied=False, family="qwen2_vl"):
        make_generator(family, tied=tied).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def change_weights(folder, change):
    weights = load_file(folder / "model.safetensors")
    save_file(change(weights), folder / "model.safetensors")
    (folder / "colfolio_chat.json").unlink()  # as another library writes it


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_read_to_the_bit(make_generator, random_image, tmp_path, family, tied):
    generator = make_generator(family, tied=tied).eval()
    generator.save_pretrained(tmp_path / "model")
    again = Generator.from_pretrained(tmp_path / "model", device="cpu")
    assert again.fingerprint() == generator.fingerprint()
    assert again.contract.templates == generator.contract.templates
    image = random_image(64, 96)
    assert again.generate(image, "where?", 5) == generator.generate(image, "where?", 5)


def test_equal_seeds_draw_equal_generators(make_generator):
    assert make_generator().fingerprint() == make_generator().fingerprint()
    assert make_generator().fingerprint() != make_generator(seed=1).fingerprint()


@pytest.mark.parametrize("tied", [False, True])
def test_every_parameter_is_in_one_part_and_a_tied_head_in_the_embedding(make_generator, tied):
    generator = make_generator(tied=tied)
    places = inventory(generator).places
    assert places.keys() == dict(generator.named_parameters()).keys()
    heads = [name for name, place in places.items() if place.part == "projection"]
    assert heads == ([] if tied else ["projection.weight"])
    assert generator.projection.weight.shape == (generator.vocabulary, 32)


@pytest.mark.parametrize("tied", [False, True])
def test_the_layout_of_published_models_is_read(saved, tied):
    folder = saved(tied)
    expected = Generator.from_pretrained(folder, device="cpu").weights()

    def as_published(weights):
        text = {n.replace("model.language_model.", "model."): w for n, w in weights.items()}
        return {name.replace("model.visual.", "visual."): w for name, w in text.items()}

    change_weights(folder, as_published)
    read = Generator.from_pretrained(folder, device="cpu")
    assert read.weights().keys() == expected.keys()
    assert all(torch.equal(read.weights()[name], tensor) for name, tensor in expected.items())
    assert read.contract.pixel_budget.max_pixels == 50176  # of the folder's processor


def test_a_tied_head_that_is_in_the_file_too_is_the_embedding_or_refused(saved):
    folder = saved(tied=True)
    embedding = "model.language_model.embed_tokens.weight"
    change_weights(folder, lambda weights: weights | {"lm_head.weight": weights[embedding].clone()})
    Generator.from_pretrained(folder, device="cpu")
    save_file(
        load_file(folder / "model.safetensors") | {"lm_head.weight": torch.zeros(300, 32)},
        folder / "model.safetensors",
    )
    with pytest.raises(CheckpointError, match="says that the head is the embedding"):
        Generator.from_pretrained(folder, device="cpu")


def test_a_head_that_is_missing_is_named(saved):
    folder = saved()
    change_weights(
        folder, lambda weights: {n: w for n, w in weights.items() if n != "lm_head.weight"}
    )
    with pytest.raises(CheckpointError, match=r"Missing: lm_head\.weight"):
        Generator.from_pretrained(folder, device="cpu")


def test_weights_that_were_changed_are_refused(saved):
    folder = saved()
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="not those that were saved"):
        Generator.from_pretrained(folder, device="cpu")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_file_that_was_changed_is_refused(saved, name):
    path = saved() / name
    path.write_text(path.read_text() + "\n")
    with pytest.raises(CheckpointError, match=rf"{name}: was changed after it was saved"):
        Generator.from_pretrained(path.parent, device="cpu")


def test_a_contract_that_was_changed_is_refused(saved):
    path = saved() / "colfolio_chat.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"frame_rate": 1.0}))
    with pytest.raises(CheckpointError, match=r"was changed after .*: frame_rate \(now 1\.0\)"):
        Generator.from_pretrained(path.parent, device="cpu")
    path.write_text(json.dumps(values | {"seal": {}}))
    with pytest.raises(CheckpointError, match="weights_hash and no seal"):
        Generator.from_pretrained(path.parent, device="cpu")
    path.write_text(json.dumps(values))
    contract = Generator.from_pretrained(path.parent, device="cpu").contract
    assert (contract.weights_hash, contract.files, contract.seal) == ("", {}, {})


def test_where_weights_first_came_from_is_kept_and_where_they_were_read_is_told(saved, monkeypatch):
    folder, here = saved(), Source(name="owner/name", revision="c" * 40)
    location = Location(folder, here.name, here.revision)
    monkeypatch.setattr(generator_module, "locate", lambda *_: location)
    first = Generator.from_pretrained("owner/name", device="cpu")
    assert (first.contract.source, first.contract.loaded_from) == (here, here)
    origin = Source(name="decoder + tower")
    first.contract = first.contract.model_copy(update={"source": origin, "loaded_from": None})
    first.save_pretrained(folder)
    again = Generator.from_pretrained("owner/name", device="cpu")
    assert (again.contract.source, again.contract.loaded_from) == (origin, here)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"format": 2}, "format 2"), ({"pixel_budget": {"patch": 7}}, "does not fit its backbone")],
)
def test_a_contract_that_cannot_be_kept_is_refused(saved, change, message):
    folder = saved()
    path = folder / "colfolio_chat.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=message):
        Generator.from_pretrained(folder, device="cpu")


def test_a_retriever_is_no_generator_and_the_other_way_round(saved, shared_retriever, tmp_path):
    shared_retriever.save_pretrained(tmp_path / "retriever")
    with pytest.raises(CheckpointError, match="is a retriever"):
        Generator.from_pretrained(tmp_path / "retriever", device="cpu")
    with pytest.raises(CheckpointError, match="no projection to vectors"):
        Retriever.from_pretrained(saved(), device="cpu")


def test_a_trained_generator_becomes_the_base_of_a_retriever(saved):
    folder = saved(family="colfolio_grafted", tied=True)
    base = base_from_weights(folder, dim=16, seed=0)
    own = Generator.from_pretrained(folder, device="cpu").weights()
    for name, tensor in own.items():
        assert torch.equal(base.weights()[name], tensor), name


def test_logits_of_some_places_are_those_of_all(make_generator, random_image):
    generator = make_generator().eval()
    batch = generator.chat.conversations(
        [random_image(56, 28), random_image(28, 28)], ["a", "b"], ["left", "right"], [0, 1]
    )
    places = (batch.labels != UNLABELLED).nonzero().flatten()
    whole = generator(batch.inputs, torch.arange(len(batch.labels)))
    assert torch.equal(generator(batch.inputs, places), whole[places])


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_greedy_over_the_whole_row_each_time(make_generator, random_image, family):
    """The vision tower runs once; a plain loop runs it for each token."""
    generator = make_generator(family).eval()
    clip = Clip(np.stack([random_image(64, 96, seed) for seed in range(3)]), 0.5)
    made = []
    for _ in range(4):
        packed = generator.chat.prompts([clip], ["where?"], [made])
        with torch.no_grad():
            made.append(int(generator(packed, torch.arange(len(packed.token_ids)))[-1].argmax()))
    expected = generator.tokenizer.decode(made, skip_special_tokens=True).strip()
    assert generator.generate(clip, "where?", 4) == expected


def test_generation_ends_at_the_end_and_keeps_the_mode(make_generator, random_image):
    generator = make_generator().train()
    calls = []
    generator.projection.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        generator.projection.weight.zero_()
        generator.backbone.language_model.norm.weight.zero_()
        # all logits are 0, and the first of the highest is taken
        end = generator.chat.end_token_id
        generator.chat.end_token_id = 0
        assert generator.generate(random_image(28, 28), "where?", 9) == ""
        assert (len(calls), end) == (1, 2)
    assert generator.training


def test_what_is_no_document_is_refused(make_generator, tmp_path):
    generator = make_generator()
    with pytest.raises(DocumentError, match="does not exist"):
        generator.generate(tmp_path / "none.png", "where?")
    (tmp_path / "notes.txt").write_text("no picture")
    with pytest.raises(DocumentError, match=r"notes\.txt: is not an image"):
        generator.generate(tmp_path / "notes.txt", "where?")


@pytest.mark.parametrize("tied", [False, True])
def test_adapters_change_nothing_at_first_and_merge_into_what_they_compute(
    make_generator, random_image, tied, tmp_path
):
    generator = make_generator(tied=tied).to(torch.float64).eval()
    packed = generator.chat.prompts([random_image(56, 28)], ["where?"])
    places = torch.arange(len(packed.token_ids))
    plain = generator(packed, places)
    add_lora(generator, LoraSettings(rank=2, dropout=0.0, projection="frozen"), seed=0)
    assert torch.equal(generator(packed, places), plain)
    with pytest.raises(ColfolioError, match="has an adapter"):
        generator.save_pretrained(tmp_path / "adapted")
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in generator.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    adapted = generator(packed, places)
    assert (adapted - plain).abs().max() > 1e-3
    merge(generator)
    torch.testing.assert_close(generator(packed, places), adapted, rtol=1e-9, atol=1e-9)
    generator.save_pretrained(tmp_path / "merged")
    again = Generator.from_pretrained(tmp_path / "merged", device="cpu")
    torch.testing.assert_close(again(packed, places), generator(packed, places), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("tied", "projection"), [(True, "adapter"), (True, "full"), (False, "full")]
)
def test_adapters_that_a_head_cannot_have_are_refused(make_generator, tied, projection):
    generator = make_generator(tied=tied)
    before = generator.fingerprint()
    with pytest.raises(ColfolioError, match=r"projection: is .*; set it to .*'frozen'"):
        add_lora(generator, LoraSettings(rank=2, projection=projection), seed=0)
    assert generator.fingerprint() == before


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_outline_is_the_generator_but_for_its_numbers(saved, family, tied):
    folder = saved(tied, family)
    loaded = Generator.from_pretrained(folder, dtype=torch.bfloat16, device="cpu")
    loaded.save_pretrained(folder)
    found = model_outline_of(folder)
    assert isinstance(found.model, Generator)
    assert found.has_dtypes
    described = [
        {name: (weight.dtype, weight.shape) for name, weight in model.named_parameters()}
        for model in (found.model, loaded)
    ]
    assert described[0] == described[1]
    assert all(weight.is_meta for weight in found.model.parameters())
    (folder / "model.safetensors").unlink()
    assert not model_outline_of(folder, "generation").has_dtypes


def test_an_outline_is_of_what_the_objective_asks(saved, shared_retriever, tmp_path):
    shared_retriever.save_pretrained(tmp_path / "retriever")
    assert isinstance(model_outline_of(tmp_path / "retriever").model, Retriever)
    with pytest.raises(CheckpointError, match="is a retriever"):
        model_outline_of(tmp_path / "retriever", "generation")
    folder = saved()
    for change in (lambda: None, (folder / "colfolio_chat.json").unlink):  # ours, and as published
        change()
        assert isinstance(model_outline_of(folder).model, Generator)
        with pytest.raises(CheckpointError, match=r"is a generator.*colfolio init"):
            model_outline_of(folder, "retrieval")


def test_published_weights_make_a_generator_that_says_where_they_are_from(saved, tmp_path):
    folder = saved()
    (folder / "colfolio_chat.json").unlink()
    made = generator_from_weights(folder)
    assert made.contract.source == Source(name="model")
    made.save_pretrained(tmp_path / "made")
    again = generator_from_weights(tmp_path / "made")
    assert again.contract.source == Source(name="model")
    assert again.fingerprint() == made.fingerprint()


@pytest.fixture
def write_graft(tmp_path, tiny_tokenizer):
    """Writes a language model that knows no images, and a Qwen2-VL of another width."""

    def write(tied, **values):
        torch.manual_seed(0)
        text = {
            "vocab_size": 300,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 0,
        }
        decoder = Qwen2ForCausalLM(Qwen2Config(**text, tie_word_embeddings=tied, **values))
        vision = {"depth": 1, "embed_dim": 16, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2}
        rope = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1]}
        wide = text | {"hidden_size": 64, "num_attention_heads": 8, "rope_parameters": rope}
        tower = Qwen2VLForConditionalGeneration(
            Qwen2VLConfig(text_config=wide, vision_config=vision)
        )
        folders = tmp_path / "decoder", tmp_path / "tower"
        for model, folder in zip((decoder, tower), folders, strict=True):
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
            model.save_pretrained(folder)
        plain = Tokenizer(models.WordLevel({"a": 0, "b": 1, "c": 2}, unk_token="a"))
        plain.pre_tokenizer = pre_tokenizers.Whitespace()
        plain.save(str(folders[0] / "tokenizer.json"))
        return decoder.eval(), folders

    return write


@pytest.mark.parametrize("tied", [False, True])
def test_a_grafted_decoder_keeps_its_head_and_says_of_text_what_it_said(write_graft, tied):
    decoder, folders = write_graft(tied)
    generator = generator_from_graft(*folders, seed=0).eval()
    assert isinstance(generator.projection, TiedHead) == tied
    text = generator.collator.queries(["b c b a c"])
    with torch.no_grad():
        logits = generator(text, torch.arange(len(text.token_ids)))
        expected = decoder(input_ids=text.token_ids[None]).logits[0]
    torch.testing.assert_close(logits[:, :300], expected, rtol=1e-4, atol=1e-5)
    assert "visual.merger.mlp.2.weight is drawn with seed 0" in " ".join(generator.contract.assumed)
    assert generator.contract.source.name == "decoder + tower"


def test_rows_of_a_head_for_added_tokens_are_drawn_and_told(write_graft, tmp_path):
    decoder, folders = write_graft(tied=False)
    words = {f"w{number}": number for number in range(300)}
    full = Tokenizer(models.WordLevel(words, unk_token="w0"))
    full.save(str(folders[0] / "tokenizer.json"))
    generator = generator_from_graft(*folders, seed=0)
    assert generator.vocabulary == 300 + 7
    assert torch.equal(generator.projection.weight[:300], decoder.lm_head.weight)
    assert "lm_head.weight had no rows for 7 special tokens" in " ".join(generator.contract.assumed)
    generator.save_pretrained(tmp_path / "model")
    again = Generator.from_pretrained(tmp_path / "model", device="cpu")
    assert again.fingerprint() == generator.fingerprint()


def test_a_decoder_without_its_head_cannot_be_a_generator(write_graft):
    decoder, folders = write_graft(tied=False)
    decoder.model.save_pretrained(folders[0])
    with pytest.raises(CheckpointError, match=r"holds no lm_head\.weight"):
        generator_from_graft(*folders, seed=0)


def test_a_folder_with_something_else_is_not_overwritten(make_generator, tmp_path):
    (tmp_path / "notes.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        make_generator().save_pretrained(tmp_path)
    shutil.rmtree(tmp_path)
