"""Where numbers that are no numbers came from: the first module, or a parameter's gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor, nn

from colfolio.distributed import whole


def find_fault(model: nn.Module, run_again: Callable[[], object]) -> tuple[str, str]:
    """Run a batch again and watch its numbers; all ranks ask if the model is spread over them.

    The search needs the weights of before the step that failed. Where that step has made most of
    what trains no numbers, a module of such weights says nothing and is not named.

    Args:
        run_again: forward and backward of the batch; its gradients are cleared.

    Returns:
        `loss` or `gradient`, and the module whose output was the first not to be finite, or the
        parameter whose gradient is not; empty if none was found.
    """
    trained = [each for each in model.parameters() if each.requires_grad]
    broken = [each for each in trained if not _is_finite(each)]
    destroyed = set(map(id, broken)) if len(broken) > len(trained) / 2 else set()
    with watching(model) as seen:
        run_again()
    gradient = gradient_fault(model, seen.order)
    model.zero_grad(set_to_none=True)
    if not seen.wrong:
        return ("gradient", gradient) if gradient else ("loss", "")
    module = dict(model.named_modules()).get(seen.wrong[0], model)
    is_telling = not any(id(each) in destroyed for each in module.parameters())
    return "loss", seen.wrong[0] if is_telling else ""


@dataclass(slots=True)
class Watched:
    """What forwards did.

    Args:
        order: module -> how many had ended before, the last time.
        wrong: modules in the order in which they ended with numbers that are not finite. A module
            ends after those that are in it, so the first is the innermost.
    """

    order: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


def gradient_fault(model: nn.Module, order: Mapping[str, int]) -> str:
    """The parameter nearest to the loss whose gradient is not finite; empty if all are.

    Backward comes first to what ran last, and all below has it from there.

    Args:
        order: of the modules, as they ran.
    """
    wrong = [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not _is_finite(parameter.grad)
    ]
    return max(wrong, key=lambda name: order.get(name.rpartition(".")[0], -1), default="")


@contextmanager
def watching(model: nn.Module) -> Iterator[Watched]:
    """Look at the output of every module of a model; it waits for the device each time."""
    seen = Watched()

    def hook(name: str) -> Callable[..., None]:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen.order[name] = next(numbers)
            if not all(map(_is_finite, _tensors(output))):
                seen.wrong.append(name)

        return look

    numbers = count()
    handles = [
        module.register_forward_hook(hook(name or type(module).__name__))
        for name, module in model.named_modules()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _tensors(output: Any) -> Iterator[Tensor]:
    """All tensors in what a module gave."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors(each)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
    elif isinstance(vectors := getattr(output, "vectors", None), Tensor):
        yield vectors


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point():
        return True
    return bool(whole(tensor.detach()).isfinite().all())
