"""Training: losses, optimiser, the loop, and checkpoints that resume to the bit."""

from colfolio.training.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint
from colfolio.training.loop import (
    StepReport,
    TrainingState,
    TrainSettings,
    start_training,
    train,
)

__all__ = [
    "StepReport",
    "TrainSettings",
    "TrainingState",
    "load_checkpoint",
    "newest_checkpoint",
    "save_checkpoint",
    "start_training",
    "train",
]
