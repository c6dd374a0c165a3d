"""The sides of `step.py`: each adds the gradient of the same batch to the same weights.

- Colfolio: `ExactBatch` on the packed batch; with a frozen vision tower also from the second epoch
  on, when its feature cache holds what the tower made of each page.
- sentence-transformers: its `CachedMultiVectorMultipleNegativesRankingLoss` over its own modules:
  `Transformer` around `Qwen2VLModel`, which makes M-RoPE positions from the grids, `Dense`,
  `MultiVectorMask` and `Normalize`. Only the loading of `Transformer` is replaced: it would load a
  processor, which needs torchvision; the batch is what that processor would hand over. The model
  of its ColQwen2 example, `ColQwen2ForRetrieval`, gives images positions of one dimension, so it
  computes another gradient.
- transformers: one forward for queries and one for documents, padded; MaxSim by `einsum` with
  masks; one graph for all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from step_batch import Rows, build_model, packed_batch, padded_batch
from torch import Tensor, nn
from transformers import Qwen2VLModel

from colfolio.models import Retriever
from colfolio.models.checkpoint import cast_parameters
from colfolio.models.precision import Precision, autocast
from colfolio.training.exact_batch import ExactBatch, MemorySettings
from colfolio.training.feature_cache import FeatureCache, FeatureCacheSettings
from colfolio.training.losses import LossSettings, ScoreSummary, info_nce

CPU = torch.device("cpu")
# Of Colfolio: a chunk that is still in the processor's cache is faster than the whole batch in one
# graph; with the vision tower frozen a token has less of it. Of 256 to 2048 and all.
FAST = {False: MemorySettings(chunk_tokens=1024), True: MemorySettings(chunk_tokens=2048)}
# Room for the graphs of two chunks or three: with the vision tower open, all others run twice.
SMALL = MemorySettings(chunk_tokens=300, activation_mb=256.0)
CACHE_MB = 256.0  # more than the features of the batch, which are 1 KiB a visual token


@dataclass(frozen=True, slots=True)
class Case:
    """A batch, and how a step is taken on it.

    Args:
        dtype: of weights and patches; in float64 the sides must agree to rounding.
    """

    is_ragged: bool
    is_frozen: bool
    precision: Precision
    num_rows: int
    dtype: torch.dtype = torch.float32

    @property
    def names(self) -> tuple[str, str, str]:
        """Pages, precision and vision tower in words."""
        pages = "ragged" if self.is_ragged else "uniform"
        return pages, self.precision, "frozen" if self.is_frozen else "open"


@dataclass(frozen=True, slots=True)
class PeerSettings:
    """What is tuned for a peer.

    Args:
        attention: of `transformers`.
        mini_batch_size: rows that sentence-transformers runs together.
        mini_batch_num_tokens: tokens that it runs together, instead.
    """

    attention: str = "sdpa"
    mini_batch_size: int = 4
    mini_batch_num_tokens: int | None = None


@dataclass(frozen=True, slots=True)
class Side:
    """One way to take a step.

    Args:
        model: holds the parameters, named as a `Retriever` names them.
        backward: adds the batch's gradient to them; returns the loss.
    """

    model: nn.Module
    backward: Callable[[], Tensor]


def ours(case: Case, rows: Rows, memory: MemorySettings, cache: FeatureCache | None = None) -> Side:
    """Colfolio, with these chunks and this budget, and a cache for what frozen layers make."""
    model = _prepared(build_model(), case)
    batch = packed_batch(model, rows)
    exact = ExactBatch(model, memory, case.precision, cache=cache)

    def loss(scores: Tensor) -> ScoreSummary:
        return info_nce(scores, batch.positives, batch.ignored, LossSettings())

    def backward() -> Tensor:
        return exact.backward(batch, loss, seed=0).loss.detach()

    return Side(model, backward)


def sentence_transformers(case: Case, rows: Rows, settings: PeerSettings) -> Side:
    """sentence-transformers, its mini batches in the order of the rows."""
    from sentence_transformers import MultiVectorEncoder  # noqa: PLC0415
    from sentence_transformers.base.modules import Dense, Normalize, Transformer  # noqa: PLC0415
    from sentence_transformers.multi_vector_encoder.losses import (  # noqa: PLC0415
        CachedMultiVectorMultipleNegativesRankingLoss as CachedLoss,
    )
    from sentence_transformers.multi_vector_encoder.modules import MultiVectorMask  # noqa: PLC0415

    source = build_model()
    model = _prepared(_unpatched(source, settings.attention), case)
    dense = Dense(
        *(source.projection.in_features, source.projection.out_features),
        activation_function=nn.Identity(),
        module_input_name="token_embeddings",
    )
    dense.linear = model["projection"]
    modules = [_loaded(Transformer, model["backbone"]), dense]
    modules += [MultiVectorMask(), Normalize(module_input_name="token_embeddings")]
    encoder = MultiVectorEncoder(modules=modules, device="cpu").train()
    if case.precision == "bf16":
        encoder.forward = _as_its_trainer_casts(encoder.forward)
    loss = CachedLoss(
        encoder,
        mini_batch_size=settings.mini_batch_size,
        mini_batch_num_tokens=settings.mini_batch_num_tokens,
        score_mini_batch_size=case.num_rows,
    )
    sides = [side | {"modality": "message"} for side in padded_batch(source, rows)]
    sides[1]["num_images_per_sample"] = torch.ones(case.num_rows, dtype=torch.long)
    sides[1]["pixel_values"] = sides[1]["pixel_values"].to(case.dtype)

    def backward() -> Tensor:
        value = loss([dict(side) for side in sides])
        value.backward()
        return value.detach()

    return Side(model, backward)


def plain(case: Case, rows: Rows, settings: PeerSettings) -> Side:
    """`transformers` alone, everything padded and in one graph."""
    source = build_model()
    model = _prepared(_unpatched(source, settings.attention), case)
    queries, documents = padded_batch(source, rows)
    documents["pixel_values"] = documents["pixel_values"].to(case.dtype)

    def vectors(inputs: dict[str, Tensor]) -> Tensor:
        with autocast(case.precision, CPU):
            hidden = model["backbone"](**inputs, use_cache=False).last_hidden_state
            projected = model["projection"](hidden)
        return F.normalize(projected.to(case.dtype), dim=-1)  # [rows, longest, dim]

    def backward() -> Tensor:
        similarity = torch.einsum("ash,bth->abst", vectors(queries), vectors(documents))
        hidden = documents["attention_mask"][None, :, None] == 0
        best = similarity.masked_fill(hidden, float("-inf")).amax(dim=3)
        scores = (best * queries["attention_mask"].unsqueeze(1)).sum(dim=2)
        loss = F.cross_entropy(scores, torch.arange(len(scores)))
        loss.backward()
        return loss.detach()

    return Side(model, backward)


def _prepared(model: Any, case: Case) -> Any:
    cast_parameters(model, case.dtype)
    for name, parameter in model.named_parameters():
        if case.is_frozen and name.startswith("backbone.visual."):
            parameter.requires_grad_(False)
    return model


def _unpatched(source: Retriever, attention: str) -> nn.ModuleDict:
    """The weights of a retriever in the classes that `transformers` has for them."""
    config = copy.deepcopy(source.backbone.config)
    for part in (config, config.text_config, config.vision_config):
        part._attn_implementation = attention
    backbone = Qwen2VLModel(config)
    backbone.load_state_dict(source.backbone.state_dict(), strict=True)
    return nn.ModuleDict({"backbone": backbone, "projection": source.projection}).train()


def _loaded(kind: type, backbone: Any) -> Any:
    """A `Transformer` of sentence-transformers as its own loading would leave it for training."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    module.model, module.processor, module.transformer_task = backbone, None, "feature-extraction"
    call = {"method": "forward", "method_output_name": "last_hidden_state"}
    module.modality_config, module.module_output_name = {"message": call}, "token_embeddings"
    module.model_forward_params, module._declared_forward_params = None, set()
    module._query_expansion, module._unpad_inputs = None, False
    return module


