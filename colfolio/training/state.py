"""What a run is made of: the settings that determine its weights, and all that a step changes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from pydantic import Field, model_validator
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from colfolio.attention import AttentionChoice, AttentionKernel
from colfolio.config import Settings
from colfolio.data.contrastive import BatchSettings
from colfolio.data.sampler import SamplerPosition
from colfolio.distributed import World
from colfolio.models.adapters import LoraSettings
from colfolio.models.generator import Generator
from colfolio.models.gradient_checkpointing import GradientCheckpointing
from colfolio.models.precision import Precision
from colfolio.models.retriever import Retriever
from colfolio.training.exact_batch import ExactBatch, MemorySettings
from colfolio.training.feature_cache import FeatureCacheSettings
from colfolio.training.generation import ExactText
from colfolio.training.losses import LossSettings
from colfolio.training.optim import OptimiserSettings, ParameterGroup
from colfolio.training.thaw import Selectors, ThawStage
from colfolio.training.thaw_signals import Watch


class TrainSettings(Settings):
    """What determines the weights that come out; the number of ranks is no part of it.

    Args:
        objective: what is learnt: `retrieval`, queries find the pages that answer them; or
            `generation`, the next token of answers about images and videos, of which `batch.rows`
            says how many make a batch.
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
        tensorboard: event files for TensorBoard too are written into the run folder.
        frozen: selectors of parts that do not train, as `vision` or `layers[0:14]`.
        lora: adapters that train in place of all else, beside at most the projection.
        thaw: what opens later; see `ThawStage`.
        thaw_window: steps of a window of `margin_flat`.
    """

    objective: Literal["retrieval", "generation"] = "retrieval"
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
    tensorboard: bool = False
    frozen: Selectors = ()
    lora: LoraSettings | None = None
    thaw: tuple[ThawStage, ...] = ()
    thaw_window: int = Field(default=50, ge=2)

    @model_validator(mode="after")
    def _check_objective(self) -> TrainSettings:
        if self.objective == "generation":
            of_retrieval = self.batch != BatchSettings(rows=self.batch.rows)
            if of_retrieval or self.loss != LossSettings():
                raise ValueError(
                    "objective generation has one loss, and of `batch` it knows `rows` alone: "
                    "leave out `loss` and the other keys of `batch`, which are of retrieval"
                )
        return self


@dataclass(slots=True)
class TrainingState:
    """Everything that a step changes, and what computes it.

    Args:
        kernel: the attention that the settings came to.
        groups: of the optimiser.
        base_hash: of the weights that the run added adapters to; empty if it added none.
        blank: a spread model without weights, to put it together in.
        opened: the step with which each stage opened, of those that have.
        watch: what later stages go by.
    """

    model: Retriever | Generator
    optimiser: Optimizer
    settings: TrainSettings
    exact: ExactBatch | ExactText
    scaler: GradScaler
    world: World
    kernel: AttentionKernel
    groups: list[ParameterGroup]
    base_hash: str = ""
    blank: Retriever | Generator | None = None
    opened: list[int] = field(default_factory=list)
    watch: Watch = field(default_factory=Watch)
    step: int = 0
    position: SamplerPosition = field(default_factory=SamplerPosition)

    @property
    def retriever(self) -> Retriever:
        """The model where the objective is retrieval."""
        assert isinstance(self.model, Retriever)
        return self.model

    @property
    def generator(self) -> Generator:
        """The model where the objective is generation."""
        assert isinstance(self.model, Generator)
        return self.model

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds a part of the model."""
        return self.settings.parallel == "fsdp2" and self.world.size > 1
