"""Adapters as peft itself has them, on a model with colpali-engine's names, one sequence at a time.

That model is a backbone of `transformers` with `custom_text_proj` in it.
"""

import dataclasses
import re

import peft
import pytest
import torch
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from colfolio.batch import ContrastiveBatch, MultiVectors
from colfolio.maxsim import maxsim
from colfolio.models import Retriever
from colfolio.models.adapters import LoraSettings, add_lora, merge, save_adapter
from colfolio.models.formats import AssumedWarning
from colfolio.training.exact_batch import ExactBatch, MemorySettings
from colfolio.training.losses import LossSettings, info_nce
from colfolio.training.optim import OptimiserSettings, build_optimiser, optimiser_step

WEIGHTS = "adapter_model.safetensors"
ENGINE_TARGETS = (
    "(.*(model).*(down_proj|gate_proj|up_proj|k_proj|q_proj|v_proj|o_proj).*$"
    "|.*(custom_text_proj).*$)"
)
VISION = {
    "qwen2_vl": ("attn.qkv", "mlp.fc1", "merger.mlp.2"),
    "qwen2_5_vl": ("attn.proj", "mlp.gate_proj"),
    "qwen3_vl": ("attn.qkv", "mlp.linear_fc1", "deepstack_merger_list.1.linear_fc2"),
}
FAMILIES = list(VISION)
PROJECTIONS = ["full", "adapter", "frozen"]


class EngineModel:
    """A plain model whose projection is a part of its backbone, as in colpali-engine."""

    def __init__(self, plain):
        self.plain = plain
        plain.backbone.custom_text_proj = plain.projection

    @property
    def module(self):
        return self.plain.backbone

    def vectors(self, packed):
        self.plain.projection = self.module.custom_text_proj
        return self.plain.vectors(packed)


@pytest.fixture
def engine(plain_model):
    return lambda retriever: EngineModel(plain_model(retriever, "sdpa"))


@pytest.fixture
def inputs(texts, pages):
    """Packed queries and documents of any retriever."""
    return lambda one: [one.collator.queries(texts), one.collator.documents(pages[:4])]


def change(model, size=0.02):
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, weight in sorted(model.named_parameters()):
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=generator), alpha=size)


def assert_equal_vectors(model, other, packed):
    """In float64, where rounding hides nothing."""
    model.to(torch.float64)
    other.module.to(torch.float64)
    with torch.no_grad():
        for rows in map(in_float64, packed):
            mine, theirs = model(rows).vectors, other.vectors(rows)
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_written_here_loads_in_peft_and_gives_equal_vectors(
    family, projection, make_family_retriever, engine, inputs, tmp_path
):
    retriever = make_family_retriever(family).eval()
    other = engine(retriever)
    settings = LoraSettings(rank=3, alpha=6.0, vision=VISION[family], projection=projection)
    add_lora(retriever, settings, seed=1)
    change(retriever)
    save_adapter(retriever, tmp_path / "adapter", "somewhere/base")
    loaded = peft.PeftModel.from_pretrained(other.module, tmp_path / "adapter").eval()
    theirs = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    stored = load_file(tmp_path / "adapter" / WEIGHTS)
    assert theirs.keys() == stored.keys()
    assert all(torch.equal(theirs[name], stored[name]) for name in stored)
    assert_equal_vectors(retriever, other, inputs(retriever))


@pytest.mark.parametrize("names", ["new", "old"])
@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_written_by_peft_loads_here_and_gives_equal_vectors(
    family, names, make_family_retriever, engine, inputs, tmp_path
):
    retriever = make_family_retriever(family).eval()
    retriever.save_pretrained(tmp_path / "base")
    other = engine(retriever)
    config = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        lora_dropout=0.1,
        init_lora_weights="gaussian",
        bias="none",
        task_type="FEATURE_EXTRACTION",
        target_modules=ENGINE_TARGETS,
    )
    trained = peft.get_peft_model(other.module, config).eval()
    change(trained, 0.05)
    trained.save_pretrained(tmp_path / "adapter")
    if names == "old":
        weights = load_file(tmp_path / "adapter" / WEIGHTS)
        renamed = {n.replace("model.language_model", "model.model"): t for n, t in weights.items()}
        assert renamed.keys() != weights.keys()
        save_file(renamed, tmp_path / "adapter" / WEIGHTS)
    with pytest.warns(AssumedWarning, match="names no hash of its base"):
        opened = Retriever.from_pretrained(tmp_path / "adapter", base=tmp_path / "base")
    assert_equal_vectors(opened, other, inputs(opened))
    with torch.no_grad():
        rows = in_float64(inputs(opened)[1])
        retriever.to(torch.float64)
        assert (opened(rows).vectors - retriever(rows).vectors).abs().max() > 1e-2


