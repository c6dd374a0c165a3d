"""Dropout whose draws belong to a row, so that no chunk, rank or packing changes them.

A generator would hand out its numbers in the order in which they are asked for. Here a feature of a
token is dropped by a function of seed, row, position in the row, module, call and feature alone.
The function is a product of two odd numbers modulo 2^32, one hashed from the token and the module,
one from the feature: products of uniform odd numbers are uniform and independent in pairs, and cost
one operation an element.

Letters: N tokens, P patches, F features of the last dimension.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int32, Int64
from torch import Tensor, nn

from colfolio.batch import Packed, offsets_of
from colfolio.errors import ColfolioError

_VISION = "visual"
_OTHER_KINDS = (
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio: spreads whole numbers evenly


@dataclass(frozen=True, slots=True)
class DropoutKeys:
    """A uniform number for each token and for each patch of packed rows."""

    tokens: Int64[Tensor, " N"]
    patches: Int64[Tensor, " P"]

    def to(self, device: torch.device) -> DropoutKeys:
        """The same keys on a device."""
        return DropoutKeys(self.tokens.to(device), self.patches.to(device))


def dropout_keys(
    packed: Packed, row_ids: Int64[Tensor, " rows"], seed: int, side: str
) -> DropoutKeys:
    """The keys of packed rows, on their device.

    Args:
        row_ids: a number for each row of a side, the same in whatever chunk or rank it is.
        seed: another for each step.
        side: of the batch, `queries` or `documents`.
    """
    patches = offsets_of(packed.grid_thw.prod(dim=1))[packed.grid_offsets]
    device = packed.token_ids.device
    return DropoutKeys(
        row_keys(row_ids, packed.offsets, seed, side).to(device),
        row_keys(row_ids, patches, seed, side).to(device),
    )


def row_keys(
    row_ids: Int64[Tensor, " rows"], offsets: Int64[Tensor, " rows+1"], seed: int, side: str
) -> Int64[Tensor, " tokens"]:
    """A uniform number for each place of each row: a hash of seed, side, row and place in it."""
    lengths = offsets.diff()
    rows = _mixed(_mixed(row_ids.cpu() * _signed(_GOLDEN) + _of_text(f"{side} of seed {seed}")))
    starts, rows = (each.repeat_interleave(lengths) for each in (offsets[:-1], rows))
    places = torch.arange(len(starts)) - starts
    return _mixed(_mixed(places * _signed(_GOLDEN) ^ rows) + rows)


class RowDropouts:
    """The dropout modules of a model, put in the place of its `nn.Dropout` of more than 0.

    Modules whose path has a part `visual` draw by patch, all others by token.

    Args:
        model: changed in place; `restore` gives its own modules back. Modules that an earlier
            `RowDropouts` put there are taken over.

    Raises:
        ColfolioError: the model drops in a way that cannot be drawn by row.
    """

    def __init__(self, model: nn.Module) -> None:
        self._draw: _Draw | None = None
        self._replaced: list[tuple[nn.Module, str, nn.Dropout]] = []
        for path, module in list(model.named_modules()):
            _check_kind(path, module)
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Dropout | RowDropout) and child.p > 0:
                    own = child if isinstance(child, nn.Dropout) else nn.Dropout(child.p)
                    self._replaced.append((module, name, own))
                    dropout = RowDropout(self, f"{path}.{name}".lstrip("."), child.p)
                    module.add_module(name, dropout.train(child.training))

    def __len__(self) -> int:
        return len(self._replaced)

    def restore(self) -> None:
        """Put the model's own modules back."""
        for parent, name, child in self._replaced:
            parent.add_module(name, child.train(parent.training))
        self._replaced.clear()

    @contextmanager
    def of(self, keys: DropoutKeys) -> Iterator[None]:
        """A context in which the model runs on the rows of these keys, once."""
        with self._drawing(_Draw(keys)):
            yield

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For a checkpointed layer: to run it in, and to run it in again with the same draws.

        Backward may come after other rows have been run, so a layer takes its keys along.
        """
        if self._draw is None:
            return nullcontext(), nullcontext()
        return nullcontext(), _Again(self, self._draw.copy())

    def next_draw(self, path: str) -> tuple[DropoutKeys, int]:
        """The keys of the rows that run now, and how many calls of this module went before."""
        if self._draw is None:
            raise RuntimeError(
                f"{path}: no rows to draw dropout for; run the model inside `of(keys)`, and give "
                "`contexts` to its gradient checkpointing"
            )
        call = self._draw.calls.get(path, 0)
        self._draw.calls[path] = call + 1
        return self._draw.keys, call

    @contextmanager
    def _drawing(self, draw: _Draw) -> Iterator[None]:
        before, self._draw = self._draw, draw
        try:
            yield
        finally:
            self._draw = before


class RowDropout(nn.Module):
    """Dropout of one place in a model; `path` names it."""

    def __init__(self, draws: RowDropouts, path: str, p: float) -> None:
        super().__init__()
        self._draws = draws
        self.path = path
        self.p = p

    def forward(self, hidden: Float[Tensor, "*rows F"]) -> Float[Tensor, "*rows F"]:
        """Each feature 0 with probability p, else over 1 - p; in evaluation as it came."""
        if not self.training:
            return hidden
        keys, call = self._draws.next_draw(self.path)
        num_rows, num_features = hidden.shape[:-1].numel(), hidden.shape[-1]
        of_rows = self._of_rows(keys, num_rows)
        multiplier = _of_text(f"call {call} of {self.path}") | 1
        rows = _odd(of_rows * multiplier).unsqueeze(1)  # [rows, 1]
        features = _of_features(num_features, hidden.device)  # [F]
        dropped = rows * features < round(self.p * 2**32) - 2**31  # [rows, F]
        return hidden.masked_fill(dropped.view(hidden.shape), 0.0) / (1 - self.p)

    def extra_repr(self) -> str:
        """As `nn.Dropout` prints itself."""
        return f"p={self.p}"

    def _of_rows(self, keys: DropoutKeys, num_rows: int) -> Int64[Tensor, " rows"]:
        """The keys of what this module is given: tokens, patches, or merged groups of patches."""
        if _VISION not in self.path.split("."):
            found = keys.tokens
        elif num_rows and len(keys.patches) % num_rows == 0:
            found = keys.patches[:: len(keys.patches) // num_rows]
        else:
            found = keys.patches
        if len(found) != num_rows:
            raise ValueError(
                f"{self.path}: received {num_rows} rows of features, but the rows that run have "
                f"{len(keys.tokens)} tokens and {len(keys.patches)} patches"
            )
        return found


@dataclass(slots=True)
class _Draw:
    """What a run of the model draws from, and how often each module has drawn in it."""

    keys: DropoutKeys
    calls: dict[str, int] = field(default_factory=dict)

    def copy(self) -> _Draw:
        return replace(self, calls=dict(self.calls))


class _Again(AbstractContextManager[None]):
    """Draws as they were when a layer began; entered as often as it is computed again."""

    def __init__(self, draws: RowDropouts, draw: _Draw) -> None:
        self._draws, self._draw = draws, draw

    def __enter__(self) -> None:
        self._inner = self._draws._drawing(self._draw.copy())
        self._inner.__enter__()

    def __exit__(self, *error: object) -> None:
        self._inner.__exit__(None, None, None)


def _check_kind(path: str, module: nn.Module) -> None:
    probability = getattr(module, "attention_dropout", 0.0)
    if isinstance(module, _OTHER_KINDS) and module.p > 0:
        raise ColfolioError(
            f"{path}: {type(module).__name__} drops whole channels or shifts them, which is not "
            "drawn by row; use nn.Dropout"
        )
    if isinstance(module, nn.Dropout) and module.p == 1:
        raise ColfolioError(
            f"{path}: a dropout of 1 leaves nothing to train on; it must be below 1"
        )
    if isinstance(probability, float) and probability > 0:
        raise ColfolioError(
            f"{path}: attention_dropout is {probability}, and which attention weights it drops "
            "would depend on the batch that a row is in; set it to 0 in the configuration"
        )


@functools.lru_cache(maxsize=4096)
def _of_text(text: str) -> int:
    """A number of 64 bits, the same in every process."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


@functools.lru_cache(maxsize=64)
def _of_features(num_features: int, device: torch.device) -> Int32[Tensor, " F"]:
    return _odd(_mixed(torch.arange(1, num_features + 1) * _signed(_GOLDEN))).to(device)


def _odd(keys: Int64[Tensor, " n"]) -> Int32[Tensor, " n"]:
    """The upper 31 bits of each, with a 1 behind them."""
    return (((keys >> 33) << 1) | 1).to(torch.int32)


def _mixed(keys: Int64[Tensor, " n"]) -> Int64[Tensor, " n"]:
    """Each bit of the result depends on all of the key (the finaliser of splitmix64)."""
    keys = (keys ^ _shifted(keys, 30)) * _signed(0xBF58476D1CE4E5B9)
    keys = (keys ^ _shifted(keys, 27)) * _signed(0x94D049BB133111EB)
    return keys ^ _shifted(keys, 31)


def _shifted(keys: Tensor, bits: int) -> Tensor:
    """Shifted right with zeros from the left; `>>` alone repeats the sign."""
    return (keys >> bits) & ((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    return number - (1 << 64) if number >> 63 else number
