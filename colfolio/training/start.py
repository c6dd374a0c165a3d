"""A model made ready to train: policy, precision, attention, ranks, optimiser."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from colfolio.attention import AttentionKernel, choose_attention, set_attention
from colfolio.distributed import World, shard
from colfolio.errors import RecipeError
from colfolio.models.adapters import base_hash_of
from colfolio.models.border import frozen_border
from colfolio.models.checkpoint import cast_parameters
from colfolio.models.generator import Generator
from colfolio.models.gradient_checkpointing import checkpoint_layers
from colfolio.models.parts import inventory
from colfolio.models.precision import product_dtype, settled_precision
from colfolio.models.retriever import Retriever
from colfolio.training.dropout import RowDropouts
from colfolio.training.exact_batch import ExactBatch
from colfolio.training.feature_cache import FeatureCache
from colfolio.training.generation import ExactText
from colfolio.training.optim import ParameterGroup, build_optimiser, build_scaler, first_groups
from colfolio.training.state import TrainingState, TrainSettings
from colfolio.training.thaw import apply_policy, openings, trained_names
from colfolio.training.thaw_schedule import check_schedule, most_windows
from colfolio.training.unsharding import blank_copy


def start_training(
    model: Retriever | Generator,
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
        RecipeError: what is to be frozen, adapted or opened is not there, or not in that order.
    """
    check_settings(settings)
    _check_model(model, settings)
    base_hash = ""  # a generator is never saved as an adapter alone
    if settings.lora is not None and isinstance(model, Retriever):
        base_hash = base_hash_of(model)
    groups = begin_policy(model, settings)
    state = assembled(model, settings, world or World(), features_folder, groups)
    state.base_hash = base_hash
    return state


def check_settings(settings: TrainSettings) -> None:
    """Refuse settings that contradict one another, whatever the model.

    Raises:
        RecipeError: names the key.
    """
    kind = settings.optimiser.state
    if settings.parallel == "fsdp2" and kind == "bitsandbytes_8bit":
        raise RecipeError(
            "optimiser.state bitsandbytes_8bit cannot be spread over ranks, as parallel: fsdp2 "
            "asks; take torchao_8bit, or parallel: ddp"
        )
    if settings.thaw and kind != "fp32":
        raise RecipeError(
            f"{kind} settles what it keeps of each weight before the first step, so nothing can "
            "open later; take fp32, or leave out `thaw`",
            "optimiser.state",
        )
    if settings.objective == "generation":
        _check_generation(settings)
    usual = TrainSettings.model_fields["thaw_window"].default
    if settings.thaw_window != usual and not most_windows(settings.thaw):
        raise RecipeError(
            f"is {settings.thaw_window}, and no stage of `thaw` has margin_flat, which alone looks "
            "at windows; leave it out",
            "thaw_window",
        )
    check_schedule(settings.thaw, settings.thaw_window, settings.steps)


def begin_policy(model: Retriever | Generator, settings: TrainSettings) -> list[ParameterGroup]:
    """Adapt and freeze a model as settings say, in place; the parameters that then train.

    The model may be on the meta device, to see what a run will do.

    Raises:
        RecipeError: something is not there, a stage has nothing to open, or nothing ever trains.
    """
    apply_policy(model, settings.frozen, settings.lora, settings.seed)
    if settings.thaw and all(parameter.requires_grad for parameter in model.parameters()):
        raise RecipeError(
            "everything trains from the beginning, so no stage has anything to open; name what "
            "waits in `frozen`, or begin with `lora`",
            "thaw",
        )
    stages = openings(model, settings.thaw)
    names = trained_names(model)
    if not names and not (stages and settings.thaw[0].step == 0):
        raise RecipeError(
            "no parameter of the model trains in the first step: all are frozen; leave the "
            "projection open, or let a stage of `thaw` open something at step 0",
            "frozen",
        )
    return first_groups(model, settings.optimiser, inventory(model).label(names))


