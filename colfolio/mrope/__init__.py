"""M-RoPE by itself: imports torch only, so that the folder can be copied into another project."""

from .faults import FAULTS, Finding, Verdict
from .graft import MultimodalRotary, graft, ungraft
from .grids import forget_grids
from .guard import Watch, watch
from .positions import padded_position_ids, position_ids
from .rotary import (
    cos_sin,
    interleaved,
    inverse_frequencies,
    rotate,
    sectioned,
    spatial_first,
)
from .schemes import (
    IMAGE,
    SCHEMES,
    TEXT,
    VIDEO,
    Qwen2_5VL,
    Qwen2VL,
    Qwen3VL,
    Scheme,
    Span,
    VideoRoPE,
    described,
    scheme_of,
)

__all__ = [
    "FAULTS",
    "IMAGE",
    "SCHEMES",
    "TEXT",
    "VIDEO",
    "Finding",
    "MultimodalRotary",
    "Qwen2VL",
    "Qwen2_5VL",
    "Qwen3VL",
    "Scheme",
    "Span",
    "Verdict",
    "VideoRoPE",
    "Watch",
    "cos_sin",
    "described",
    "forget_grids",
    "graft",
    "interleaved",
    "inverse_frequencies",
    "padded_position_ids",
    "position_ids",
    "rotate",
    "scheme_of",
    "sectioned",
    "spatial_first",
    "ungraft",
    "watch",
]
