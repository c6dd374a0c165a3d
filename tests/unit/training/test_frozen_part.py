from dataclasses import fields, replace

import pytest
import torch
from torch import nn

from colfolio.training import frozen_part
from colfolio.training.frozen_part import FrozenPart, FrozenWeights


@pytest.fixture
def tower():
    torch.manual_seed(0)
    tower = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    tower.register_buffer("frequencies", torch.ones(3), persistent=False)
    tower.requires_grad_(False)
    while tower[0].weight._version < 9:  # any number, as long as it is known
        tower[0].weight.mul_(1)
    return tower


@pytest.fixture
def num_hashed(monkeypatch):
    """Counts how often weights are hashed."""
    counted = []
    plain = frozen_part.hash_weights

    def counting(weights):
        counted.append(len(weights))
        return plain(weights)

    monkeypatch.setattr(frozen_part, "hash_weights", counting)
    return lambda: len(counted)


def _in_place(tower):
    tower[0].weight.add_(1)


def _one_element_of_a_view(tower):
    tower[2].weight.detach()[1, 2] = 7


def _buffer(tower):
    tower.frequencies.mul_(2)


def _other_values(tower):
    tower[0].weight.data = tower[0].weight + 1


def _other_values_at_the_same_address(tower):
    """As when a model is moved away, changed and moved back."""
    address = tower[0].weight.data_ptr()
    for _ in range(200):
        tower[0].weight.data = torch.empty(0)
        tower[0].weight.data = torch.ones(6, 4)
        if tower[0].weight.data_ptr() == address:
            return


def _other_parameter(tower):
    tower[0].weight = nn.Parameter(tower[0].weight + 1, requires_grad=False)


def _other_parameters_until_one_has_the_same_id(tower):
    old = id(tower[0].weight)
    for _ in range(200):
        tower[0].weight = nn.Parameter(torch.ones(6, 4), requires_grad=False)
        if id(tower[0].weight) == old:
            return


def _loaded(tower):
    tower.load_state_dict({name: value + 1 for name, value in tower.state_dict().items()})


def _assigned(tower):
    weights = {name: value + 1 for name, value in tower.state_dict().items()}
    tower.load_state_dict(weights, assign=True)
    tower.requires_grad_(False)


def _batch_statistics(tower):
    tower.train()(torch.randn(5, 4))


def _other_dtype(tower):
    tower.half()


def _other_module(tower):
    tower[2] = nn.Linear(6, 4, bias=False).requires_grad_(False)


def _other_parameter_over_the_same_memory_with_as_many_writes(tower):
    tower[0].weight = nn.Parameter(tower[0].weight.data, requires_grad=False)
    for _ in range(9):
        tower[0].weight.add_(1)


def _transposed_in_its_memory(tower):
    tower[0].weight.data = tower[0].weight.data.view(4, 6).t()


def _without_bias(tower):
    tower[2].register_parameter("bias", None)


CHANGES = [
    _other_parameter_over_the_same_memory_with_as_many_writes,
    _transposed_in_its_memory,
    _without_bias,
    _in_place,
    _one_element_of_a_view,
    _buffer,
    _other_values,
    _other_values_at_the_same_address,
    _other_parameter,
    _other_parameters_until_one_has_the_same_id,
    _loaded,
    _assigned,
    _batch_statistics,
    _other_dtype,
    _other_module,
]


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_of_any_kind_gives_another_fingerprint(tower, change):
    weights = FrozenWeights([tower])
    before = weights.fingerprint()
    with torch.no_grad():
        change(tower)
    after = weights.fingerprint()
    assert after != before
    assert after == FrozenWeights([tower]).fingerprint() == weights.fingerprint()


def test_weights_are_hashed_once_as_long_as_nothing_changes(tower, num_hashed):
    weights = FrozenWeights([tower])
    tower.eval()
    fingerprints = set()
    for _ in range(5):
        fingerprints.add(weights.fingerprint())
        tower(torch.randn(2, 4))
    assert len(fingerprints) == num_hashed() == 1


def test_equal_weights_in_other_tensors_keep_their_fingerprint(tower, num_hashed):
    weights = FrozenWeights([tower])
    before = weights.fingerprint()
    tower.load_state_dict({name: value.clone() for name, value in tower.state_dict().items()})
    assert weights.fingerprint() == before
    assert num_hashed() == 2


def test_a_write_that_torch_does_not_count_is_found_by_content(tower):
    weights = FrozenWeights([tower])
    before = weights.fingerprint()
    tower[0].weight.data.add_(1)
    assert weights.fingerprint() == before  # when this fails, torch counts it: by_content can go
    after = weights.fingerprint(by_content=True)
    assert after != before
    assert weights.fingerprint() == after


def test_what_is_written_while_it_is_hashed_is_seen_the_next_time(tower, monkeypatch):
    weights = FrozenWeights([tower])
    plain = frozen_part.hash_weights

    def hashing(found):
        digest = plain(found)
        tower[0].weight.add_(1)
        return digest

    with monkeypatch.context() as patch:
        patch.setattr(frozen_part, "hash_weights", hashing)
        weights.fingerprint()
    assert weights.fingerprint() == FrozenWeights([tower]).fingerprint()


def test_a_weight_that_trains_is_refused(tower):
    weights = FrozenWeights([tower])
    weights.fingerprint()
    tower[2].bias.requires_grad_(True)
    with pytest.raises(ValueError, match=r"0\.2\.bias trains"):
        weights.fingerprint()


def test_a_weight_whose_changes_are_not_counted_is_refused():
    with torch.inference_mode():
        tower = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(ValueError, match="inference_mode"):
        FrozenWeights([tower]).fingerprint()


def test_the_order_of_modules_is_part_of_the_fingerprint(tower):
    first, last = tower[0], tower[2]
    assert FrozenWeights([first, last]).fingerprint() != FrozenWeights([last, first]).fingerprint()


PART = FrozenPart("weights", "vision 2", "{}", "fp32", "sdpa", "cpu")


@pytest.mark.parametrize("name", [field.name for field in fields(FrozenPart)])
def test_every_field_of_a_part_changes_its_fingerprint(name):
    assert replace(PART, **{name: "other"}).fingerprint() != PART.fingerprint()
    assert replace(PART).fingerprint() == PART.fingerprint()


def test_another_library_or_another_product_of_float32_is_another_part(monkeypatch):
    fingerprints = {PART.fingerprint()}
    for module in (frozen_part.torch, frozen_part.transformers):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "other")
            fingerprints.add(PART.fingerprint())
    monkeypatch.setattr(frozen_part.torch, "get_float32_matmul_precision", lambda: "medium")
    fingerprints.add(PART.fingerprint())
    assert len(fingerprints) == 4
