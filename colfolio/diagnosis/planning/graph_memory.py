"""Bytes that a graph holds for backward, counted from a model's shape before anything is run.

Counted is what autograd saves of the backbones of `families.py`, as our models run them: the
input of each product whose weight trains, what norms, activations and attention need again, and in
half precision a copy of each weight. `GraphBudget` measures the same on a graph that was built.

Letters: N tokens, P patches, c bytes of a number in a product of matrices.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from colfolio.diagnosis.planning.attention_memory import Heads, attention_memory
from colfolio.diagnosis.planning.head_memory import HeadMemory, head_memory
from colfolio.diagnosis.planning.numerics import WIDE, Numerics
from colfolio.models.border import Border, frozen_border
from colfolio.models.generator import Generator
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.retriever import Retriever
from colfolio.models.towers import deepstack_blocks, exits

# Of the feed-forward's width and of the layer's, so many numbers are there at once beside what is
# saved; found by tracing the allocator.
_FORWARD_INNER, _FORWARD_WIDTH = 3.0, 3.0
_BACKWARD_INNER, _BACKWARD_WIDTH = 1.5, 2.0


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of one side that go through the model together.

    Args:
        lengths: tokens of each row.
        patches: of each image, and of each step of a clip; none for text.
        answers: tokens of answers in all rows, at which logits are made; of a generator.
    """

    lengths: Sequence[int]
    patches: Sequence[int] = ()
    answers: int = 0


@dataclass(frozen=True, slots=True)
class GraphMemory:
    """What rows take in a model, beside its weights and the rows themselves.

    Args:
        held: bytes of their graph from the end of forward to the beginning of backward.
        peak: bytes at the highest moment of forward and backward.
    """

    held: int
    peak: int


@dataclass(frozen=True, slots=True)
class _Layer:
    """Bytes of one layer.

    Args:
        saved: for backward.
        entry: its input, which is all that stays if it is computed again.
        copies: narrow copies of its weights.
        forward, backward: there at once while it runs, beside what it saves.
    """

    saved: int
    entry: int
    copies: int
    forward: int
    backward: int
    has_graph: bool
    is_recomputed: bool

    @property
    def held(self) -> int:
        """From forward to backward."""
        if not self.has_graph:
            return 0
        return self.entry if self.is_recomputed else self.saved + self.copies


def graph_memory(model: ProjectedBackbone, rows: Rows, numerics: Numerics) -> GraphMemory:
    """What some rows take; whatever is frozen and lies below the border holds nothing.

    Args:
        model: its weights may be on the meta device; which of them train, and which layers are
            computed again, is read from it.
    """
    border = frozen_border(model.backbone, is_visual=bool(rows.patches))
    layers = _layers(model, rows, border, numerics)
    ends = _text_ends(model, rows, numerics)
    if border is None or border.tower == "vision":
        ends += _vision_ends(model.backbone.visual, border, rows.patches, numerics)
    head = HeadMemory()
    if isinstance(model, Generator):
        head = head_memory(model, rows.answers, numerics)
    below = ends + sum(layer.held for layer in layers)
    held = below + head.held
    backward = _backward_peak(layers, below + head.carried)
    return GraphMemory(held, max(_forward_peak(layers, held), held + head.working, backward))


def first_above(backbone: Any, border: Border | None) -> tuple[int, int]:
    """The first block of the vision tower and the first text layer that have a graph."""
    if border is None:
        return 0, 0
    if border.tower == "vision":
        return border.layers, 0
    # with deepstack, frozen layers may run above the border, without a graph all the same
    frozen = frozen_border(backbone, is_visual=False)
    return len(backbone.visual.blocks), border.layers if frozen is None else frozen.layers


