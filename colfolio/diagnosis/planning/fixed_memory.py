"""Bytes of a rank that are taken whatever the chunk: weights, their gradient and state, a batch.

Letters: Q query vectors of a rank, D document vectors of all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from colfolio.diagnosis.planning.numerics import WIDE, Numerics
from colfolio.diagnosis.planning.row_sizes import BatchSize, TextSize
from colfolio.models.generator import Generator
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.retriever import Retriever
from colfolio.training import TrainSettings

# Python and its libraries, on a GPU the context of CUDA and its libraries; as measured.
_PROCESS_CPU, _PROCESS_CUDA = 600 * 2**20, 700 * 2**20
_BLOCK = 256  # numbers of an 8-bit state that share a scale
_SMALLEST = 4096  # tensors with fewer numbers keep their state in float32
# For each pair of a query vector and a document: who won, its score and weight, and the sort that
# the gradient of documents takes.
_PAIR_CPU, _PAIR_CUDA = 40, 8
_SORTED_AT_ONCE = 100 * 2**20  # the sort on a GPU, in pieces
_SCORE_COPIES = 8  # of the score matrix: scores, gathered, masked, softmax, gradients
_VECTOR_COPIES = 3  # of a rank's vectors: of the chunks, of the loss, the gradient
_GATHERED_COPIES = 4  # of all ranks' document vectors: received, packed, and their gradient twice


@dataclass(frozen=True, slots=True)
class Part:
    """A named piece of memory or disk."""

    name: str
    num_bytes: int


def fixed_parts(
    retriever: Retriever,
    settings: TrainSettings,
    batch: BatchSize,
    numerics: Numerics,
    ranks: int,
) -> list[Part]:
    """What a rank holds beside graphs."""
    queries, documents = rows_of_rank(batch, ranks)
    inputs = _inputs(
        retriever,
        settings,
        documents * batch.heavy_document.patches,
        queries * batch.heavy_query.tokens + documents * batch.heavy_document.tokens,
        numerics,
    )
    compared = [
        Part("vectors of all ranks, gradient", _vectors(retriever.dim, batch, ranks)),
        Part("scores and MaxSim winners", _scores(batch, numerics, ranks)),
    ]
    return _around(retriever, settings, numerics, ranks, [inputs, *compared])


def fixed_text_parts(
    generator: Generator, settings: TrainSettings, batch: TextSize, numerics: Numerics, ranks: int
) -> list[Part]:
    """Of a run on conversations; logits are a part of graphs."""
    rows, row = -(-batch.rows // ranks), batch.heavy
    inputs = _inputs(generator, settings, rows * row.patches, rows * row.tokens, numerics)
    return _around(generator, settings, numerics, ranks, [inputs])


def _around(
    model: ProjectedBackbone,
    settings: TrainSettings,
    numerics: Numerics,
    ranks: int,
    inside: list[Part],
) -> list[Part]:
    """Parts of a batch, and what every model takes."""
    shares = ranks if numerics.is_gathered else 1
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    weights = sum(weight.numel() for weight in model.parameters()) * WIDE
    gradients = sum(weight.numel() for weight in trained) * WIDE
    state = state_bytes(model, settings, shares)
    parts = [
        Part("weights, float32", weights // shares),
        Part("gradients, float32", gradients // shares),
        Part(f"optimiser state, {settings.optimiser.state}", state),
        *inside,
        Part("process and libraries", _PROCESS_CUDA if numerics.is_cuda else _PROCESS_CPU),
    ]
    if numerics.is_gathered:
        parts.append(Part("layers gathered from ranks", _gathered(model, numerics)))
    if settings.features.ram_mb and not numerics.is_cuda:
        parts.append(Part("feature cache", int(settings.features.ram_mb * 2**20)))
    return parts


def state_bytes(
    model: ProjectedBackbone,
    settings: TrainSettings,
    shares: int = 1,
    weights: Iterable[Tensor] | None = None,
) -> int:
    """What the optimiser keeps for the weights that train.

    Args:
        shares: ranks over which each weight is spread.
        weights: those that are counted; None counts all of the model.
    """
    kind = settings.optimiser.state
    in_32_bits: set[int] = set()
    if kind == "bitsandbytes_8bit":
        in_32_bits = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    return sum(
        _state(-(-weight.numel() // shares), kind, is_wide=id(weight) in in_32_bits)
        for weight in (model.parameters() if weights is None else weights)
        if weight.requires_grad
    )


def embedding_gradient(model: ProjectedBackbone) -> int:
    """Bytes of the gradient of an embedding, which each backward makes whole before it is added."""
    weight = model.backbone.language_model.embed_tokens.weight
    return weight.numel() * WIDE if weight.requires_grad else 0


def _state(numbers: int, kind: str, *, is_wide: bool) -> int:
    """A running mean and a running square."""
    fits = numbers >= _SMALLEST and (kind == "bitsandbytes_8bit" or numbers % _BLOCK == 0)
    if kind == "fp32" or is_wide or not fits:
        return 2 * numbers * WIDE
    return 2 * (numbers + -(-numbers // _BLOCK) * WIDE)


def _inputs(
    model: ProjectedBackbone, settings: TrainSettings, patches: int, tokens: int, numerics: Numerics
) -> Part:
    """Patches in float32, and int64 for id and position of each token."""
    one = patches * model.contract.pixel_budget.patch_dim * WIDE + tokens * 4 * 8
    # of a batch on a GPU the one before goes when the next has come
    times = min(settings.accumulation, 2) if numerics.is_cuda else settings.accumulation + 1
    return Part("inputs: patches and tokens", one * times)


def rows_of_rank(batch: BatchSize, ranks: int) -> tuple[int, int]:
    """Queries and documents of the rank that has the most."""
    return -(-batch.queries // ranks), -(-batch.documents // ranks)


def _vectors(dim: int, batch: BatchSize, ranks: int) -> int:
    queries, documents = rows_of_rank(batch, ranks)
    own = queries * batch.heavy_query.tokens + documents * batch.heavy_document.tokens
    everyone = batch.documents * batch.heavy_document.tokens if ranks > 1 else 0
    return (own * _VECTOR_COPIES + everyone * _GATHERED_COPIES) * dim * WIDE


def _scores(batch: BatchSize, numerics: Numerics, ranks: int) -> int:
    queries, _ = rows_of_rank(batch, ranks)
    pairs = queries * batch.heavy_query.tokens * batch.documents
    matrix = batch.queries * batch.documents * WIDE * _SCORE_COPIES
    if numerics.is_cuda:
        return pairs * _PAIR_CUDA + matrix + _SORTED_AT_ONCE
    return pairs * _PAIR_CPU + matrix


def _gathered(model: ProjectedBackbone, numerics: Numerics) -> int:
    """Two units whole, one at work and the next; or a unit and its gradient on the way."""
    sizes = [sum(weight.numel() for weight in unit.parameters()) for unit in model.units()]
    embedding = model.backbone.language_model.embed_tokens.weight.numel()
    # the embedding stays wide; its gradient is there whole, and once more in the ranks' order
    return max(2 * max(sizes) * numerics.product_bytes, embedding * WIDE * 3)
