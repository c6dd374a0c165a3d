"""The gradient of a batch is the same in any number of ranks, replicated or sharded."""

import dataclasses

import numpy as np
import peft
import pytest
import torch
from ranks import run_in_ranks

from colfolio.batch import ContrastiveBatch
from colfolio.data.video import Clip
from colfolio.distributed import World, shard, whole
from colfolio.maxsim import maxsim
from colfolio.models.checkpoint import cast_parameters
from colfolio.models.retriever import Retriever
from colfolio.training.dropout import RowDropouts
from colfolio.training.exact_batch import ExactBatch, MemorySettings
from colfolio.training.feature_cache import FeatureCache, FeatureCacheSettings
from colfolio.training.frozen_states import row_digests
from colfolio.training.losses import LossSettings, contrastive_loss

TEXTS = ["red circle", "a", "chapter 12: results", "blue square", "grey", "a page of text, long"]
SIZES = [(28, 28), (56, 84), (28, 112), (84, 84), (56, 56), (28, 56), (112, 28)]
# rows of each rank; in a world of four one has no documents at all
QUERIES = {1: [6], 2: [4, 2], 4: [2, 1, 1, 2]}
DOCUMENTS = {1: [8], 2: [3, 5], 4: [4, 0, 3, 1]}
PLAIN = {"chunk_tokens": None, "activation_mb": None, "lora": False, "frozen": [], "cache": False}
CASES = {
    "one pass": {},
    "chunks": {"chunk_tokens": 30},
    "chunks run twice": {"chunk_tokens": 1, "activation_mb": 2.0},
    "frozen vision": {"chunk_tokens": 30, "activation_mb": 3.0, "frozen": ["visual"]},
    "cached vision": {"chunk_tokens": 30, "frozen": ["visual"], "cache": True},
    "dropout": {"chunk_tokens": 30, "activation_mb": 5.0, "lora": True},
}


def case_of(name):
    return PLAIN | CASES[name]


def whole_batch(collator):
    generator = np.random.default_rng(0)
    pages = [generator.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]
    clip = Clip(generator.integers(0, 256, (3, 56, 28, 3), dtype=np.uint8), 0.5)
    documents = collator.documents([*pages, clip])
    positives = torch.zeros(6, 8, dtype=torch.bool)
    positives[range(6), [0, 1, 2, 7, 4, 4]] = True
    ignored = torch.zeros_like(positives)
    ignored[0, 6] = ignored[4, 5] = True
    ids = torch.arange(6), torch.arange(8)
    return ContrastiveBatch(
        collator.queries(TEXTS), documents, positives, ignored, *ids, row_digests(documents)
    )


def share_of(batch, world):
    """A rank's rows; the masks stay those of all."""
    queries, documents = (
        slice(sum(sizes[: world.rank]), sum(sizes[: world.rank + 1]))
        for sizes in (QUERIES[world.size], DOCUMENTS[world.size])
    )
    return dataclasses.replace(
        batch,
        queries=batch.queries.rows(queries.start, queries.stop),
        documents=batch.documents.rows(documents.start, documents.stop),
        query_ids=batch.query_ids[queries],
        document_ids=batch.document_ids[documents],
        document_digests=batch.document_digests[documents],
    )


def prepared(path, case):
    retriever = Retriever.from_pretrained(path, device="cpu").train()
    for part in case["frozen"]:
        retriever.backbone.get_submodule(part).requires_grad_(False)
    if case["lora"]:
        retriever.requires_grad_(False)
        config = peft.LoraConfig(r=2, lora_dropout=0.2, target_modules=r".*_proj")
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, retriever.backbone.language_model)
        with torch.no_grad():
            for name, weight in sorted(retriever.named_parameters()):
                if "lora_B" in name:
                    weight.normal_(std=0.2)
    cast_parameters(retriever, torch.float64)
    return retriever


def gradients_in(world, path, parallel, names):
    """Of each case, its loss and the gradient of every parameter that has one."""
    found = {}
    for name in names:
        case = case_of(name)
        retriever = prepared(path, case)
        dropouts = RowDropouts(retriever)
        if parallel == "fsdp2":
            shard(retriever, retriever.units(), world, methods=["run_below"])
        cache = FeatureCache(FeatureCacheSettings(ram_mb=20.0), None) if case["cache"] else None
        exact = ExactBatch(
            retriever,
            MemorySettings(chunk_tokens=case["chunk_tokens"], activation_mb=case["activation_mb"]),
            world=world,
            is_sharded=parallel == "fsdp2",
            cache=cache,
            dropouts=dropouts,
        )
        batch = share_of(whole_batch(retriever.collator), world)
        for run in range(2 if case["cache"] else 1):
            retriever.zero_grad()
            if cache and run and world.rank == 0:  # a rank that lost some of its rows
                cache.drop()
            summary = exact.backward(batch, loss_of(batch), seed=7)
        world.sum_gradients(retriever.parameters())
        gradients = {
            key: whole(weight.grad).clone()
            for key, weight in retriever.named_parameters()
            if weight.grad is not None
        }
        found[name] = summary.loss.item(), gradients
    return found


def loss_of(batch):
    settings = LossSettings(symmetric=True)
    return lambda scores: contrastive_loss(scores, batch.positives, batch.ignored, settings)


def expected_of(path, name):
    """The definition: one process, one graph; with dropout, one pass that draws by row."""
    if CASES[name].get("lora"):
        return gradients_in(World(), path, "ddp", [name])[name]
    retriever = prepared(path, case_of(name))
    batch = whole_batch(retriever.collator)
    loss = loss_of(batch)(maxsim(retriever(batch.queries), retriever(batch.documents))).loss
    loss.backward()
    named = retriever.named_parameters()
    return loss.item(), {key: weight.grad for key, weight in named if weight.grad is not None}


def assert_equal(found, expected, name):
    loss, gradients = found
    assert loss == pytest.approx(expected[0], rel=1e-12), name
    assert gradients.keys() == expected[1].keys()
    total = torch.stack([gradient.norm() for gradient in expected[1].values()]).norm()
    for key, gradient in expected[1].items():
        assert (gradients[key] - gradient).norm() <= 1e-12 * total, f"{name}: {key}"


@pytest.fixture
def path(retriever, tmp_path):
    retriever.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def check(path, folder, size, parallel, names):
    for each in run_in_ranks(gradients_in, size, folder, str(path), parallel, list(names)):
        for name in names:
            assert_equal(each[name], expected_of(path, name), f"{parallel}, {size} ranks, {name}")


def test_two_ranks_have_the_gradient_of_one(path, tmp_path):
    check(path, tmp_path / "ranks", 2, "ddp", ["chunks run twice", "dropout"])


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp2"])
@pytest.mark.parametrize("size", [2, 4])
def test_any_number_of_ranks_has_the_gradient_of_one(path, tmp_path, size, parallel):
    check(path, tmp_path / "ranks", size, parallel, CASES)


def test_a_world_of_one_is_the_definition(path):
    found = gradients_in(World(), path, "ddp", CASES)
    for name in CASES:
        assert_equal(found[name], expected_of(path, name), name)
