"""What a model is before its first step: positions, templates, loads, adapters, what trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from colfolio.batch import MultiVectors, Packed
from colfolio.data.conversation_batches import in_order
from colfolio.data.conversations import ConversationDataset
from colfolio.diagnosis.evidence import ModelFacts
from colfolio.diagnosis.signals.probe import Probe
from colfolio.diagnosis.signals.template_faults import template_faults
from colfolio.distributed import World
from colfolio.models.adapters import has_adapter
from colfolio.models.encoding import evaluating
from colfolio.models.generator import Generator
from colfolio.models.lora.placing import lora_layers, named_modules
from colfolio.models.parts import inventory
from colfolio.models.precision import Precision
from colfolio.models.projected import ProjectedBackbone
from colfolio.models.retriever import Retriever
from colfolio.models.selectors import PARTS
from colfolio.mrope import VIDEO, watch

_WATCHED = 2  # rows of a side, so that one lies behind another
_ADAPTED = "base_layer"  # what peft calls a layer that it puts adapters beside
MOST_RELOADED = 2**29  # bytes of weights that are read a second time to be compared


def measure_model(
    retriever: Retriever,
    probe: Probe | None,
    precision: Precision,
    *,
    has_loaded_adapter: bool = False,
    has_trained: bool = False,
    read_again: Callable[[], Mapping[str, Tensor]] | None = None,
) -> ModelFacts:
    """The facts of a retriever; all ranks ask if it is spread over them.

    Args:
        probe: whose rows are run; without, nothing is said of what takes a forward.
        has_loaded_adapter: an adapter, if it has one, was read from files and not drawn for a run.
        has_trained: steps were made since, by which weights of the base may have moved too; whose
            adapter it is was asked before them.
        read_again: gives the weights of the files that it was read from, by the names of
            `Retriever.weights`; None if they are not to be read a second time.
    """
    told: dict[str, Any] = {}
    has_loaded_adapter = has_loaded_adapter and has_adapter(retriever)
    if probe is not None:
        told["positions"], told["positions_told"] = positions_of(retriever, probe)
        told["template_faults"] = template_faults(retriever, probe.batch)
        told["row_difference"] = row_difference(retriever, probe, precision)
    if has_loaded_adapter:
        told["adapter_effect"] = adapter_effect(retriever, probe, precision) if probe else None
        told["adapter_is_of_base"] = None if has_trained else adapter_is_of_base(retriever)
    if read_again is not None:
        told["fresh"] = unlike(retriever, read_again())
    trains, frozen = open_and_frozen(retriever)
    return ModelFacts(
        **told,
        trains=trains,
        frozen=frozen,
        is_trained=can_retrieve(retriever),
        drawn=drawn_parts(retriever),
    )


def positions_of(retriever: Retriever, probe: Probe) -> tuple[str | None, str]:
    """The guard's verdict on the model's own forward, `right` or a fault's name, and a sentence.

    None where no fault is found and not all can be judged.
    """
    verdict, told = "right", ""
    for side in (probe.batch.documents, probe.batch.queries):
        found, said = _seen(retriever, _first_rows(side), retriever)
        if found not in ("right", None):
            return found, said
        verdict, told = verdict and found, told or said
    return verdict, told


def row_difference(retriever: Retriever, probe: Probe, precision: Precision) -> float:
    """By how much a number of a vector differs at most between rows alone and beside another."""
    whole = Probe(probe.batch)  # rows of one chunk
    most = []
    for side in (probe.batch.documents, probe.batch.queries):
        rows = _first_rows(side)
        together = whole.vectors(retriever, rows, precision).vectors
        each = [rows.rows(row, row + 1) for row in range(len(rows))]
        alone = MultiVectors.cat([whole.vectors(retriever, row, precision) for row in each])
        most.append(float((together - alone.vectors).abs().max()))
    return max(most)


def text_positions(generator: Generator, dataset: ConversationDataset) -> tuple[str | None, str]:
    """The same of a generator, over the first conversations of a split.

    Raises:
        DatasetError: an image or video of them cannot be read.
    """
    rate = generator.contract.frame_rate
    rows = next(in_order(dataset, generator.chat, rate, _WATCHED, World())).inputs
    last = rows.offsets[1:] - 1
    return _seen(generator, rows, lambda inputs: generator(inputs, last.to(generator.device)))


def _seen(
    model: ProjectedBackbone, rows: Packed, run: Callable[[Packed], object]
) -> tuple[str | None, str]:
    """The verdict on the positions that a forward uses, None if there is none, and a sentence."""
    grids = _grids(model, rows)
    if grids and model.collator.scheme.needs_seconds:
        return None, ""  # a packed batch no longer holds the times that its positions were made of
    with torch.no_grad(), evaluating(model), watch(model, **grids) as seen:
        run(rows.to(model.device))
    verdict = seen.verdict
    harmful = [each.fault for each in verdict.findings if not each.harmless]
    judged = None if verdict.unjudged is not None else "right"
    return (harmful[0] if harmful else judged), str(verdict)


def _first_rows(side: Packed) -> Packed:
    return side.rows(0, min(_WATCHED, len(side)))


def adapter_effect(retriever: Retriever, probe: Probe, precision: Precision) -> float:
    """Norm of the difference that the adapters make to the probe's vectors, over their norm."""
    sides = probe.batch.queries, probe.batch.documents
    adapted = [probe.vectors(retriever, side, precision) for side in sides]
    with _without_adapters(retriever):
        plain = [probe.vectors(retriever, side, precision) for side in sides]
    return _difference(adapted, plain)


