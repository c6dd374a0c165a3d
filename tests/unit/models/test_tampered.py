"""A good folder tampered with in one place: each is refused by name, and no model comes of it."""

import json
import pickle
import re
import shutil
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from colfolio.errors import CheckpointError
from colfolio.models import Retriever
from colfolio.models.shape import TokenizerSettings, train_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
NORM, PROJECTION = "language_model.norm.weight", "custom_text_proj.weight"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture(scope="session")
def good(tmp_path_factory, shared_retriever):
    folder = tmp_path_factory.mktemp("good") / "model"
    shared_retriever.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(good, tmp_path):
    return shutil.copytree(good, tmp_path / "model")


def weights(edit):
    """Change the tensors, and write them as a whole file again."""

    def tamper(folder):
        tensors = load_file(folder / WEIGHTS)
        edit(tensors)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    return tamper


def contents(name, edit):
    """Change the bytes of a file."""

    def tamper(folder):
        (folder / name).write_bytes(edit((folder / name).read_bytes()))

    return tamper


def values(name, edit):
    """Change the values of a JSON file."""

    def tamper(folder):
        changed = json.loads((folder / name).read_text())
        edit(changed)
        (folder / name).write_text(json.dumps(changed))

    return tamper


def shards(edit=lambda _folder, _index: None):
    """Split the weights in two with an index, and change what came of it."""

    def tamper(folder):
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        index = {}
        for number, name in enumerate(SHARDS):
            part = dict(sorted(tensors.items())[number::2])
            save_file(part, folder / name)
            index |= dict.fromkeys(part, name)
        edit(folder, index)
        (folder / INDEX).write_text(json.dumps({"weight_map": index}))

    return tamper


def elsewhere(name):
    """Say in the index that a tensor is in another file, which is a whole one."""

    def edit(folder, index):
        outside = folder.parent / "outside.safetensors"
        save_file({NORM: torch.ones(32)}, outside)
        index[NORM] = name.format(outside=outside)

    return shards(edit)


def twice(folder, index):
    other = next(name for name in SHARDS if name != index[NORM])
    tensors = load_file(folder / other)
    save_file(tensors | {NORM: torch.ones(32)}, folder / other)


def header(edit):
    """Change the header of the weights, its length with it."""

    def change(data):
        size = int.from_bytes(data[:8], "little")
        text = json.dumps(edit(json.loads(data[8 : 8 + size]))).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + size :]

    return contents(WEIGHTS, change)


def overlapping(entries):
    """Let a tensor lie where another one of its size lies."""
    first, second = "visual.blocks.0.norm1.weight", "visual.blocks.0.norm2.weight"
    return entries | {first: entries[second]}


def pickled(name):
    def tamper(folder):
        (folder / WEIGHTS).unlink()
        (folder / name).write_bytes(pickle.dumps({"weight": [1.0]}))

    return tamper


def zipped(folder):
    with zipfile.ZipFile(folder / WEIGHTS, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps({"weight": [1.0]}))


def linked(folder):
    (folder / WEIGHTS).rename(folder.parent / "outside.safetensors")
    (folder / WEIGHTS).symlink_to(folder.parent / "outside.safetensors")


def half(tensors):
    tensors[NORM] = tensors[NORM].to(torch.bfloat16)


def quantised(tensors):
    tensors[NORM] = tensors[NORM].to(torch.int8)


def spoil(number):
    def edit(tensors):
        tensors["visual.merger.mlp.0.weight"].view(-1)[7] = number

    return weights(edit)


def other_words(folder):
    texts = ["other words altogether", "of another model's training", "numbered 1 to 99"]
    tokenizer = train_tokenizer(texts, TokenizerSettings(vocab_size=300))
    (folder / "tokenizer.json").write_text(tokenizer.to_str())


def other_tokens(folder):
    """As above, and hidden from the contract: a folder of before contracts named their files."""
    path = folder / "tokenizer.json"
    text = path.read_text().replace("<|image_pad|>", "<|swapped|>")
    text = text.replace("<|video_pad|>", "<|image_pad|>").replace("<|swapped|>", "<|video_pad|>")
    path.write_text(text)
    values("colfolio.json", forget)(folder)


def forget(contract):
    contract.update(files={}, seal={}, weights_hash="")


def family(config):
    config["model_type"] = "qwen2_5_vl"


def family_unseen(folder):
    values("config.json", family)(folder)
    values("colfolio.json", forget)(folder)


def in_text(key, value):
    return lambda config: config["text_config"].update({key: value})


def budget(**changes):
    return values("colfolio.json", lambda contract: contract["pixel_budget"].update(changes))


def contract(**changes):
    return values("colfolio.json", lambda contract: contract.update(changes))


