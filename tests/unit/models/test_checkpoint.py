import json
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file

from colfolio.errors import CheckpointError
from colfolio.models import Retriever, hub
from colfolio.models.formats import writing

WEIGHTS = "model.safetensors"


@pytest.fixture
def saved(tmp_path, shared_retriever):
    folder = tmp_path / "model"
    shared_retriever.save_pretrained(folder)
    return folder


@pytest.fixture
def change_weights(saved):
    def change(edit):
        weights = load_file(saved / WEIGHTS)
        edit(weights)
        save_file(weights, saved / WEIGHTS, metadata={"format": "pt"})

    return change


def change_json(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_loaded_retriever_gives_the_same_vectors_to_the_bit(
    saved, shared_retriever, texts, pages
):
    loaded = Retriever.from_pretrained(saved)
    for mine, theirs in [
        (loaded.encode_queries(texts), shared_retriever.encode_queries(texts)),
        (loaded.encode_documents(pages), shared_retriever.encode_documents(pages)),
    ]:
        assert torch.equal(mine.vectors, theirs.vectors)
        assert torch.equal(mine.offsets, theirs.offsets)
    assert loaded.fingerprint() == shared_retriever.fingerprint()
    assert loaded.contract == shared_retriever.contract
    assert not loaded.training


def test_saving_what_was_loaded_changes_no_byte(saved, tmp_path):
    Retriever.from_pretrained(saved).save_pretrained(tmp_path / "again")
    for path in sorted(saved.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes(), path.name


def test_every_dtype_survives_saving(tmp_path, make_retriever):
    make_retriever(dtype="bfloat16").save_pretrained(tmp_path / "half")
    loaded = Retriever.from_pretrained(tmp_path / "half")
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.bfloat16}
    assert {buffer.dtype for buffer in loaded.buffers()} == {torch.float32}
    widened = Retriever.from_pretrained(tmp_path / "half", dtype=torch.float32)
    assert {tensor.dtype for tensor in widened.parameters()} == {torch.float32}


def test_weights_in_several_files_are_read_as_one(saved, shared_retriever):
    weights = load_file(saved / WEIGHTS)
    names, shards = sorted(weights), {}
    for part, begin in (("00001", 0), ("00002", 1)):
        tensors = {name: weights[name] for name in names[begin::2]}
        save_file(tensors, saved / f"model-{part}-of-00002.safetensors")
        shards |= dict.fromkeys(tensors, f"model-{part}-of-00002.safetensors")
    (saved / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": shards}))
    (saved / WEIGHTS).unlink()
    assert Retriever.from_pretrained(saved).fingerprint() == shared_retriever.fingerprint()


@pytest.mark.parametrize(
    "name",
    ["custom_text_proj.bias", "visual.merger.ln_q.weight", "language_model.norm.weight"],
)
def test_a_missing_tensor_is_named(saved, change_weights, name):
    change_weights(lambda weights: weights.pop(name))
    with pytest.raises(CheckpointError, match=f"Missing: {name}.*Unexpected: none"):
        Retriever.from_pretrained(saved)


def test_an_unexpected_tensor_is_named(saved, change_weights):
    change_weights(lambda weights: weights.update({"lm_head.weight": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"Missing: none.*Unexpected: lm_head\.weight"):
        Retriever.from_pretrained(saved)


def test_a_renamed_tensor_is_named_under_both_names(saved, change_weights):
    old, new = "language_model.norm.weight", "model.norm.weight"
    change_weights(lambda weights: weights.update({new: weights.pop(old)}))
    with pytest.raises(CheckpointError, match=f"Missing: {old}.*Unexpected: {new}"):
        Retriever.from_pretrained(saved)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(saved, change_weights):
    name = "custom_text_proj.weight"
    change_weights(lambda weights: weights.update({name: torch.zeros(7, 32)}))
    with pytest.raises(CheckpointError, match=rf"{name} \(7, 32\) instead of \(16, 32\)"):
        Retriever.from_pretrained(saved)


def test_a_long_list_of_missing_tensors_is_cut_and_counted(saved, change_weights):
    change_weights(lambda weights: [weights.pop(name) for name in sorted(weights)[:25]])
    with pytest.raises(CheckpointError, match="and 5 more"):
        Retriever.from_pretrained(saved)


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_weights_cut_short_are_refused_with_their_file(saved, keep):
    data = (saved / WEIGHTS).read_bytes()
    size = int(len(data) * keep) if isinstance(keep, float) else keep
    (saved / WEIGHTS).write_bytes(data[:size])
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}: cannot be read"):
        Retriever.from_pretrained(saved)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json", "tokenizer.json", "colfolio.json"])
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(CheckpointError, match="safetensors" if name == WEIGHTS else name):
        Retriever.from_pretrained(saved)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "colfolio.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"3", b"\xff\xfe\x00", b'{"a": 1}'])
def test_a_damaged_file_is_refused_by_name(saved, name, content):
    (saved / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        Retriever.from_pretrained(saved)


def test_a_token_behind_the_last_row_of_the_embedding_is_refused(saved):
    values = json.loads((saved / "tokenizer.json").read_text())
    words = values["model"]["vocab"]
    words[max(words, key=words.get)] = 100_000  # as many tokens as before
    (saved / "tokenizer.json").write_text(json.dumps(values))
    change_json(saved / "colfolio.json", files={}, seal={}, weights_hash="")
    with pytest.raises(CheckpointError, match=r"has a token 100000, the embedding 300 rows"):
        Retriever.from_pretrained(saved)


@pytest.mark.parametrize("model_type", ["qwen9", None])
def test_an_unknown_model_type_is_named(saved, model_type):
    change_json(saved / "config.json", model_type=model_type)
    with pytest.raises(CheckpointError, match=rf"config\.json: model_type {model_type!r}"):
        Retriever.from_pretrained(saved)


def test_a_configuration_that_no_model_can_have_is_refused(saved):
    text = json.loads((saved / "config.json").read_text())["text_config"]
    change_json(saved / "config.json", text_config=text | {"hidden_size": "wide"})
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Retriever.from_pretrained(saved)


@pytest.mark.parametrize(
    ("values", "culprit"),
    [
        ({"format": 2}, "format 2"),
        ({"position_scheme": "flat"}, "position_scheme.*flat"),
        ({"unknown": 1}, "unknown"),
        ({"dim": 17}, "custom_text_proj.weight"),
    ],
)
def test_a_contract_that_cannot_be_kept_is_refused(saved, values, culprit):
    change_json(saved / "colfolio.json", **values)
    with pytest.raises(CheckpointError, match=culprit):
        Retriever.from_pretrained(saved)


def test_a_contract_that_cuts_other_patches_than_the_tower_reads_is_refused(saved):
    contract = json.loads((saved / "colfolio.json").read_text())
    change_json(saved / "colfolio.json", pixel_budget=contract["pixel_budget"] | {"patch": 16})
    with pytest.raises(CheckpointError, match="patch"):
        Retriever.from_pretrained(saved)


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "a/b/c", "plain"])
def test_a_folder_that_is_not_there_is_named(name):
    with pytest.raises(CheckpointError, match=f"{name}: no such folder"):
        Retriever.from_pretrained(name)


def test_a_hub_that_cannot_be_reached_is_an_error_of_ours(monkeypatch):
    def unreachable(*args, **kwargs):
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(CheckpointError, match=r"owner/name.*couldn't connect"):
        Retriever.from_pretrained("owner/name")


@pytest.mark.parametrize("name", ["owner/na me", "own er/name", "owner/..", "owner/"])
def test_a_name_that_no_hub_has_is_an_error_of_ours(name):
    with pytest.raises(CheckpointError):
        Retriever.from_pretrained(name)


def test_saving_replaces_an_older_checkpoint_and_leaves_nothing_beside_it(
    saved, make_retriever, tmp_path
):
    other = make_retriever(seed=1)
    other.save_pretrained(saved)
    assert Retriever.from_pretrained(saved).fingerprint() == other.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_folder_that_is_no_checkpoint_is_not_replaced(tmp_path, shared_retriever):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        shared_retriever.save_pretrained(tmp_path / "thesis")
    assert (tmp_path / "thesis" / "chapter.tex").read_text() == "years of work"


def test_a_file_in_the_place_of_the_folder_is_an_error_of_ours(tmp_path, shared_retriever):
    (tmp_path / "model").write_text("a file")
    with pytest.raises(CheckpointError, match="model"):
        shared_retriever.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model").read_text() == "a file"


def test_a_saved_folder_is_as_readable_as_any_new_one(saved, tmp_path):
    (tmp_path / "plain").mkdir()
    mode = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    assert stat.S_IMODE(saved.stat().st_mode) == mode
    assert {stat.S_IMODE(path.stat().st_mode) for path in saved.iterdir()} == {mode & ~0o111}


def test_an_interrupted_save_leaves_the_older_checkpoint(
    saved, make_retriever, shared_retriever, monkeypatch, tmp_path
):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "save_contract", full)
    with pytest.raises(OSError, match="No space left"):
        make_retriever(seed=1).save_pretrained(saved)
    assert Retriever.from_pretrained(saved).fingerprint() == shared_retriever.fingerprint()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