def _as_its_trainer_casts(forward: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """What `Accelerator.prepare_model` makes of a forward: bf16 within, float32 behind it."""
    from accelerate.utils import convert_outputs_to_fp32  # noqa: PLC0415

    return convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(forward))


Build = Callable[[Case, Rows, PeerSettings], Side]


def _later_epoch(case: Case, rows: Rows, _: PeerSettings) -> Side:
    """The first epoch has been, so the cache holds all pages."""
    cache = FeatureCache(FeatureCacheSettings(ram_mb=CACHE_MB), folder=None)
    side = ours(case, rows, FAST[case.is_frozen], cache)
    side.backward()
    side.model.zero_grad()
    assert cache.entries == case.num_rows, f"{cache.entries} pages of {case.num_rows} are cached"
    return side


def _sorted(case: Case, rows: Rows, settings: PeerSettings) -> Side:
    return sentence_transformers(case, rows.sorted_by_page(), settings)


OURS, PEER, PLAIN = "Colfolio", "sentence-transformers", "transformers"
_SORTED, _LATER = f"{PEER}, rows sorted", f"{OURS}, from the second epoch on"
_SIDES: dict[str, Build] = {
    OURS: lambda case, rows, _: ours(case, rows, FAST[case.is_frozen]),
    f"{OURS}, graphs of 256 MiB": lambda case, rows, _: ours(case, rows, SMALL),
    _LATER: _later_epoch,
    PEER: sentence_transformers,
    _SORTED: _sorted,
    PLAIN: plain,
}


def sides_of(case: Case) -> dict[str, Build]:
    """The sides of a case by name: equal pages are in order anyway, an open tower is not cached."""
    needs = {_SORTED: case.is_ragged, _LATER: case.is_frozen}
    return {name: build for name, build in _SIDES.items() if needs.get(name, True)}
