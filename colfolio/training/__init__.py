"""Training: losses, optimiser, the loop, and checkpoints that resume to the bit."""

from colfolio.training.checkpoint import (
    FREE_SETTINGS,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from colfolio.training.loop import train
from colfolio.training.saved_model import save_model
from colfolio.training.start import start_training
from colfolio.training.state import TrainingState, TrainSettings
from colfolio.training.step_report import AnyReport, GenerationReport, PartReport, StepReport

__all__ = [
    "FREE_SETTINGS",
    "AnyReport",
    "GenerationReport",
    "PartReport",
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
