"""Runs in which nothing is wrong: losses, batches, policies, kinds of data."""

from __future__ import annotations

from typing import Any

from faults.trials import HEALTHY, Trial

_LORA = {"rank": 8, "alpha": 16.0, "dropout": 0.0}
_DECODER = ["embedding", "layers", "norm"]


def _run(name: str, told: str, train: dict[str, Any] | None = None, **others: Any) -> Trial:
    return Trial(name, HEALTHY, told, train or {}, **others)


HEALTHY_RUNS: tuple[Trial, ...] = (
    _run("plain", "InfoNCE over 64 rows"),
    _run("symmetric", "InfoNCE of both directions", {"loss": {"symmetric": True}}),
    _run(
        "sigmoid",
        "the sigmoid loss on a trained base",
        {"loss": {"kind": "sigmoid", "bias": -8.0}},
        base="trained",
    ),
    _run(
        "distillation",
        "a teacher's scores are followed",
        {"loss": {"kind": "distillation"}, "batch": {"rows": 32, "hard_negatives": 3}},
        data="teacher",
    ),
    _run(
        "pairwise-trained",
        "the pairwise loss on a trained base",
        {"loss": {"kind": "pairwise"}},
        base="trained",
    ),
    _run("temperature-half", "a temperature of 0.5", {"loss": {"temperature": 0.5}}),
    _run("temperature-2", "a temperature of 2", {"loss": {"temperature": 2.0}}),
    _run("rows-16", "16 rows", {"batch": {"rows": 16}, "steps": 240}),
    _run("rows-32", "32 rows", {"batch": {"rows": 32}, "steps": 120}),
    _run("rows-128", "128 rows", {"batch": {"rows": 128}, "steps": 60}),
    _run(
        "rows-256",
        "256 rows in small chunks, none of which keeps its graph",
        {"batch": {"rows": 256}, "steps": 45, "memory": {"chunk_tokens": 512, "activation_mb": 24}},
    ),
    _run("accumulation", "two batches a step", {"batch": {"rows": 32}, "accumulation": 2}),
    _run("bf16", "arithmetic in bf16", {"precision": "bf16"}),
    _run("fp16", "arithmetic in fp16, whose loss is scaled", {"precision": "fp16", "steps": 60}),
    _run("trained", "a trained base goes on, on other images", {"steps": 40}, base="trained"),
    _run("other-field", "a base that was trained on another field", base="far"),
    _run("published", "published weights with a fresh projection", base="published"),
    _run("lora", "adapters on a trained base", {"lora": _LORA}, base="trained"),
    _run(
        "lora-full",
        "adapters, and a projection that trains wholly",
        {"lora": _LORA | {"projection": "full", "dropout": 0.1}},
        base="trained",
    ),
    _run(
        "lora-goes-on", "an adapter that was trained before goes on", {"steps": 40}, base="adapted"
    ),
    _run(
        "frozen-vision",
        "a trained base with its vision tower frozen",
        {"frozen": ["vision", "merger"], "steps": 40},
        base="trained",
    ),
    _run(
        "frozen-decoder",
        "a trained base with its decoder frozen",
        {"frozen": _DECODER, "steps": 40},
        base="trained",
    ),
    _run(
        "projection-only",
        "a trained base of which the projection alone trains",
        {"frozen": ["vision", "merger", *_DECODER], "steps": 40},
        base="trained",
    ),
    _run(
        "thaw",
        "a decoder that opens by stages",
        {
            "frozen": _DECODER,
            "thaw": [
                {"step": 20, "open": ["layers[top 50%]", "norm"], "lr": 1e-3, "warmup": 5},
                {"step": 40, "open": ["all"], "lr": 1e-3, "warmup": 5},
            ],
        },
        base="trained",
    ),
    _run(
        "thaw-drawn",
        "random weights of which the vision tower opens later",
        {
            "frozen": ["vision"],
            "steps": 100,
            "thaw": [{"step": 20, "open": ["vision"], "lr": 1e-3, "warmup": 5}],
        },
    ),
    _run(
        "hard-negatives",
        "judged negatives in each batch",
        {"batch": {"rows": 32}},
        data="negatives",
    ),
    _run("copies-masked", "copies of pages, which are masked", data="copied"),
    _run(
        "features",
        "the output of frozen layers is kept",
        {"frozen": ["vision"], "features": {"ram_mb": 64}, "steps": 40},
        base="trained",
    ),
    _run(
        "checkpointing", "layers are computed again", {"gradient_checkpointing": "all", "steps": 60}
    ),
    _run("rate-half", "half of the rate", {"optimiser": {"lr": 1e-3}}),
    _run("no-warmup", "no warm-up", {"optimiser": {"warmup_steps": 0}}),
    _run(
        "rate-low-trained",
        "a trained base at a low rate",
        {"optimiser": {"lr": 5e-5}, "steps": 40},
        base="trained",
    ),
    _run(
        "video",
        "clips are described",
        {"objective": "generation", "batch": {"rows": 16}, "steps": 120},
        data="moving",
        base="generator",
    ),
    _run(
        "video-lora",
        "clips are described, by adapters and an open tower",
        {
            "objective": "generation",
            "batch": {"rows": 16},
            "lora": _LORA | {"projection": "frozen"},
            "thaw": [{"step": 0, "open": ["vision", "merger"], "lr": 2e-3, "warmup": 5}],
        },
        data="moving",
        base="generator",
    ),
    _run("two-ranks", "two ranks share each batch", {"steps": 60}, ranks=2),
    _run(
        "two-ranks-sharded",
        "two ranks share model and batch",
        {"steps": 40, "parallel": "fsdp2"},
        base="trained",
        ranks=2,
    ),
)