TAMPERED = {
    "key renamed": (
        weights(lambda tensors: tensors.update({"model.norm.weight": tensors.pop(NORM)})),
        ["Missing: language_model.norm.weight", "Unexpected: model.norm.weight"],
    ),
    "key missing": (weights(lambda tensors: tensors.pop(NORM)), [f"Missing: {NORM}"]),
    "key of another model": (
        weights(lambda tensors: tensors.update({"lm_head.bias": torch.ones(2)})),
        ["Unexpected: lm_head.bias"],
    ),
    "wrong shape": (
        weights(lambda tensors: tensors.update({NORM: torch.ones(31)})),
        [NORM, "(31,) instead of (32,)"],
    ),
    "dtype of one tensor": (weights(half), [NORM, "bfloat16", "float32"]),
    "integers": (weights(quantised), [NORM, "int8", WEIGHTS]),
    "NaN": (spoil(float("nan")), ["NaN", "visual.merger.mlp.0.weight"]),
    "infinite": (spoil(-float("inf")), ["infinite", "visual.merger.mlp.0.weight"]),
    "one value": (spoil(0.125), ["weights_hash"]),
    "flipped bit": (
        contents(WEIGHTS, lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]),
        ["not those that were saved", "weights_hash"],
    ),
    "cut short": (contents(WEIGHTS, lambda data: data[:-9]), [WEIGHTS, "cut short"]),
    "longer": (contents(WEIGHTS, lambda data: data + bytes(64)), [WEIGHTS, "cannot be read"]),
    "header of noise": (
        contents(WEIGHTS, lambda data: data[:8] + b"#" * 40 + data[48:]),
        [WEIGHTS, "cannot be read"],
    ),
    "header longer than the file": (
        contents(WEIGHTS, lambda data: (2**40).to_bytes(8, "little") + data[8:]),
        [WEIGHTS, "cannot be read"],
    ),
    "two tensors in one place": (header(overlapping), [WEIGHTS, "cannot be read"]),
    "pickle instead": (pickled("pytorch_model.bin"), ["pytorch_model.bin", "pickled"]),
    "pickle of torch instead": (pickled("weights.pt"), ["weights.pt", "pickled"]),
    "pickle under our name": (
        contents(WEIGHTS, lambda _data: pickle.dumps([0.0] * 100)),
        [WEIGHTS, "pickled"],
    ),
    "archive under our name": (zipped, [WEIGHTS, "pickled"]),
    "link out of the folder": (linked, ["outside.safetensors", "link out of its folder"]),
    "index that points up": (elsewhere("../outside.safetensors"), [NORM, "'../outside", INDEX]),
    "index that points away": (elsewhere("{outside}"), [NORM, "outside.safetensors'", INDEX]),
    "index of pickles": (elsewhere("pytorch_model.bin"), [NORM, "'pytorch_model.bin'", INDEX]),
    "tensor in two shards": (shards(twice), [f"Unexpected: {NORM}", "of-00002.safetensors"]),
    "shard missing": (
        shards(lambda folder, _index: (folder / SHARDS[1]).unlink()),
        [SHARDS[1], "cannot be read"],
    ),
    "shard that no index names": (
        shards(lambda folder, _index: save_file({"a": torch.ones(1)}, folder / "b.safetensors")),
        ["b.safetensors", INDEX],
    ),
    "tensor that no index names": (
        shards(lambda _folder, index: index.pop(NORM)),
        [f"Unexpected: {NORM}"],
    ),
    "tensor that no shard holds": (
        shards(lambda _folder, index: index.update({"x.weight": SHARDS[0]})),
        ["Missing: x.weight", SHARDS[0]],
    ),
    "two files without an index": (
        lambda folder: save_file({"a": torch.ones(1)}, folder / "b.safetensors"),
        ["b.safetensors", INDEX],
    ),
    "code of its own": (
        values("config.json", lambda config: config.update(auto_map={"AutoModel": "own.Model"})),
        ["auto_map", "own.Model"],
    ),
    "code of its own, deeper": (
        values("config.json", in_text("trust_remote_code", True)),
        ["trust_remote_code", "never run"],
    ),
    "another family": (values("config.json", family), ["config.json"]),
    "another family, unseen": (family_unseen, ["qwen2_5_vl"]),
    "another rotation": (
        values("config.json", in_text("rope_parameters", {"rope_theta": 5.0})),
        ["config.json", "was changed"],
    ),
    "another vocabulary": (other_words, ["tokenizer.json", "was changed"]),
    "another vocabulary, unseen": (other_tokens, ["tokenizer.json", "<|image_pad|>"]),
    "another base": (contract(base_hash="0" * 64), ["base_hash", "0" * 64]),
    "another template": (
        values("colfolio.json", lambda c: c["templates"].update(query="Query: {query}")),
        ["templates", "Query: {query}"],
    ),
    "another dim": (contract(dim=17), [PROJECTION, "(16, 32) instead of (17, 32)"]),
    "another pixel budget": (budget(max_pixels=60000), ["pixel_budget", "60000"]),
    "another normalisation": (budget(mean=[0.5, 0.5, 0.5]), ["pixel_budget", "0.5"]),
    "another patch": (budget(patch=16), ["pixel_budget.patch is 16, not 14"]),
    "another position scheme": (
        contract(position_scheme="videorope"),
        ["position_scheme is 'videorope', not 'qwen2_vl'"],
    ),
    "other metrics": (contract(metrics={"test ndcg@5": 0.99}), ["metrics", "0.99"]),
    "newer contract": (contract(format=2, unheard_of=1), ["format 2", "newer"]),
    "contract without a field": (
        values("colfolio.json", lambda contract: contract.pop("position_scheme")),
        ["colfolio.json", "position_scheme"],
    ),
    "contract gone": (lambda folder: (folder / "colfolio.json").unlink(), ["colfolio.json"]),
}


def test_what_was_not_tampered_with_loads(folder, shared_retriever):
    assert Retriever.from_pretrained(folder).fingerprint() == shared_retriever.fingerprint()


def test_shards_that_were_not_tampered_with_load(folder, shared_retriever):
    shards()(folder)
    assert Retriever.from_pretrained(folder).fingerprint() == shared_retriever.fingerprint()


@pytest.mark.parametrize(("tamper", "words"), TAMPERED.values(), ids=TAMPERED)
def test_a_tampered_checkpoint_is_refused_by_name(folder, tamper, words):
    tamper(folder)
    with pytest.raises(CheckpointError) as refused:
        Retriever.from_pretrained(folder)
    told = str(refused.value)
    assert str(folder) in told
    for word in words:
        assert re.search(re.escape(word), told), f"{word!r} is not in: {told}"