def assembled(
    model: Retriever | Generator,
    settings: TrainSettings,
    world: World,
    features_folder: Path | None,
    groups: list[ParameterGroup],
    opened: Sequence[int] = (),
) -> TrainingState:
    """The state of a model whose parameters train or not as they shall.

    Args:
        opened: the steps with which stages have opened before.
    """
    device = model.device
    precision = settled_precision(settings.precision, device)
    dtype = product_dtype(precision, device)
    kernel = choose_attention(settings.attention, device, dtype)
    settled = {"precision": precision, "threads": settings.threads or torch.get_num_threads()}
    settings = settings.model_copy(update=settled)
    cache = _cache(model, settings, features_folder, has_opened=bool(opened))
    exact, blank = equip(model, settings, kernel, world, cache)
    return TrainingState(
        model,
        build_optimiser(model, settings.optimiser, groups),
        settings,
        exact,
        build_scaler(precision, device),
        world,
        kernel,
        groups,
        blank=blank,
        opened=list(opened),
    )


def equip(
    model: Retriever | Generator,
    settings: TrainSettings,
    kernel: AttentionKernel,
    world: World,
    cache: FeatureCache | None,
) -> tuple[ExactBatch | ExactText, Retriever | Generator | None]:
    """What computes gradients of a model, whose layers are changed in place to draw and to share.

    To be called anew when other parameters train, or layers were replaced; the model is then whole.

    Args:
        settings: settled.

    Returns:
        Also a blank copy of the model, if it is spread over ranks now.
    """
    is_spread = settings.parallel == "fsdp2" and world.size > 1
    set_attention(model.backbone, settings.attention)
    cast_parameters(model, torch.float32)
    model.train()
    blank = blank_copy(model) if is_spread else None
    dropouts = RowDropouts(model)
    checkpoint_layers(model.backbone, settings.gradient_checkpointing, dropouts.contexts)
    if is_spread:
        narrow = product_dtype(settings.precision, model.device)
        halves = None if settings.precision == "fp32" else narrow
        shard(model, model.units(), world, methods=["run_below"], compute_dtype=halves)
    shared: dict[str, Any] = {
        "precision": settings.precision,
        "world": world,
        "is_sharded": is_spread,
        "cache": cache,
        "dropouts": dropouts,
        "kernel": kernel,
    }
    if isinstance(model, Generator):
        return ExactText(model, settings.memory, **shared), blank
    return ExactBatch(model, settings.memory, **shared), blank


def _check_generation(settings: TrainSettings) -> None:
    if settings.lora is not None and settings.lora.projection != "frozen":
        raise RecipeError(
            f"is {settings.lora.projection!r}, and the head of a generator is neither adapted nor "
            "trained beside adapters; set it to frozen",
            "lora.projection",
        )
    for number, stage in enumerate(settings.thaw):
        if stage.margin_flat is not None or stage.at_chance is not None:
            raise RecipeError(
                "is a signal of retrieval, and objective generation has none; let the stage open "
                "at a step or an epoch",
                f"thaw.{number}.{stage.start}",
            )


def _check_model(model: Retriever | Generator, settings: TrainSettings) -> None:
    needed = Generator if settings.objective == "generation" else Retriever
    if not isinstance(model, needed):
        raise RecipeError(
            f"train.objective {settings.objective} trains a {needed.__name__}, received a "
            f"{type(model).__name__}"
        )


def _cache(
    model: Retriever | Generator,
    settings: TrainSettings,
    folder: Path | None,
    *,
    has_opened: bool,
) -> FeatureCache | None:
    """The cache that the settings ask for; once stages have opened there may be nothing in it."""
    asked = settings.features
    if not asked.ram_mb and not asked.disk_mb:
        return None
    if not has_opened and frozen_border(model.backbone, is_visual=True) is None:
        raise RecipeError(
            f"features has {asked.ram_mb:g} MiB of memory and {asked.disk_mb:g} of disk, but "
            "no layer at the bottom of the model is frozen, so there is nothing to keep; set both "
            "to 0, or freeze the vision tower"
        )
    return FeatureCache(asked, folder)
