"""What precision a wish comes to on a device."""

import pytest
import torch

from colfolio.models.precision import autocast

CPU = torch.device("cpu")


def product_dtype(precision):
    with autocast(precision, CPU):
        return (torch.eye(2) @ torch.eye(2)).dtype


@pytest.mark.parametrize(
    ("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_a_named_precision_is_honoured(precision, dtype):
    assert product_dtype(precision) is dtype


@pytest.mark.parametrize(("is_native", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_auto_is_bf16_only_where_the_machine_computes_it(is_native, dtype, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: is_native)
    assert product_dtype("auto") is dtype
