"""What tests of formats share: a retriever as what is written, and edits of folders."""

import json

import torch
from safetensors.torch import load_file, save_file

from colfolio.models.formats import Found, write

WEIGHTS = "model.safetensors"
CONTRACT = "colfolio.json"
TARGETS = ["colfolio", "colpali-engine", "transformers", "sentence-transformers"]


def found(retriever):
    config, weights = retriever.backbone.config, retriever.weights()
    return Found("any", config, weights, retriever.tokenizer, retriever.contract)


def change(path, **values):
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | values))


def drop(path, name):
    values = json.loads(path.read_text())
    del values[name]
    path.write_text(json.dumps(values))


def change_weights(path, edit):
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def set_modules(folder, edit):
    path = folder / "modules.json"
    modules = json.loads(path.read_text())
    edit(modules)
    path.write_text(json.dumps(modules))


def written(retriever, folder, target):
    write(found(retriever), folder, target)
    return folder


def assert_same_weights(mine, theirs):
    assert mine.keys() == theirs.keys()
    for name, tensor in mine.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name


def assert_same_rows(mine, theirs):
    assert len(mine) == len(theirs)
    for ours, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(ours, other.float(), rtol=0, atol=1e-5)
