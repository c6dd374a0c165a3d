"""M-RoPE by itself: imports torch only, so that the folder can be copied into another project."""

from colfolio.mrope.positions import IMAGE, TEXT, VIDEO, position_ids

__all__ = ["IMAGE", "TEXT", "VIDEO", "position_ids"]
