"""An adapter's folder, read and written: LoRA tensors as peft and colpali-engine name them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from colfolio.errors import CheckpointError, TensorsError
from colfolio.models.contract import (
    CONTRACT_FILE,
    Contract,
    check_saved,
    load_contract,
    save_contract,
)
from colfolio.models.files import CONFIG_FILE, whole_folder
from colfolio.models.formats.layouts import ENGINE, LAYOUTS, Layout
from colfolio.models.formats.reading import ADAPTER_FILE
from colfolio.models.lora.configuration import (
    AdapterConfig,
    plan_asked,
    plan_hash,
    read_adapter_config,
    target_pattern,
)
from colfolio.models.lora.placing import LoraPlan, adapter_weights, lora_config, plan_in, shapes_of
from colfolio.models.weights import (
    INDEX_FILE,
    WEIGHTS_FILE,
    listed,
    read_tensors,
    write_weights,
)

ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_PICKLED_FILE = "adapter_model.bin"
_PREFIX = "base_model.model."  # peft's, around the model that it adapts
_LAYOUTS = (*LAYOUTS["colpali-engine"], *LAYOUTS["transformers"])


@dataclass(frozen=True, slots=True)
class Adapter:
    """An adapter out of its folder, before it is put into a model.

    Args:
        weights: by our names.
        layout: in whose names its configuration speaks.
        contract: None if another library wrote the folder.
    """

    folder: Path
    config: AdapterConfig
    weights: dict[str, Tensor]
    layout: Layout
    contract: Contract | None

    def plan(self, root: nn.Module) -> LoraPlan:
        """The layers of a model that it adapts, once its tensors are known to be exactly theirs.

        Raises:
            TensorsError: they are not; all missing and unexpected names are listed.
        """
        plan = plan_asked(self.config, root, self.layout, str(self.folder / ADAPTER_FILE))
        shapes = shapes_of(root, plan)
        missing = sorted(set(shapes) - set(self.weights))
        unexpected = sorted(set(self.weights) - set(shapes))
        wrong = [
            f"{name} {tuple(tensor.shape)} instead of {shapes[name]}"
            for name, tensor in sorted(self.weights.items())
            if name in shapes and tuple(tensor.shape) != shapes[name]
        ]
        if missing or unexpected or wrong:
            raise TensorsError(
                f"{self.folder}: tensors do not fit the base with the layers and ranks that "
                f"{ADAPTER_FILE} names. Missing: {listed(missing)}. Unexpected: "
                f"{listed(unexpected)}. Of another shape: {listed(wrong)}."
            )
        return plan


def is_adapter_folder(folder: Path) -> bool:
    """Whether a folder holds an adapter, and no model beside it.

    That is decided by whose weights are there, because other libraries leave a `config.json` of the
    base beside an adapter; without weights, or with those of both, by that file.
    """
    if not (folder / ADAPTER_FILE).is_file():
        return False
    has_own = any((folder / name).is_file() for name in (ADAPTER_WEIGHTS_FILE, _PICKLED_FILE))
    has_model = any((folder / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))
    return has_own if has_own != has_model else not (folder / CONFIG_FILE).is_file()


def read_adapter(folder: Path) -> Adapter:
    """The adapter in a folder.

    Raises:
        CheckpointError: a file is missing or damaged, an option is not honoured here, or tensors
            have names that no layout of a retriever has.
    """
    config = read_adapter_config(folder)
    path = folder / ADAPTER_WEIGHTS_FILE
    if not path.is_file() and (folder / _PICKLED_FILE).is_file():
        raise CheckpointError(
            f"{folder}: no {ADAPTER_WEIGHTS_FILE}; {_PICKLED_FILE} is pickled, and reading that "
            "may run any code; ask its author for safetensors, or convert it where you trust it"
        )
    stored = read_tensors(path)
    foreign = [name for name in stored if not name.startswith(_PREFIX)]
    named = {name.removeprefix(_PREFIX): tensor for name, tensor in stored.items()}
    layout = min(_LAYOUTS, key=lambda one: one.num_unknown(named))
    foreign += [_PREFIX + name for name in named if layout.ours(name) is None]
    if foreign:
        raise TensorsError(f"{path}: of no layer that a retriever has: {listed(foreign)}")
    weights = {str(layout.ours(name)): tensor for name, tensor in named.items()}
    contract = None
    if (folder / CONTRACT_FILE).is_file():
        contract = load_contract(folder)
        _check_plan(contract.plan_hash, config, folder)
        contract = check_saved(contract, weights, str(folder))
    return Adapter(folder, config, weights, layout, contract)


def write_adapter(
    root: nn.Module,
    contract: Contract,
    folder: Path,
    base: str,
    revision: str | None,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write the adapter in a model; aside first, then renamed.

    Args:
        weights: of the adapter, if those in the model are spread over ranks.

    Raises:
        CheckpointError: the folder holds something else than an adapter, or cannot be written.
    """
    weights = _plain(adapter_weights(root) if weights is None else weights)
    plan = plan_in(root)
    projection = ENGINE.theirs("custom_text_proj.").removesuffix(".")
    config = lora_config(
        plan,
        target_pattern(root, plan.ranks),
        base_model_name_or_path=base,
        revision=revision,
        inference_mode=True,
        modules_to_save=[projection] if plan.trains_projection else None,
    )
    with whole_folder(folder, (ADAPTER_FILE,)) as aside:
        config.save_pretrained(aside)
        named = {_PREFIX + ENGINE.theirs(name): tensor for name, tensor in weights.items()}
        write_weights(named, aside / ADAPTER_WEIGHTS_FILE)
        save_contract(contract, aside, weights, plan_hash(read_adapter_config(aside)))


def _check_plan(promised: str, config: AdapterConfig, folder: Path) -> None:
    if not promised:
        raise CheckpointError(
            f"{folder}: {CONTRACT_FILE} has no plan_hash, with which every adapter is saved, so it "
            f"was changed since and nothing says that {ADAPTER_FILE} was not; take the file as it "
            "was"
        )
    if plan_hash(config) != promised:
        raise CheckpointError(
            f"{folder / ADAPTER_FILE}: was changed after it was saved: it asks for other layers, "
            f"ranks or scales than {CONTRACT_FILE} says by plan_hash; take the file as it was"
        )


def _plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