def attended_patches(visual: Any, block: int, patches: Sequence[int]) -> Sequence[int]:
    """Patches of each sequence over which a block attends: of images, or of their windows.

    How many windows lie at an image's edge depends on its sides; taken is one of what is left over.
    """
    whole = getattr(visual, "fullatt_block_indexes", None)
    if whole is None or block in whole:
        return patches
    size = (visual.window_size // visual.patch_size) ** 2
    windows = [[size] * (count // size) + [count % size] * bool(count % size) for count in patches]
    return [length for of_image in windows for length in of_image]


def vision_width(block: Any) -> int:
    """Of the states of patches."""
    return block.norm1.weight.numel()


def _layers(
    model: ProjectedBackbone, rows: Rows, border: Border | None, numerics: Numerics
) -> list[_Layer]:
    """Of both towers, in the order in which they run."""
    visual, text = model.backbone.visual, model.backbone.language_model
    first_block, first_layer = first_above(model.backbone, border)
    blocks = [
        _vision_block(
            block,
            attended_patches(visual, number, rows.patches),
            numerics,
            has_graph=number >= first_block,
        )
        for number, block in enumerate(visual.blocks if rows.patches else [])
    ]
    layers = [
        _text_layer(layer, rows.lengths, numerics, has_graph=number >= first_layer)
        for number, layer in enumerate(text.layers)
    ]
    if first_layer < len(layers) and (first_layer or _begins_there(model, border, rows)):
        width = _text_width(model)
        layers[first_layer] = _lowest(layers[first_layer], sum(rows.lengths), width)
    if 0 < first_block < len(blocks) and not isinstance(visual.blocks[0].norm1, nn.LayerNorm):
        width = vision_width(visual.blocks[0])
        blocks[first_block] = _lowest(blocks[first_block], sum(rows.patches), width)
    return blocks + layers


def _lowest(layer: _Layer, places: int, width: int) -> _Layer:
    """A layer below which nothing trains.

    An RMS norm needs its input, and one over its length, for the gradient of that input alone.
    """
    return replace(layer, saved=layer.saved - places * (width + 1) * WIDE)


def _begins_there(model: ProjectedBackbone, border: Border | None, rows: Rows) -> bool:
    """Whether nothing trains below the first text layer."""
    embedding = model.backbone.language_model.embed_tokens.weight
    is_still = not rows.patches or (border is not None and border.tower == "text")
    return is_still and not embedding.requires_grad


def _forward_peak(layers: Sequence[_Layer], held: int) -> int:
    """At the end all is held, and the narrow weights of layers to come again are still there."""
    copies = sum(layer.copies for layer in layers if layer.has_graph and layer.is_recomputed)
    passing = [layer.forward for layer in layers if layer.has_graph and layer.is_recomputed]
    below = [layer.forward for layer in layers if not layer.has_graph]
    return max(held + copies + max(passing, default=0), *below, 0)


def _backward_peak(layers: Sequence[_Layer], held: int) -> int:
    """Each layer lets go of what it held, the last first."""
    peak = held
    for layer in reversed([layer for layer in layers if layer.has_graph]):
        again = layer.saved + layer.copies if layer.is_recomputed else 0
        peak = max(peak, held + again + layer.backward)
        held -= layer.held
    return peak


def _text_layer(
    layer: Any, lengths: Sequence[int], numerics: Numerics, *, has_graph: bool
) -> _Layer:
    attention, mlp, config = layer.self_attn, layer.mlp, layer.self_attn.config
    width = config.num_attention_heads * attention.head_dim
    keys = config.num_key_value_heads * attention.head_dim
    hidden, inner = layer.hidden_size, mlp.gate_proj.out_features
    size = _norm(layer.input_layernorm, hidden)
    size += _inputs([attention.q_proj, attention.k_proj, attention.v_proj], hidden, numerics)
    if hasattr(attention, "q_norm"):
        size += _norm(attention.q_norm, width, numerics, config.num_attention_heads)
        size += _norm(attention.k_norm, keys, numerics, config.num_key_value_heads)
    size += _norm(layer.post_attention_layernorm, hidden)
    size += _gated(mlp, hidden, numerics)
    heads = Heads(config.num_attention_heads, width, keys, keys, is_causal=True)
    is_kept = bool(_inputs([attention.o_proj], width, numerics))
    own = attention_memory(heads, lengths, numerics, output_is_kept=is_kept)
    saved = sum(lengths) * size + own
    return _layer(layer, sum(lengths), (hidden, WIDE, inner), saved, numerics, has_graph)


def _vision_block(
    block: Any, lengths: Sequence[int], numerics: Numerics, *, has_graph: bool
) -> _Layer:
    width, c = vision_width(block), numerics.product_bytes
    size = sum(_vision_norm(norm, width, numerics) for norm in (block.norm1, block.norm2))
    size += _inputs([block.attn.qkv], width, numerics)
    if hasattr(block.mlp, "gate_proj"):
        inner = block.mlp.gate_proj.out_features
        size += _gated(block.mlp, width, numerics)
    else:
        first, last = _ends_of(block.mlp)
        inner = first.out_features
        size += _inputs([first], width, numerics) + _inputs([last], inner, numerics)
        # x * sigmoid(1.702 x) keeps both factors
        size += inner * c * (2 if block.attn.config.hidden_act == "quick_gelu" else 1)
    # values are a part of what comes out of `qkv`, which stays whole
    heads = Heads(block.attn.num_heads, width, width, 3 * width, is_causal=False)
    is_kept = bool(_inputs([block.attn.proj], width, numerics))
    own = attention_memory(heads, lengths, numerics, output_is_kept=is_kept)
    saved = sum(lengths) * size + own
    return _layer(block, sum(lengths), (width, c, inner), saved, numerics, has_graph)


def _layer(
    layer: nn.Module,
    places: int,
    widths: tuple[int, int, int],
    saved: int,
    numerics: Numerics,
    has_graph: bool,
) -> _Layer:
    """A layer over so many tokens or patches.

    Args:
        widths: of its input in numbers, bytes of each of those, and width of its feed-forward.
    """
    width, entry_bytes, inner = widths
    inner_bytes = inner * numerics.product_bytes
    largest = max(weight.numel() for weight in layer.parameters())
    # a gradient in half precision is made wide before it is added
    gradient = largest * (2 + WIDE if numerics.is_half else WIDE)
    return _Layer(
        saved=saved,
        entry=places * width * entry_bytes,
        copies=_copies(layer.modules(), numerics),
        forward=int(places * (_FORWARD_INNER * inner_bytes + _FORWARD_WIDTH * width * WIDE)),
        backward=int(places * (_BACKWARD_INNER * inner_bytes + _BACKWARD_WIDTH * width * WIDE))
        + gradient,
        has_graph=has_graph,
        is_recomputed=bool(getattr(layer, "gradient_checkpointing", False)),
    )


def _text_ends(model: ProjectedBackbone, rows: Rows, numerics: Numerics) -> int:
    """Cosines and sines, the last norm; of a retriever the projection and unit vectors as well."""
    text, tokens = model.backbone.language_model, sum(rows.lengths)
    width = _text_width(model)
    size = 2 * text.layers[0].self_attn.head_dim * WIDE
    size += _norm(text.norm, width)
    size += 1 if rows.patches else 0  # which tokens are visual
    if not isinstance(model, Retriever):
        return tokens * size
    projection = model.projection
    size += _inputs([projection], width, numerics)
    size += (model.dim + 2) * WIDE
    return tokens * size + _copies(projection.modules(), numerics)


def _text_width(model: ProjectedBackbone) -> int:
    return model.backbone.config.get_text_config().hidden_size


def _vision_ends(
    visual: Any, border: Border | None, lengths: Sequence[int], numerics: Numerics
) -> int:
    """Patch embedding, cosines and sines, and the merger of patches into tokens."""
    if not lengths:
        return 0
    patches, c, width = sum(lengths), numerics.product_bytes, vision_width(visual.blocks[0])
    norm, *_ = visual.merger.children()
    size = _vision_norm(norm, width, numerics)
    if border is None or border.layers < len(visual.blocks):
        size += 2 * (width // visual.blocks[0].attn.num_heads) * WIDE
    embedding = visual.patch_embed.proj.weight
    if border is None and numerics.is_half and embedding.requires_grad:
        size += embedding[0].numel() * c
    if border is None and hasattr(visual, "pos_embed") and visual.pos_embed.weight.requires_grad:
        size += 4 * (8 + WIDE)  # which four it is made of, and their shares
    tokens = patches // visual.config.spatial_merge_size**2
    merged = sum(_merger(merger, numerics) for merger in exits(visual))
    # those of deepstack read what the next block reads
    merged += 2 * WIDE * len(deepstack_blocks(visual))
    copies = sum(_copies(merger.modules(), numerics) for merger in exits(visual))
    return patches * size + tokens * merged + copies


def _merger(merger: nn.Module, numerics: Numerics) -> int:
    first, last = _ends_of(getattr(merger, "mlp", merger))
    size = _inputs([first], first.in_features, numerics)
    size += first.out_features * numerics.product_bytes  # into the activation
    return size + _inputs([last], last.in_features, numerics)


def _ends_of(mlp: nn.Module) -> list[Any]:
    """Its two linear layers, with the adapters that may be around them."""
    return [each for each in mlp.children() if hasattr(each, "out_features")]


def _gated(mlp: Any, width: int, numerics: Numerics) -> int:
    """Of a feed-forward whose activation is multiplied with a second product."""
    inner = mlp.gate_proj.out_features
    size = _inputs([mlp.gate_proj, mlp.up_proj], width, numerics)
    # into the activation, out of it, and what that is multiplied with
    size += 3 * inner * numerics.product_bytes
    return size + _inputs([mlp.down_proj], inner, numerics)


def _norm(norm: nn.Module, width: int, numerics: Numerics | None = None, count: int = 1) -> int:
    """Of an RMS norm: its input and one over its length, in float32, and that at unit length.

    Args:
        numerics: None if what comes in is float32 in any case.
        count: of the norms that share a width.
    """
    is_trained = any(weight.requires_grad for weight in norm.parameters())
    each = WIDE if numerics is None else numerics.product_bytes
    return width * WIDE + count * WIDE + (width * each if is_trained else 0)


def _vision_norm(norm: nn.Module, width: int, numerics: Numerics) -> int:
    if isinstance(norm, nn.LayerNorm):
        return _layer_norm(width, numerics)
    return _norm(norm, width, numerics)


def _layer_norm(width: int, numerics: Numerics) -> int:
    """Of a layer norm in the vision tower: its input, mean and scale."""
    is_narrow = numerics.is_half and not numerics.is_cuda
    return width * (2 if is_narrow else WIDE) + 2 * WIDE


def _inputs(modules: Sequence[nn.Module], width: int, numerics: Numerics) -> int:
    """What products with weights that train keep of one common input.

    In float32 all keep the same tensor; in half precision each has its own narrow copy. What lies
    inside an adapter and has another width is a tensor of its own.
    """
    inside = [linear for module in modules for linear in _linears(module.modules())]
    trained = [linear.in_features for linear in inside if linear.weight.requires_grad]
    common = trained.count(width)
    kept = common if numerics.is_half else min(common, 1)
    others = sum(each for each in trained if each != width)
    return (kept * width + others) * numerics.product_bytes


def _copies(modules: Iterable[nn.Module], numerics: Numerics) -> int:
    """Narrow copies of the weights of products."""
    if not numerics.copies_weights:
        return 0
    return sum(linear.weight.numel() for linear in _linears(modules)) * numerics.product_bytes


def _linears(modules: Iterable[nn.Module]) -> list[nn.Linear]:
    return [module for module in modules if isinstance(module, nn.Linear)]
