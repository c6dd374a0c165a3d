"""Low-rank adapters (LoRA, arXiv:2106.09685) in the linear layers of a model, by peft.

Layers are named as in a checkpoint: `language_model.*`, `visual.*`, `custom_text_proj`.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from colfolio.config import Settings
from colfolio.errors import ColfolioError, RecipeError
from colfolio.models.contract import hash_weights
from colfolio.models.drawing import draw_normal
from colfolio.models.linear import speed_up_linears
from colfolio.models.lora.layers import TrainedProjection, is_lora_layer, is_set_aside

PROJECTION_NAME = "custom_text_proj"
_ADAPTER_NAME = "default"  # peft keeps several in one layer; here there is one
_TEXT, _VISION = "language_model", "visual"


class LoraSettings(Settings):
    """Which layers are adapted, and how: each then computes `W x + alpha / rank * B A x`.

    Args:
        rank: rows of A and columns of B.
        alpha: the scale of the product, times `rank`.
        dropout: of what A reads.
        text, vision: linear layers of a tower by name, which is the end of a path at a dot:
            `q_proj` in all layers, `layers.3.mlp.up_proj` in one.
        projection: trained wholly beside the adapters, adapted like the others, or left as it is.
    """

    rank: int = Field(default=32, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    text: tuple[str, ...] = (
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    )
    vision: tuple[str, ...] = ()
    projection: Literal["full", "adapter", "frozen"] = "adapter"


@dataclass(frozen=True, slots=True)
class LoraPlan:
    """What each adapted layer gets.

    Args:
        ranks, alphas: by the layer's name.
        dropout: of all of them.
        is_rank_stabilised: the scale is alpha over the root of the rank (arXiv:2312.03732).
        trains_projection: the projection is trained wholly.
    """

    ranks: Mapping[str, int]
    alphas: Mapping[str, float]
    dropout: float
    is_rank_stabilised: bool = False
    trains_projection: bool = False


def named_modules(backbone: Any, projection: nn.Module) -> nn.Module:
    """A model of the same modules under the names of a checkpoint, for peft to walk.

    What is put into the place of its `custom_text_proj` has to be handed back to the owner.
    """
    root = nn.Module()
    root.add_module(_TEXT, backbone.language_model)
    root.add_module(_VISION, backbone.visual)
    root.add_module(PROJECTION_NAME, projection)
    return root


def plan_of(root: nn.Module, settings: LoraSettings) -> LoraPlan:
    """The layers that settings mean in a model.

    Raises:
        RecipeError: a name is of no linear layer, no layer is adapted, or the projection cannot be
            trained as they say; it names the key.
    """
    linears = [name for name, module in root.named_modules() if isinstance(module, nn.Linear)]
    chosen: list[str] = []
    for key, tower, endings in (
        ("text", _TEXT, settings.text),
        ("vision", _VISION, settings.vision),
    ):
        inside = [name for name in linears if name.startswith(f"{tower}.")]
        for ending in endings:
            found = [name for name in inside if name.endswith(f".{ending}")]
            if not found:
                raise RecipeError(
                    f"{tower} has no linear layer {ending!r}; it has {_endings(inside)}", key
                )
            chosen += found
    _check_projection(root.get_submodule(PROJECTION_NAME), settings.projection)
    if settings.projection == "adapter":
        chosen.append(PROJECTION_NAME)
    if not chosen:
        raise RecipeError("no layer is adapted; name one here or in `vision`", "text")
    return LoraPlan(
        ranks=dict.fromkeys(chosen, settings.rank),
        alphas=dict.fromkeys(chosen, settings.alpha),
        dropout=settings.dropout,
        trains_projection=settings.projection == "full",
    )


def shapes_of(root: nn.Module, plan: LoraPlan) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor of an adapter, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, rank in plan.ranks.items():
        linear = root.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        shapes[f"{name}.lora_A.weight"] = (rank, linear.in_features)
        shapes[f"{name}.lora_B.weight"] = (linear.out_features, rank)
    if plan.trains_projection:
        for name, tensor in root.get_submodule(PROJECTION_NAME).named_parameters():
            shapes[f"{PROJECTION_NAME}.{name}"] = tuple(tensor.shape)
    return shapes


def first_weights(root: nn.Module, plan: LoraPlan, seed: int) -> dict[str, Tensor]:
    """Tensors of an adapter that changes no vector yet: B is zero, A normal.

    The standard deviation of A is 1 / rank, as colpali-engine trains (`gaussian` of peft). Drawn
    otherwise than by peft, so that equal seeds give equal weights on every machine.
    """
    weights: dict[str, Tensor] = {}
    for name, shape in shapes_of(root, plan).items():
        if name.endswith(".lora_A.weight"):
            weights[name] = draw_normal(shape, 1 / shape[0], seed, name)
        elif name.endswith(".lora_B.weight"):
            weights[name] = torch.zeros(shape)
        else:
            weights[name] = root.get_parameter(name).detach().clone()
    return weights


def inject(root: nn.Module, plan: LoraPlan, weights: Mapping[str, Tensor]) -> None:
    """Put adapters with these tensors into layers, and freeze all else, in place.

    They are held in the layer's own dtype, and in float32 where that is narrower; a projection in
    the wider one of the base's dtype and that of its tensors.

    Args:
        weights: one for each of `shapes_of`.
    """
    # on the meta device, because a layer that is built draws from torch's generator
    import_peft().inject_adapter_in_model(
        lora_config(plan), root, _ADAPTER_NAME, low_cpu_mem_usage=True
    )
    layers = dict(lora_layers(root))
    assert layers.keys() == plan.ranks.keys()
    root.requires_grad_(False)
    for name, layer in layers.items():
        for key, side in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            weight = _placed(weights[f"{name}.{key}.weight"], layer.weight)
            side[_ADAPTER_NAME].weight = nn.Parameter(weight)
            speed_up_linears(side)
        layer.train(layer.base_layer.training)  # else dropout would be at work in evaluation
    if plan.trains_projection:
        base = root.get_submodule(PROJECTION_NAME)
        assert isinstance(base, nn.Linear)
        weight, bias = (weights[f"{PROJECTION_NAME}.{name}"] for name in ("weight", "bias"))
        root.add_module(PROJECTION_NAME, TrainedProjection(base, weight, bias))


def lora_config(plan: LoraPlan, targets: str | None = None, **values: Any) -> Any:
    """A plan as peft's `LoraConfig`.

    Args:
        targets: a pattern of the adapted layers; None names each.
        values: further fields.
    """
    rank, alpha = _commonest(plan.ranks.values()), _commonest(plan.alphas.values())
    return import_peft().LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        lora_dropout=plan.dropout,
        use_rslora=plan.is_rank_stabilised,
        target_modules=targets or list(plan.ranks),
        rank_pattern={re.escape(name): r for name, r in plan.ranks.items() if r != rank},
        alpha_pattern={re.escape(name): a for name, a in plan.alphas.items() if a != alpha},
        init_lora_weights=False,
        **values,
    )


def adapter_weights(root: nn.Module) -> dict[str, Tensor]:
    """Tensors of the adapter in a model, by name, as `inject` takes them; empty without one."""
    weights: dict[str, Tensor] = {}
    for name, layer in lora_layers(root):
        for side in ("lora_A", "lora_B"):
            weights[f"{name}.{side}.weight"] = getattr(layer, side)[_ADAPTER_NAME].weight
    projection = root.get_submodule(PROJECTION_NAME)
    if isinstance(projection, TrainedProjection):
        for name, tensor in projection.named_parameters():
            weights[f"{PROJECTION_NAME}.{name}"] = tensor
    return weights


def plan_in(root: nn.Module) -> LoraPlan:
    """What the adapted layers of a model have, at least one."""
    layers = dict(lora_layers(root))
    one = next(iter(layers.values()))
    return LoraPlan(
        ranks={name: layer.r[_ADAPTER_NAME] for name, layer in layers.items()},
        alphas={name: float(layer.lora_alpha[_ADAPTER_NAME]) for name, layer in layers.items()},
        dropout=getattr(one.lora_dropout[_ADAPTER_NAME], "p", 0.0),
        is_rank_stabilised=one.use_rslora[_ADAPTER_NAME],
        trains_projection=isinstance(root.get_submodule(PROJECTION_NAME), TrainedProjection),
    )


def adapter_digest(root: nn.Module) -> str:
    """SHA-256 of all that an adapter adds to the weights of its base; empty without one."""
    weights = adapter_weights(root)
    if not weights:
        return ""
    scales = {name: layer.scaling for name, layer in lora_layers(root)}
    text = hash_weights(weights) + json.dumps(scales, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def lora_layers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Adapted layers that compute as such, by name; a merged one is none."""
    return (
        (name, module)
        for name, module in root.named_modules()
        if is_lora_layer(module) and not is_set_aside(name)
    )


