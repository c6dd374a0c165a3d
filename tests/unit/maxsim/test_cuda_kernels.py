"""The fused kernels without a GPU: interpreted they are right, compiled they are what was meant."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import colfolio.maxsim as package
from colfolio.maxsim import cuda
from colfolio.maxsim.cuda_kernels import add_choosers, add_winners, find_best, sum_queries

INTERPRETED = Path(__file__).with_name("interpreted_kernels.py")
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
# compute capability of A100, L4 and H100, and what a program on it can share
SHARED_KIB = {80: 163, 89: 99, 90: 227}


def test_interpreted_on_the_cpu_they_equal_the_definition():
    told = subprocess.run(
        [sys.executable, "-m", "pytest", str(INTERPRETED), "-p", "no:cacheprovider"],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout[-5000:] + told.stderr[-2000:]


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """Compiles a kernel for a GPU that need not be there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def compile_for(capability, kernel, given, fixed, **options):
        types = dict(zip(kernel.arg_names, given, strict=False))
        types |= dict.fromkeys(fixed, "constexpr")
        assert list(types) == kernel.arg_names
        aligned = {
            (place,): [["tt.divisibility", 16]]
            for place, kind in enumerate(given)
            if kind.startswith("*")
        }
        source = ASTSource(kernel, types, constexprs=fixed, attrs=aligned)
        target = GPUTarget("cuda", capability, 32)
        return compile_kernel(source, target=target, options=options | cuda._OPTIONS)

    return compile_for


def forward(compiled, capability, dtype, dim):
    sizes = cuda._sizes(dtype, dim, is_hopper=capability == 90)
    blocks = {name: sizes.pop(name) for name in list(sizes) if name.endswith("_block")}
    fixed = {"dim": dim} | blocks | {"keeps_winners": True}
    vectors = f"*{NAMES[dtype]}"
    given = (vectors, vectors, "*i64", "*fp32", "*i32", "i32")
    return compiled(capability, find_best, given, fixed, **sizes)


@pytest.mark.parametrize(("capability", "dim"), [(80, 20), (89, 320), (90, 128)])
def test_half_precision_goes_through_tensor_cores_and_fits(compiled, capability, dim):
    kernel = forward(compiled, capability, torch.bfloat16, dim)
    instruction = "wgmma.mma_async" if capability == 90 else "mma.sync"
    assert f"{instruction}." in kernel.asm["ptx"]
    assert ".f32.bf16.bf16" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_KIB[capability] * 1024


@pytest.mark.parametrize("capability", [89, 90])
def test_float32_is_never_multiplied_in_tf32(compiled, capability):
    kernel = forward(compiled, capability, torch.float32, 128)
    assert "tf32" not in kernel.asm["ptx"]
    assert "fma.rn.f32" in kernel.asm["ptx"]
    assert kernel.metadata.shared <= SHARED_KIB[capability] * 1024


@pytest.mark.parametrize("dtype", NAMES)
def test_sums_and_gradients_compile(compiled, dtype):
    vectors, fixed = f"*{NAMES[dtype]}", {"dim": 96}
    given = ("*fp32", "*i64", "*fp32", "i32", "i32")
    compiled(90, sum_queries, given, {"document_block": 32, "vector_block": 32})
    given = (vectors, "*i32", "*fp32", "*i32", vectors, "i32", "i32")
    compiled(90, add_winners, given, fixed | {"vector_block": 16, "dim_block": 128})
    given = (vectors, "*i64", "*i32", "*fp32", "*i32", vectors, "i32", "i32", "i32", "i32")
    blocks = {"pair_block": 32, "dim_block": 128}
    kernel = compiled(90, add_choosers, given, fixed | blocks, **cuda._SMALL)
    assert "atom" not in kernel.asm["ptx"]


@pytest.fixture
def on_gpu(monkeypatch):
    """Builds vectors that say they are on a GPU of a capability."""

    class OnGpu(torch.Tensor):
        is_cuda = True

    def build(dtype, capability=(9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return torch.zeros(2, 4, dtype=dtype).as_subclass(OnGpu)

    return build


def test_kernels_are_taken_for_what_they_can_do(on_gpu, monkeypatch):
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        assert package._suits_kernels(on_gpu(dtype))
    assert not package._suits_kernels(on_gpu(torch.float64))
    assert not package._suits_kernels(on_gpu(torch.float16, capability=(7, 5)))
    assert not package._suits_kernels(torch.zeros(2, 4))
    monkeypatch.setattr(package, "_has_triton", lambda: False)
    assert not package._suits_kernels(on_gpu(torch.float32))
