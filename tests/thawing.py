"""What tests of policies share: which parameters change in each step of a run, and which should."""

import copy

import torch

from colfolio.distributed import gather_state, whole
from colfolio.models.adapters import adapter_in
from colfolio.models.parts import inventory
from colfolio.training import train


def watched(state, dataset, table, after_step=lambda: None):
    """The reports of a run to its end; raises if other tensors change than a table says.

    Args:
        table: from which step on, counted from 0, which selectors of the model as it then is.
        after_step: called behind each step.
    """
    reports, unchanged, before = [], {}, tensors_of(state.model)
    for report in train(state, dataset):
        first = max(step for step in table if step < report.step)
        expected = set(map(plain_name, inventory(state.model).select(table[first])))
        now = tensors_of(state.model)
        changed = {name for name in now if not torch.equal(now[name], before[name])}
        assert changed <= expected, (report.step, changed - expected)
        unchanged[first] = unchanged.get(first, expected) - changed
        reports.append(report)
        after_step()
        before = now
    assert not any(unchanged.values()), unchanged
    return reports


def tensors_of(model):
    """Every tensor, whole, by the name that it has without adapters beside it.

    Also those that no run may change: what adapters keep of the base, and inverse frequencies.
    """
    named = dict(model.named_parameters()) | dict(model.named_buffers())
    return {plain_name(name): whole(tensor.detach()).clone() for name, tensor in named.items()}


def plain_name(name):
    return name.replace(".base_layer.", ".")


def all_of(state):
    """All that a run goes on from, whole, on the main rank."""
    adapter = adapter_in(state.model)
    values = {
        "weights": state.model.weights(),
        "adapter": adapter[1] if adapter else {},
        "optimiser": state.optimiser.state_dict(),
        "groups": state.groups,
        "opened": state.opened,
        "watch": state.watch,
    }
    return copy.deepcopy(gather_state(values))


def assert_same(found, expected, where=""):
    """To the bit."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where
