"""What the layers below the border make of a chunk: run once a step, or once for all epochs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from colfolio.batch import Packed
from colfolio.distributed import World
from colfolio.errors import RecipeError
from colfolio.models.border import Border, BorderOutput, frozen_border, frozen_parts
from colfolio.models.precision import Precision
from colfolio.models.retriever import Retriever
from colfolio.training.dropout import RowDropout
from colfolio.training.feature_cache import FeatureCache, row_key
from colfolio.training.frozen_part import FrozenPart, FrozenWeights


class FrozenStates:
    """Runs the frozen layers, and keeps what they make of documents if there is a cache.

    Args:
        retriever: whose parameters say what is frozen, anew at each step.
        precision: in which the caller has it compute, settled.
        cache: for the output, across epochs.
        world: of ranks that have to run the same units of a sharded model; else a world of one.

    Raises:
        RecipeError: there is a cache, and the frozen layers drop at random.
    """

    def __init__(
        self,
        retriever: Retriever,
        precision: Precision,
        cache: FeatureCache | None,
        world: World,
    ) -> None:
        self._retriever = retriever
        self._precision = precision
        self._cache = cache
        self._world = world
        self._borders: dict[bool, Border | None] = {}
        self._weights: tuple[Border, FrozenWeights] | None = None
        self._part = ""

    def begin(self) -> None:
        """Look anew at what is frozen; what another state of the weights made is forgotten."""
        backbone = self._retriever.backbone
        self._borders = {
            is_visual: frozen_border(backbone, is_visual=is_visual) for is_visual in (True, False)
        }
        border = self._borders[True]
        if self._cache is None:
            return
        part = self._fingerprint(border) if border else ""
        if part != self._part:
            self._cache.keep_only([part] if part else [])
            self._part = part

    def of(self, rows: Packed, digests: tuple[bytes, ...] | None) -> BorderOutput | None:
        """What comes out at the border; None if nothing is frozen.

        Args:
            rows: anywhere; those that run are moved to the model's device.
            digests: of each row, under which its states are kept; None: they are not.
        """
        border = self._borders[len(rows.grid_thw) > 0]
        if border is None:
            return None
        if self._cache is None or digests is None:
            return self._retriever.run_below(rows.to(self._retriever.device), border)
        return BorderOutput(border, self._from_cache(self._cache, rows, digests, border))

    def _from_cache(
        self, cache: FeatureCache, rows: Packed, digests: Sequence[bytes], border: Border
    ) -> Tensor:
        states = [cache.get(self._part, digest) for digest in digests]
        missing = [row for row, found in enumerate(states) if found is None]
        if not self._world.agree(not missing):
            # a rank that has all its rows runs one with the others
            run = missing or [0]
            made = self._run(rows.select(run), border)
            for row, fresh in zip(missing, made, strict=False):
                states[row] = fresh
                cache.put(self._part, digests[row], fresh)
        device = self._retriever.device
        return torch.cat([state.to(device) for state in states if state is not None])

    def _run(self, rows: Packed, border: Border) -> tuple[Tensor, ...]:
        """States at the border, row by row."""
        lengths = border.lengths(rows, self._retriever.contract.pixel_budget.merge)
        made = self._retriever.run_below(rows.to(self._retriever.device), border)
        return made.states.split(lengths.tolist())

    def _fingerprint(self, border: Border) -> str:
        retriever = self._retriever
        parts = frozen_parts(retriever.backbone, border)
        if self._weights is None or self._weights[0] != border:
            _refuse_dropout(parts)
            self._weights = (border, FrozenWeights(parts))
        weights = self._world.gather_objects(self._weights[1].fingerprint())
        part = FrozenPart(
            weights="".join(weights),
            border=f"{border.tower} {border.layers}",
            config=retriever.backbone.config.to_json_string()
            + retriever.contract.model_dump_json(),
            precision=self._precision,
            attention=str(retriever.backbone.config._attn_implementation),
            device=str(retriever.device),
        )
        return part.fingerprint()


def row_digests(rows: Packed) -> tuple[bytes, ...]:
    """A digest of each row's own tensors, for rows whose documents were not hashed."""
    each = [rows.rows(row, row + 1) for row in range(len(rows))]
    return tuple(row_key(r.token_ids, r.position_ids, r.grid_thw, r.patches) for r in each)


def _refuse_dropout(parts: Sequence[nn.Module]) -> None:
    for part in parts:
        for path, module in part.named_modules():
            if isinstance(module, RowDropout | nn.Dropout) and module.p > 0:
                raise RecipeError(
                    f"the feature cache keeps what frozen layers make, but {path} in them drops at "
                    f"random (p={module.p}): what is kept would be drawn once for all epochs; set "
                    "its dropout to 0, or the cache's budgets to 0"
                )
