"""What a run will take, told before anything heavy is loaded."""

from colfolio.diagnosis.planning.chunking import Chunking
from colfolio.diagnosis.planning.fixed_memory import Part
from colfolio.diagnosis.planning.machine import GPUS, Machine, memory_here, named_gpu, this_machine
from colfolio.diagnosis.planning.plan import MARGIN, Plan, make_plan
from colfolio.diagnosis.planning.row_sizes import (
    BatchSize,
    TextSize,
    assumed_sizes,
    assumed_text,
    measured_sizes,
    measured_text,
)

__all__ = [
    "GPUS",
    "MARGIN",
    "BatchSize",
    "Chunking",
    "Machine",
    "Part",
    "Plan",
    "TextSize",
    "assumed_sizes",
    "assumed_text",
    "make_plan",
    "measured_sizes",
    "measured_text",
    "memory_here",
    "named_gpu",
    "this_machine",
]