def test_a_projection_that_peft_trained_wholly_loads_here(retriever, engine, inputs, tmp_path):
    retriever.eval().save_pretrained(tmp_path / "base")
    other = engine(retriever)
    config = peft.LoraConfig(
        r=2, lora_alpha=2, target_modules=["q_proj"], modules_to_save=["custom_text_proj"]
    )
    trained = peft.get_peft_model(other.module, config).eval()
    change(trained, 0.05)
    trained.save_pretrained(tmp_path / "adapter")
    with pytest.warns(AssumedWarning):
        opened = Retriever.from_pretrained(tmp_path / "adapter", base=tmp_path / "base")
    assert_equal_vectors(opened, other, inputs(opened))


@pytest.mark.parametrize("family", FAMILIES)
def test_merging_equals_what_peft_merges(family, make_family_retriever, engine, tmp_path):
    retriever = make_family_retriever(family)
    other = engine(retriever)
    add_lora(retriever, LoraSettings(rank=3, alpha=6.0, vision=VISION[family]), seed=1)
    change(retriever)
    save_adapter(retriever, tmp_path / "adapter", "somewhere/base")
    theirs = peft.PeftModel.from_pretrained(other.module, tmp_path / "adapter").merge_and_unload()
    merge(retriever)
    mine, theirs = retriever.weights(), theirs.state_dict()
    assert mine.keys() == theirs.keys()
    for name, weight in mine.items():
        torch.testing.assert_close(weight, theirs[name], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("projection", PROJECTIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_of_training_equal_those_of_peft_in_float64(
    family, projection, make_family_retriever, engine, inputs, tmp_path
):
    retriever = make_family_retriever(family).to(torch.float64)
    other = engine(retriever)
    settings = LoraSettings(
        rank=3, alpha=6.0, dropout=0.0, vision=VISION[family], projection=projection
    )
    add_lora(retriever, settings, seed=1)
    base_hash = retriever.contract.base_hash  # of before the cast
    save_adapter(retriever, tmp_path / "adapter", "somewhere/base", base_hash=base_hash)
    theirs = peft.PeftModel.from_pretrained(
        other.module, tmp_path / "adapter", is_trainable=True, autocast_adapter_dtype=False
    )
    sides = [in_float64(side) for side in inputs(retriever)]
    batch = batch_of(*sides)
    plan = OptimiserSettings(lr=1e-2, weight_decay=0.0)
    mine_step, their_step = (build_optimiser(model, plan) for model in (retriever, theirs))
    frozen = {n: w.clone() for n, w in retriever.named_parameters() if not w.requires_grad}
    exact = ExactBatch(retriever.train(), MemorySettings(chunk_tokens=60, activation_mb=4.0))
    for step in range(3):
        exact.backward(batch, lambda scores: loss_of(scores, batch), seed=step)
        scores = maxsim(*(as_rows(other.vectors(side), side) for side in sides))
        loss_of(scores, batch).loss.backward()
        assert_equal(gradients(retriever), gradients(theirs))
        optimiser_step(retriever, mine_step, 1e-2, plan)
        optimiser_step(theirs, their_step, 1e-2, plan)
    now = dict(retriever.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in frozen.items())


def batch_of(queries, documents):
    positives = torch.eye(len(queries), len(documents), dtype=torch.bool)
    positives[len(documents) :, 0] = True
    return ContrastiveBatch(
        queries,
        documents,
        positives,
        torch.zeros_like(positives),
        torch.arange(len(queries)),
        torch.arange(len(documents)),
    )


def in_float64(packed):
    return dataclasses.replace(packed, patches=packed.patches.double())


def as_rows(vectors, packed):
    return MultiVectors(vectors, packed.offsets)


def loss_of(scores, batch):
    return info_nce(scores, batch.positives, batch.ignored, LossSettings())


def gradients(model):
    """Of what trains, by the names in a file."""
    named = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            plain = re.sub(
                r"base_model\.model\.|backbone\.|(modules_to_save\.)?default\.", "", name
            )
            named[plain.replace("custom_text_proj", "projection")] = weight.grad
    return named


def assert_equal(mine, theirs):
    assert mine.keys() == theirs.keys()
    total = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    for name, gradient in theirs.items():
        bound = 1e-10 * max(gradient.norm(), 1e-6 * total)
        assert (mine[name] - gradient).norm() <= bound, name
