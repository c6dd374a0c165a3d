"""Checkpoints of other libraries: read as ours, and ours written as theirs."""

from colfolio.models.formats.reading import AssumedWarning, Found, detect, read, read_backbone
from colfolio.models.formats.writing import (
    ADAPTER_TARGETS,
    TARGETS,
    write,
    write_beside_adapter,
    write_checkpoint,
)

__all__ = [
    "ADAPTER_TARGETS",
    "TARGETS",
    "AssumedWarning",
    "Found",
    "detect",
    "read",
    "read_backbone",
    "write",
    "write_beside_adapter",
    "write_checkpoint",
]
