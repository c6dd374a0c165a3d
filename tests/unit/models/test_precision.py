"""What precision a wish comes to on a device."""

import pytest
import torch

from colfolio.models.precision import autocast, product_dtype

CPU = torch.device("cpu")


def dtype_of_a_product(precision):
    with autocast(precision, CPU):
        return (torch.eye(2) @ torch.eye(2)).dtype


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)],
)
def test_a_named_precision_is_honoured(precision, dtype):
    assert dtype_of_a_product(precision) is dtype
    assert product_dtype(precision, CPU) is dtype


@pytest.mark.parametrize(("is_native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_only_where_the_machine_computes_it(is_native, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    assert dtype_of_a_product("auto") is dtype
    assert product_dtype("auto", CPU) is dtype


def test_fp32_inside_of_another_precision_is_fp32():
    with autocast("bf16", CPU):
        assert dtype_of_a_product("fp32") is torch.float32
