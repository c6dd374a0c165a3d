import json
import stat

import pytest
import torch
from safetensors.torch import save_file

from colfolio.errors import CheckpointError
from colfolio.models import Retriever
from colfolio.models.weights import (
    INDEX_FILE,
    WEIGHTS_FILE,
    check_dtypes,
    listed,
    read_tensors,
    read_weights,
    write_weights,
)

WEIGHTS = {
    "a": torch.arange(6.0).reshape(2, 3),
    "b": torch.ones(2, 2, dtype=torch.bfloat16),
    "c": torch.zeros(0, 3),
    "d": torch.tensor(1.0, dtype=torch.float64),
}


def same(ours, theirs):
    return set(ours) == set(theirs) and all(
        ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name])
        for name in ours
    )


def test_weights_read_back_to_the_bit_in_one_file_or_in_shards(tmp_path):
    for name, limit in (("one", 10**9), ("shards", 20), ("each", 0)):
        (tmp_path / name).mkdir()
        write_weights(WEIGHTS, tmp_path / name / WEIGHTS_FILE, limit)
        assert same(read_weights(tmp_path / name), WEIGHTS)


def test_no_shard_is_larger_than_the_limit_unless_one_tensor_is(tmp_path):
    write_weights(WEIGHTS, tmp_path / WEIGHTS_FILE, 20)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert shards[0] == f"model-00001-of-0000{len(shards)}.safetensors"
    for path in tmp_path.glob("*.safetensors"):
        tensors = read_tensors(path)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert set(index["weight_map"]) == set(WEIGHTS)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in WEIGHTS.values())


def test_shards_are_as_readable_as_any_new_file(tmp_path):
    write_weights(WEIGHTS, tmp_path / WEIGHTS_FILE, 20)
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_the_hubs_cache_may_link_to_its_own_blobs_and_to_nothing_else(tmp_path):
    snapshot, blobs = tmp_path / "models--o--n" / "snapshots" / "c0", tmp_path / "models--o--n"
    for folder in (snapshot, blobs / "blobs", tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    for folder in (blobs / "blobs", tmp_path / "elsewhere"):
        save_file(WEIGHTS, folder / "abc")
    (snapshot / WEIGHTS_FILE).symlink_to("../../blobs/abc")
    assert same(read_weights(snapshot), WEIGHTS)
    (snapshot / WEIGHTS_FILE).unlink()
    (snapshot / WEIGHTS_FILE).symlink_to(tmp_path / "elsewhere" / "abc")
    with pytest.raises(CheckpointError, match="link out of its folder"):
        read_weights(snapshot)


def test_a_folder_that_is_a_link_itself_is_read(tmp_path):
    (tmp_path / "real").mkdir()
    write_weights(WEIGHTS, tmp_path / "real" / WEIGHTS_FILE)
    (tmp_path / "link").symlink_to("real")
    assert same(read_weights(tmp_path / "link"), WEIGHTS)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_one_number_that_is_not_finite_is_seen_wherever_it_lies(tmp_path, dtype, bad):
    for place in (0, 4, 1000, 1002):
        tensor = torch.linspace(-1, 1, 1003).to(dtype)
        tensor[place] = bad
        save_file({"fine": torch.ones(3), "norm.weight": tensor}, tmp_path / WEIGHTS_FILE)
        with pytest.raises(CheckpointError, match=r"infinite numbers in norm\.weight"):
            read_weights(tmp_path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: cannot be read"):
        read_tensors(tmp_path / "adapter_model.safetensors")


def test_a_projection_may_be_in_float32_above_a_backbone_in_half_precision():
    half = {"x.a": torch.ones(1, dtype=torch.bfloat16), "x.b": torch.ones(1, dtype=torch.bfloat16)}
    wide, double = torch.ones(1), torch.ones(1, dtype=torch.float64)
    check_dtypes(half | {"p.w": wide}, "p.", "here")
    check_dtypes(half | {"p.w": half["x.a"]}, "p.", "here")
    with pytest.raises(CheckpointError, match=r"here: a backbone is of one dtype.*x\.c"):
        check_dtypes(half | {"x.c": wide}, "p.", "here")
    for mixed in ({"p.w": double}, {"p.w": wide, "p.b": half["x.a"]}):
        with pytest.raises(CheckpointError, match="the projection"):
            check_dtypes(half | mixed, "p.", "here")


def test_a_model_with_a_wider_projection_loads_and_encodes(make_retriever, tmp_path, texts, pages):
    made = make_retriever(dtype="bfloat16")
    made.projection.float()
    made.save_pretrained(tmp_path / "model")
    loaded = Retriever.from_pretrained(tmp_path / "model")
    assert loaded.projection.weight.dtype == torch.float32
    assert {weight.dtype for weight in loaded.backbone.parameters()} == {torch.bfloat16}
    assert loaded.encode_queries(texts).vectors.isfinite().all()
    assert loaded.encode_documents(pages[:2]).vectors.isfinite().all()


def test_a_list_of_names_is_cut_and_counted():
    assert listed([]) == "none"
    assert listed(["a", "b"]) == "a, b"
    assert listed(map(str, range(25))).endswith("18, 19 and 5 more")