def import_peft() -> Any:
    """The package peft, which only adapters need.

    Raises:
        ColfolioError: it is not installed.
    """
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ColfolioError(
            f"adapters need the package peft ({error}): pip install 'colfolio[lora]'"
        ) from None


def _check_projection(projection: nn.Module, wish: str) -> None:
    """Refuse to adapt a head that is the embedding, and to train one wholly that has no bias."""
    if wish != "frozen" and not isinstance(projection, nn.Linear):
        raise RecipeError(
            f"is {wish!r}, but this model's head has no weights of its own: it multiplies by the "
            "embedding; set it to 'frozen'",
            "projection",
        )
    if wish == "full" and getattr(projection, "bias", None) is None:
        raise RecipeError(
            "is 'full', which is for the projection of a retriever; set it to 'adapter' or "
            "'frozen'",
            "projection",
        )


def _placed(tensor: Tensor, weight: Tensor) -> Tensor:
    """On the device of a layer's weight, and in its dtype or a wider one."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return tensor.detach().to(weight.device, dtype, copy=True)


def _commonest(values: Iterable[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _endings(names: list[str]) -> str:
    """Names of linear layers without the number of their block."""
    short = {re.sub(r"^.*?\.\d+\.", "", name) for name in names}
    return ", ".join(sorted(short)) or "none"
