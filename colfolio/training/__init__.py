"""Training: losses, optimiser, the loop, and checkpoints that resume to the bit."""

from colfolio.training.checkpoint import (
    FREE_SETTINGS,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
    save_model,
)
from colfolio.training.loop import StepReport, train
from colfolio.training.state import TrainingState, TrainSettings, start_training

__all__ = [
    "FREE_SETTINGS",
    "StepReport",
    "TrainSettings",
    "TrainingState",
    "load_checkpoint",
    "newest_checkpoint",
    "save_checkpoint",
    "save_model",
    "start_training",
    "train",
]
