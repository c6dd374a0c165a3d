"""What tests of adapters share: settings, changes as training makes them, and edits of folders."""

import copy
import json

import torch
from safetensors.torch import load_file, save_file

from colfolio.models.adapters import LoraSettings

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
Q = "language_model.layers.0.self_attn.q_proj"
VISION = {
    "qwen2_vl": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "merger.mlp.0"),
    "qwen2_5_vl": ("attn.qkv", "mlp.gate_proj", "mlp.down_proj"),
    "qwen3_vl": ("attn.qkv", "mlp.linear_fc1", "merger.linear_fc2"),
    "colfolio_grafted": ("attn.qkv", "mlp.fc1"),
}
SMALL = LoraSettings(rank=3, alpha=6.0)
PROJECTIONS = ["full", "adapter", "frozen"]


def change_open_weights(retriever, size=0.02):
    """As training would: B is zero at the start, and hides what A does."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, weight in sorted(retriever.named_parameters()):
            if weight.requires_grad:
                drawn = torch.randn(weight.shape, generator=generator)
                weight.add_(drawn.to(weight.dtype), alpha=size)


def vectors_of(retriever, texts, pages):
    both = [retriever.encode_queries(texts), retriever.encode_documents(pages[:3])]
    return torch.cat([each.vectors for each in both])


def assert_close_to(vectors, expected, exact):
    """Both are rounded: to the truth the one is about as close as the other."""
    error = (expected - exact).norm()
    assert error < 1e-6 * exact.norm()
    assert (vectors - exact).norm() <= 2 * error


def exact_vectors(retriever, texts, pages):
    """In float64, of the same weights."""
    exact = copy.deepcopy(retriever).to(torch.float64)
    packed = [exact.collator.queries(texts), exact.collator.documents(pages[:3])]
    with torch.no_grad():
        return torch.cat([exact.eval()(each).vectors for each in packed])


def state_of(retriever):
    return {name: tensor.clone() for name, tensor in retriever.state_dict().items()}


def assert_same_state(retriever, before):
    now = retriever.state_dict()
    assert now.keys() == before.keys()
    for name, tensor in now.items():
        assert torch.equal(tensor, before[name]), name


def change_config(folder, **values):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_weights(folder, edit):
    weights = load_file(folder / WEIGHTS)
    edit(weights)
    save_file(weights, folder / WEIGHTS)


def as_foreign(folder, rename=lambda name: name):
    """What another library would have written: no contract, and names of its own."""
    (folder / "colfolio.json").unlink(missing_ok=True)
    weights = {rename(name): tensor for name, tensor in load_file(folder / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS)
