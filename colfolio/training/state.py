"""What a run is made of: the settings that determine its weights, and all that a step changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from colfolio.attention import AttentionChoice, AttentionKernel, choose_attention, set_attention
from colfolio.config import Settings
from colfolio.data.contrastive import BatchSettings
from colfolio.data.sampler import SamplerPosition
from colfolio.distributed import World, shard
from colfolio.errors import RecipeError
from colfolio.models.border import frozen_border
from colfolio.models.checkpoint import cast_parameters
from colfolio.models.gradient_checkpointing import GradientCheckpointing, checkpoint_layers
from colfolio.models.precision import Precision, product_dtype, settled_precision
from colfolio.models.retriever import Retriever
from colfolio.training.dropout import RowDropouts
from colfolio.training.exact_batch import ExactBatch, MemorySettings
from colfolio.training.feature_cache import FeatureCache, FeatureCacheSettings
from colfolio.training.losses import LossSettings
from colfolio.training.optim import OptimiserSettings, build_optimiser, build_scaler


class TrainSettings(Settings):
    """What determines the weights that come out; the number of ranks is no part of it.

    Args:
        steps: optimiser steps of the whole run.
        seed: of the order of the data, and of dropout where the model has any.
        accumulation: batches whose mean gradient makes one optimiser step. It adds no candidates:
            each batch is compared within itself, and all its documents are candidates every time.
        features: how much of the output of frozen layers is kept across epochs.
        precision: `auto` is bf16 autocast where the machine computes it natively, else fp32.
        attention: the kernel; `auto` takes the best that is there.
        gradient_checkpointing: layers that keep only their input, and compute the rest again:
            `none`, `all`, or the first of every so many.
        parallel: what several ranks share: `ddp`, each holds the whole model; `fsdp2`, each holds a
            part of every layer, gathered when it runs.
        threads: CPU threads; None leaves them as they are. Another number rounds otherwise.
    """

    steps: int = Field(ge=1)
    seed: int = Field(default=0, ge=0)
    batch: BatchSettings = BatchSettings()
    accumulation: int = Field(default=1, ge=1)
    memory: MemorySettings = MemorySettings()
    features: FeatureCacheSettings = FeatureCacheSettings()
    loss: LossSettings = LossSettings()
    optimiser: OptimiserSettings = OptimiserSettings()
    precision: Precision = "auto"
    attention: AttentionChoice = "auto"
    gradient_checkpointing: GradientCheckpointing = "none"
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    threads: int | None = Field(default=None, ge=1)


@dataclass(slots=True)
class TrainingState:
    """Everything that a step changes, and what computes it.

    `kernel` is the attention that the settings came to.
    """

    retriever: Retriever
    optimiser: Optimizer
    settings: TrainSettings
    exact: ExactBatch
    scaler: GradScaler
    world: World
    kernel: AttentionKernel
    step: int = 0
    position: SamplerPosition = field(default_factory=SamplerPosition)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the model."""
        return self.settings.parallel == "fsdp2" and self.world.size > 1


def start_training(
    retriever: Retriever,
    settings: TrainSettings,
    world: World | None = None,
    features_folder: Path | None = None,
) -> TrainingState:
    """The state before the first step.

    Weights that train are float32, whatever their file holds: in bf16 a step smaller than a part in
    256 of a weight would be lost. `precision` is that of the arithmetic alone. What the settings
    leave to the machine, precision and threads, is settled here, so that a resumed run keeps it.

    Args:
        features_folder: for the files of the feature cache; needed if the settings give it a disk.

    Raises:
        ColfolioError: the machine lacks a kernel or package that the settings name, or the model
            drops in a way that is not drawn by row.
    """
    world = world or World()
    _check_state(settings)
    device = retriever.device
    precision = settled_precision(settings.precision, device)
    dtype = product_dtype(precision, device)
    kernel = choose_attention(settings.attention, device, dtype)
    set_attention(retriever.backbone, settings.attention)
    cast_parameters(retriever, torch.float32)
    retriever.train()
    dropouts = RowDropouts(retriever)
    checkpoint_layers(retriever.backbone, settings.gradient_checkpointing, dropouts.contexts)
    if settings.parallel == "fsdp2":
        halves = None if precision == "fp32" else dtype
        shard(retriever, retriever.units(), world, methods=["run_below"], compute_dtype=halves)
    exact = ExactBatch(
        retriever,
        settings.memory,
        precision,
        world,
        is_sharded=settings.parallel == "fsdp2",
        cache=_cache(retriever, settings.features, features_folder),
        dropouts=dropouts,
        kernel=kernel,
    )
    settled = {"precision": precision, "threads": settings.threads or torch.get_num_threads()}
    return TrainingState(
        retriever,
        build_optimiser(retriever, settings.optimiser),
        settings.model_copy(update=settled),
        exact,
        build_scaler(precision, device),
        world,
        kernel,
    )


def _check_state(settings: TrainSettings) -> None:
    if settings.parallel == "fsdp2" and settings.optimiser.state == "bitsandbytes_8bit":
        raise RecipeError(
            "optimiser.state bitsandbytes_8bit cannot be spread over ranks, as parallel: fsdp2 "
            "asks; take torchao_8bit, or parallel: ddp"
        )


def _cache(
    retriever: Retriever, settings: FeatureCacheSettings, folder: Path | None
) -> FeatureCache | None:
    if not settings.ram_mb and not settings.disk_mb:
        return None
    if frozen_border(retriever.backbone, is_visual=True) is None:
        raise RecipeError(
            f"features has {settings.ram_mb:g} MiB of memory and {settings.disk_mb:g} of disk, but "
            "no layer at the bottom of the model is frozen, so there is nothing to keep; set both "
            "to 0, or freeze the vision tower"
        )
    return FeatureCache(settings, folder)
