"""What the layers below the border make of a chunk: run once a step, or once for all epochs."""

from __future__ import annotations

import json
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from colfolio.batch import Packed
from colfolio.distributed import World
from colfolio.errors import RecipeError
from colfolio.models.border import Border, BorderOutput, frozen_border, frozen_parts
from colfolio.models.precision import Precision
from colfolio.models.projected import ProjectedBackbone
from colfolio.training.dropout import RowDropout
from colfolio.training.feature_cache import FeatureCache, row_key
from colfolio.training.frozen_part import FrozenPart, FrozenWeights

# Of a configuration: how and from where a model was loaded.
_SAYS_NOTHING = {
    *("architectures", "_name_or_path", "transformers_version", "dtype", "torch_dtype"),
    "_attn_implementation",
}


class FrozenStates:
    """Runs the frozen layers, and keeps what they make of documents if there is a cache.

    Args:
        model: whose parameters say what is frozen, anew at each step.
        precision: in which the caller has it compute, settled.
        kernel: of its attention, settled likewise.
        cache: for the output, across epochs.
        world: of ranks that have to run the same units of a sharded model; else a world of one.
    """

    def __init__(
        self,
        model: ProjectedBackbone,
        precision: Precision,
        kernel: str,
        cache: FeatureCache | None,
        world: World,
    ) -> None:
        self._model = model
        self._precision = precision
        self._kernel = kernel
        self.cache = cache
        self._world = world
        self._borders: dict[bool, Border | None] = {}
        self._modules: list[nn.Module] = []
        self._weights = FrozenWeights([])
        self._part: str | None = None  # what was kept before is not known yet

    def begin(self) -> None:
        """Look anew at what is frozen; what another state of the weights made is forgotten.

        Raises:
            RecipeError: there is a cache, and the frozen layers drop at random.
        """
        backbone = self._model.backbone
        self._borders = {
            is_visual: frozen_border(backbone, is_visual=is_visual) for is_visual in (True, False)
        }
        border = self._borders[True]
        if self.cache is None:
            return
        part = self._fingerprint(border) if border else ""
        if part != self._part:
            self.cache.keep_only([part] if part else [])
            self._part = part

    def of(self, rows: Packed, digests: tuple[bytes, ...] | None) -> BorderOutput | None:
        """What comes out at the border; None if nothing is frozen.

        Args:
            rows: anywhere; those that run are moved to the model's device.
            digests: of each row, under which its states are kept if it is visual; None: they are
                not.
        """
        border = self._borders[len(rows.grid_thw) > 0]
        if border is None:
            return None
        if self.cache is None or digests is None or not len(rows.grid_thw):
            return self._model.run_below(rows.to(self._model.device), border)
        return BorderOutput(border, self._from_cache(self.cache, rows, digests, border))

    def _from_cache(
        self, cache: FeatureCache, rows: Packed, digests: Sequence[bytes], border: Border
    ) -> Tensor:
        part = self._part
        assert part is not None, "begin comes first"
        states = [cache.get(part, digest) for digest in digests]
        missing = [row for row, found in enumerate(states) if found is None]
        if not self._world.agree(not missing):
            # a rank that has all its rows runs one with the others
            run = missing or [0]
            made = self._run(rows.select(run), border)
            for row, fresh in zip(missing, made, strict=False):
                states[row] = fresh
                cache.put(part, digests[row], fresh)
        device = self._model.device
        return torch.cat([state.to(device) for state in states if state is not None])

    def _run(self, rows: Packed, border: Border) -> tuple[Tensor, ...]:
        """States at the border, row by row."""
        lengths = border.lengths(rows, self._model.collator.budget.merge)
        made = self._model.run_below(rows.to(self._model.device), border)
        return made.states.split(lengths.tolist())

    def _fingerprint(self, border: Border) -> str:
        """Of all that decides what comes out at a border."""
        model, device = self._model, self._model.device
        modules = frozen_parts(model.backbone, border)
        if list(map(id, modules)) != list(map(id, self._modules)):
            _refuse_dropout(modules)
            self._modules, self._weights = modules, FrozenWeights(modules)
        is_cuda = device.type == "cuda"
        part = FrozenPart(
            # ranks of a sharded model hold a part each; ranks of a host may share a folder
            weights="".join(self._world.gather_objects(self._weights.fingerprint())),
            border=f"{border.tower} {border.layers}",
            config=_config(model),
            precision=self._precision,
            attention=self._kernel or str(model.backbone.config._attn_implementation),
            device=torch.cuda.get_device_name(device) if is_cuda else device.type,
        )
        return part.fingerprint()


def _config(model: ProjectedBackbone) -> str:
    """What the configuration and the contract decide, whatever folder they were read from."""
    config = model.backbone.config
    parts = [config.vision_config.to_dict(), config.text_config.to_dict()]
    kept = [{key: part[key] for key in sorted(part) if key not in _SAYS_NOTHING} for part in parts]
    return json.dumps(kept, default=str) + model.contract.model_dump_json()


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
