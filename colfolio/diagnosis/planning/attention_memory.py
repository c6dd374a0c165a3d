"""Bytes that attention over packed sequences keeps for backward, by kernel.

Letters: N tokens, L length of one sequence, c bytes of a number in a product of matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from colfolio.diagnosis.planning.numerics import WIDE, Numerics

# Up to this length `sdpa` on a CPU is a plain product, which keeps its weights, L x L.
_SHORT, _SHORT_IN_HALF = 128, 1024


@dataclass(frozen=True, slots=True)
class Heads:
    """Of one layer.

    Args:
        count: of queries.
        width: of all of them together.
        key_width: of the keys; fewer heads of keys are shared in groups.
        holds_values: width of the tensor that the values are a part of.
        is_causal: whether a token sees only itself and those before it.
    """

    count: int
    width: int
    key_width: int
    holds_values: int
    is_causal: bool


def attention_memory(
    heads: Heads, lengths: Sequence[int], numerics: Numerics, *, output_is_kept: bool
) -> int:
    """Bytes of queries, keys, values, weights and output that a layer keeps.

    Args:
        lengths: of the sequences, as they lie behind one another.
        output_is_kept: the projection behind has a weight that trains, and reads the output.
    """
    lengths = [length for length in lengths if length]
    tokens, c = sum(lengths), numerics.product_bytes
    output = tokens * heads.width * c
    kept = output if output_is_kept else 0
    if numerics.attention == "flash_attention_2":  # shares keys in groups by itself
        return tokens * (heads.width + 2 * heads.key_width) * c + _sums(heads, tokens) + output
    if numerics.attention == "varlen":
        return tokens * 3 * heads.width * c + _sums(heads, tokens) + output
    if numerics.attention == "eager":
        inputs = tokens * (2 * heads.width + _values(heads)) * c
        return inputs + kept + sum(heads.count * length**2 * c for length in lengths)
    if numerics.is_cuda:
        inputs = tokens * (2 * heads.width + _values(heads)) * c
        return inputs + _sums(heads, tokens) + output + kept  # in two orders of dimensions
    return _on_cpu(heads, lengths, numerics, output_is_kept=output_is_kept)


def _on_cpu(
    heads: Heads, lengths: Sequence[int], numerics: Numerics, *, output_is_kept: bool
) -> int:
    """Runs of equal length in one call each; short ones of many lengths in rows of the longest."""
    c, tokens = numerics.product_bytes, sum(lengths)
    runs = [(length, len(list(run))) for length, run in groupby(lengths)]
    longest = max(lengths, default=0)
    kept = tokens * heads.width * c if output_is_kept else 0
    if longest <= _SHORT and len(set(lengths)) > 1:
        places = longest * len(lengths)
        index = 8 * (places + tokens)
        # softmax weights in float32, and as they are multiplied
        each = WIDE + c if numerics.is_half else WIDE
        weights = heads.count * longest**2 * len(lengths) * each
        return places * 3 * heads.width * c + weights + index + kept
    size, short = 0, _SHORT_IN_HALF if numerics.is_half else _SHORT
    fused = sum(length * count for length, count in runs if length > short)
    if fused:
        size += tokens * (2 * heads.width + _values(heads)) * c + _sums(heads, fused)
        # cut out of one call's output, or put together of several
        size += fused * heads.width * c if len(runs) > 1 or not output_is_kept else 0
    elif any(count == 1 for _, count in runs):
        size += tokens * (heads.width + _values(heads)) * c
    for length, count in runs:
        if length <= short:
            size += _plain_run(heads, length, count, numerics)
    return size + kept


def _plain_run(heads: Heads, length: int, count: int, numerics: Numerics) -> int:
    """A run of short sequences; keys and values of a single one are no copies."""
    copies = 3 if count > 1 else 1
    inputs = length * count * copies * heads.width
    return (inputs + heads.count * length**2 * count) * numerics.product_bytes


def _values(heads: Heads) -> int:
    return max(heads.width, heads.holds_values)


def _sums(heads: Heads, tokens: int) -> int:
    """What each softmax was divided by."""
    return tokens * heads.count * WIDE
