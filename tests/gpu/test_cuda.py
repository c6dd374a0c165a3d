"""On a GPU: the same vectors within the rounding of half precision, and a step that trains."""

import copy
import inspect

import pytest
import torch

from colfolio import attention
from colfolio.attention import choose_attention, packed_attention
from colfolio.batch import offsets_of
from colfolio.data.dataset import load_dataset
from colfolio.maxsim import maxsim
from colfolio.training import TrainSettings, start_training, train

pytestmark = pytest.mark.gpu
LENGTHS = [1, 7, 7, 130, 64, 2]


@pytest.fixture
def on_gpu(retriever):
    """A copy of the tiny retriever on the GPU."""
    return copy.deepcopy(retriever).to("cuda")


def agree(mine, exact, bound):
    """The largest difference, beside the size of the numbers themselves."""
    difference = (mine.double().cpu() - exact.double().cpu()).abs().max()
    assert difference <= bound * exact.abs().max(), float(difference)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_packed_attention_agrees_with_the_plain_path_forward_and_backward(causal, dtype):
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, sum(LENGTHS), 64), (2, sum(LENGTHS), 64), (2, sum(LENGTHS), 64)]
    plain = [torch.randn(shape, generator=generator).to(dtype).double() for shape in shapes]
    weight = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    results = []
    for inputs in (plain, [part.to("cuda", dtype) for part in plain]):
        for part in inputs:
            part.requires_grad_()
        out = packed_attention(*inputs, offsets_of(LENGTHS), causal=causal, scaling=0.125)
        grads = torch.autograd.grad(out, inputs, weight.to(out))
        results.append([out.detach(), *grads])
    for mine, exact in zip(results[1], results[0], strict=True):
        assert mine.dtype == dtype
        # bf16 rounds to 2^-9 of a number; a sum of rounded products is a few times worse
        agree(mine, exact, 2**-5 if dtype == torch.bfloat16 else 1e-2)


def test_half_precision_takes_the_ragged_kernel_where_it_knows_windows(monkeypatch):
    query = torch.zeros(2, 4, 64, device="cuda", dtype=torch.bfloat16)
    kernel = attention.varlen_attn
    is_able = kernel is not None and "window_size" in inspect.signature(kernel).parameters
    assert (choose_attention("auto", query.device, query.dtype) == "varlen") == is_able
    assert choose_attention("auto", query.device, torch.float32) == "sdpa"
    calls = []
    monkeypatch.setattr(attention, "_varlen", lambda *inputs: calls.append(1) or inputs[0])
    packed_attention(query, query, query, offsets_of([1, 3]), causal=True, scaling=1.0)
    assert bool(calls) == is_able


@pytest.mark.parametrize("side", ["queries", "documents"])
def test_vectors_agree_with_the_cpu(retriever, on_gpu, texts, pages, side):
    packed = getattr(retriever.collator, side)(texts if side == "queries" else pages)
    with torch.no_grad():
        exact = retriever(packed).vectors
        agree(on_gpu(packed.to("cuda")).vectors, exact, 1e-2)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            half = on_gpu(packed.to("cuda")).vectors
    assert half.dtype == torch.float32
    # two tiny random layers of width 32 carry the rounding of bf16 to a few per cent
    similarity = (half.cpu() * exact).sum(dim=1)
    assert similarity.min() > 0.97


def test_maxsim_agrees_with_the_cpu_forward_and_backward(retriever, texts, pages):
    with torch.no_grad():
        queries = retriever(retriever.collator.queries(texts))
        documents = retriever(retriever.collator.documents(pages))
    results = []
    for device in ("cpu", "cuda"):
        sides = [side.to(torch.float64).to(device) for side in (queries, documents)]
        for side in sides:
            side.vectors.requires_grad_()
        scores = maxsim(*sides)
        grads = torch.autograd.grad((scores**2).sum(), [side.vectors for side in sides])
        results.append([scores.detach(), *grads])
    for mine, exact in zip(results[1], results[0], strict=True):
        agree(mine, exact, 1e-9)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_trains(on_gpu, write_shapes, tmp_path, precision):
    write_shapes(tmp_path / "set", {"train": 24})
    settings = TrainSettings.model_validate(
        {
            "steps": 3,
            "batch": {"rows": 8},
            "optimiser": {"lr": 1e-2, "warmup_steps": 0},
            "precision": precision,
        }
    )
    before = {name: weight.clone() for name, weight in on_gpu.named_parameters()}
    reports = list(train(start_training(on_gpu, settings), load_dataset(tmp_path / "set", "train")))
    assert [report.step for report in reports] == [1, 2, 3]
    for name, weight in on_gpu.named_parameters():
        assert weight.is_cuda
        assert weight.isfinite().all(), name
        assert not torch.equal(weight, before[name]), name


def test_encoding_gives_vectors_on_the_cpu(on_gpu, texts, pages):
    for many in (on_gpu.encode_queries(texts), on_gpu.encode_documents(pages)):
        assert many.vectors.device.type == "cpu"
        assert many.vectors.dtype == torch.float32