def adapter_is_of_base(retriever: Retriever) -> bool | None:
    """Whether the base's weights have the hash that the adapters name; None if it is not known.

    Large weights are not hashed for it: the load has compared them.
    """
    if _size(retriever) > MOST_RELOADED or _is_spread(retriever):
        return None
    found = retriever.weights_hash()
    return None if found is None else found == retriever.contract.base_hash


def unlike(retriever: Retriever, files: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Names of tensors whose values are not those that the files hold, or that they lack."""
    return tuple(
        name
        for name, tensor in retriever.weights().items()
        if name not in files or not _is_same(tensor, files[name])
    )


def open_and_frozen(model: ProjectedBackbone) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters of each part that train now, and that do not; a part may stand in both."""
    places = inventory(model).places
    counts: tuple[dict[str, int], dict[str, int]] = ({}, {})
    for name, parameter in model.named_parameters():
        side, part = counts[not parameter.requires_grad], places[name].part
        side[part] = side.get(part, 0) + parameter.numel()
    trains, frozen = ({part: side[part] for part in PARTS if part in side} for side in counts)
    return trains, frozen


def can_retrieve(model: Retriever) -> bool:
    """Whether weights were trained to retrieve, by what is known of them.

    A base tells the hash of the projection that was drawn for it, and no recipe and no data; where
    the weights below that projection come from says nothing of it.
    """
    contract = model.contract
    return bool(contract.recipe or contract.data) or not contract.projection_hash


def drawn_parts(model: Retriever) -> tuple[str, ...]:
    """Parts whose weights are as they were drawn at random, less those that adapters change.

    Of a base from published weights that is the projection. What else a graft lacked its contract
    tells in words, which say nothing here.
    """
    if can_retrieve(model):
        return ()
    places = inventory(model).places
    adapted = {place.part for name, place in places.items() if _ADAPTED in name.split(".")}
    present = {place.part for place in places.values()} - adapted - {"adapters"}
    drawn = present & {"projection"} if model.contract.source else present
    return tuple(part for part in PARTS if part in drawn)


def can_reload(retriever: Retriever) -> bool:
    """Whether the weights are whole, and few enough to be read a second time."""
    return not _is_spread(retriever) and _size(retriever) <= MOST_RELOADED


def _grids(model: ProjectedBackbone, rows: Packed) -> dict[str, Any]:
    """What the guard is told of clips, whose grids a packed batch has beside those of images."""
    prompter = model.collator.prompter
    clips = rows.token_ids == prompter.video_token_id
    if prompter.video_token_id is None or not clips.any():
        return {}
    is_clip = torch.tensor(
        [bool(each.any()) for each in clips.split(rows.lengths.tolist())], dtype=torch.bool
    ).repeat_interleave(rows.grid_offsets.diff())
    types = torch.where(clips, VIDEO, (rows.token_ids == prompter.image_token_id).long())
    return {
        "token_types": types[None],
        "image_grid_thw": rows.grid_thw[~is_clip],
        "video_grid_thw": rows.grid_thw[is_clip],
    }


@contextmanager
def _without_adapters(retriever: Retriever) -> Iterator[None]:
    """Adapters that add nothing inside; no tensor is touched."""
    root = named_modules(retriever.backbone, retriever.projection)
    layers = [layer for _, layer in lora_layers(root)]
    scales = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update(dict.fromkeys(layer.scaling, 0.0))
        yield
    finally:
        for layer, own in zip(layers, scales, strict=True):
            layer.scaling.update(own)


def _difference(these: list[MultiVectors], those: list[MultiVectors]) -> float:
    mine, other = (torch.cat([side.vectors for side in both]) for both in (these, those))
    return float((mine - other).norm() / other.norm())


def _is_same(tensor: Tensor, stored: Tensor) -> bool:
    if tensor.shape != stored.shape:
        return False
    return torch.equal(tensor.detach().cpu(), stored.detach().to("cpu", tensor.dtype))


def _size(retriever: Retriever) -> int:
    return sum(tensor.nbytes for tensor in retriever.weights().values())


def _is_spread(retriever: Retriever) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in retriever.parameters())
