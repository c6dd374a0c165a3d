import pytest
import torch

from colfolio.errors import CheckpointError
from colfolio.models.contract import hash_weights, load_contract, save_contract

WEIGHTS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.bfloat16)}


def test_a_contract_reads_back_equal(shared_retriever, tmp_path):
    save_contract(shared_retriever.contract, tmp_path)
    assert load_contract(tmp_path) == shared_retriever.contract


def test_a_folder_without_a_contract_tells_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match="colfolio init"):
        load_contract(tmp_path)


def test_the_hash_does_not_depend_on_order_or_layout():
    turned = {"b": WEIGHTS["b"], "a": WEIGHTS["a"].T.contiguous().T}
    assert hash_weights(turned) == hash_weights(WEIGHTS)


@pytest.mark.parametrize(
    "changed",
    [
        {"a": WEIGHTS["a"].reshape(3, 2)},
        {"a": WEIGHTS["a"].double()},
        {"a": WEIGHTS["a"] + torch.tensor([[0, 0, 0], [0, 0, 1e-6]])},
        {"b": torch.zeros(2, dtype=torch.bfloat16)},
        {"c": torch.ones(1)},
    ],
)
def test_the_hash_sees_names_shapes_dtypes_and_bits(changed):
    assert hash_weights(WEIGHTS | changed) != hash_weights(WEIGHTS)


def test_a_tensor_of_no_dimensions_has_a_hash():
    assert hash_weights({"a": torch.tensor(1.0)}) != hash_weights({"a": torch.tensor(2.0)})
