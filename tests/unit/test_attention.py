import importlib.machinery
import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from colfolio import attention
from colfolio.attention import (
    choose_attention,
    packed_attention,
    packed_attention_forward,
    set_attention,
)
from colfolio.batch import offsets_of
from colfolio.errors import ColfolioError

ON_CPU = ["auto", "sdpa", "eager"]
GPU_KERNELS = ["varlen", "flash_attention_2"]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
lengths_of_rows = st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any)


def draw(tokens, heads=4, kv_heads=2, dtype=torch.float64):
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(heads, tokens, 8), (kv_heads, tokens, 8), (kv_heads, tokens, 8)]
    return [
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes
    ]


def by_definition(query, key, value, lengths, causal, scaling):
    pieces = [part.split(lengths, dim=1) for part in (query, key, value)]
    rows = [
        F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling, enable_gqa=True)
        for q, k, v in zip(*pieces, strict=True)
    ]
    return torch.cat(rows, dim=1)


@given(lengths_of_rows, st.booleans(), st.sampled_from([0, 3, 128]), st.sampled_from(ON_CPU))
def test_each_sequence_attends_to_itself_alone(lengths, causal, short, choice):
    inputs = draw(sum(lengths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "_SHORT", short)
        mine = packed_attention(
            *inputs, offsets_of(lengths), causal=causal, scaling=0.3, choice=choice
        )
    plain = by_definition(*inputs, lengths, causal, 0.3)
    torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(plain)
    for ours, theirs in zip(
        torch.autograd.grad(mine, inputs, weight),
        torch.autograd.grad(plain, inputs, weight),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("choice", ON_CPU)
def test_softmax_runs_in_float32_for_half_precision(choice):
    inputs = [part.detach().bfloat16() for part in draw(40)]
    offsets = offsets_of([40])
    mine = packed_attention(*inputs, offsets, causal=True, scaling=0.35, choice=choice)
    exact = packed_attention(*(p.double() for p in inputs), offsets, causal=True, scaling=0.35)
    assert mine.dtype == torch.bfloat16
    # one rounding of the weights and one of the result, each 2^-9
    torch.testing.assert_close(mine.double(), exact, rtol=0, atol=2**-6)


class Layer(torch.nn.Module):
    is_causal = True


def test_a_call_without_boundaries_is_refused():
    query, key, value = (part.unsqueeze(0) for part in draw(4))
    with pytest.raises(ValueError, match="needs cu_seq_lens_q and no mask"):
        packed_attention_forward(Layer(), query, key, value, None)
    with pytest.raises(ValueError, match="needs cu_seq_lens_q and no mask"):
        packed_attention_forward(
            Layer(), query, key, value, torch.ones(4), cu_seq_lens_q=offsets_of([4])
        )


def test_the_layer_says_whether_later_tokens_are_seen_unless_the_call_does():
    query, key, value = (part.unsqueeze(0) for part in draw(4))
    offsets = offsets_of([4])
    causal, _ = packed_attention_forward(Layer(), query, key, value, None, cu_seq_lens_q=offsets)
    both, _ = packed_attention_forward(
        Layer(), query, key, value, None, cu_seq_lens_q=offsets, is_causal=False
    )
    assert causal.shape == (1, 4, 4, 8)
    assert not torch.allclose(causal[0, 0], both[0, 0])  # the first token sees others
    torch.testing.assert_close(causal[0, -1], both[0, -1])  # the last sees all either way


def test_no_sequences_at_all_give_nothing():
    query, key, value = draw(0)
    assert packed_attention(query, key, value, offsets_of([0]), causal=True, scaling=1.0).shape == (
        4,
        0,
        8,
    )


def test_attention_dropout_is_refused():
    query, key, value = (part.unsqueeze(0) for part in draw(4))
    with pytest.raises(ValueError, match=r"received 0\.1: .*set attention_dropout to 0"):
        packed_attention_forward(
            Layer(), query, key, value, None, dropout=0.1, cu_seq_lens_q=offsets_of([4])
        )


@pytest.fixture
def on_ampere(monkeypatch):
    """A GPU as `choose_attention` sees it; gives a function that takes a part away again."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a GPU of 2017")
    monkeypatch.setattr(attention, "_knows_windows", lambda: True)
    found = importlib.util.find_spec
    there = importlib.machinery.ModuleSpec("flash_attn", None)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: there if name == "flash_attn" else found(name)
    )

    def without(what):
        if what == "Ampere":
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
        elif what == "varlen":
            monkeypatch.setattr(attention, "_knows_windows", lambda: False)
        else:
            monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    return without


@pytest.mark.parametrize("choice", GPU_KERNELS)
@pytest.mark.parametrize(("device", "dtype"), [(CPU, torch.bfloat16), (CUDA, torch.float32)])
def test_a_kernel_without_half_precision_on_a_gpu_is_refused(on_ampere, choice, device, dtype):
    with pytest.raises(ColfolioError, match=f"attention {choice} needs half precision on a CUDA"):
        choose_attention(choice, device, dtype)


def test_a_kernel_whose_package_is_missing_is_refused_with_the_way_to_get_it(on_ampere):
    on_ampere("flash_attn")
    with pytest.raises(ColfolioError, match=r"pip install flash-attn .*auto, which takes varlen"):
        choose_attention("flash_attention_2", CUDA, torch.float16)
    on_ampere("varlen")
    with pytest.raises(ColfolioError, match=r"torch 2\.11 or later.*auto, which takes sdpa"):
        choose_attention("varlen", CUDA, torch.float16)


@pytest.mark.parametrize("choice", GPU_KERNELS)
def test_a_kernel_that_the_gpu_is_too_old_for_is_refused(on_ampere, choice):
    on_ampere("Ampere")
    with pytest.raises(ColfolioError, match="Ampere generation or later, not a GPU of 2017"):
        choose_attention(choice, CUDA, torch.float16)


def test_auto_takes_the_best_that_is_there(on_ampere):
    assert choose_attention("auto", CPU, torch.bfloat16) == "sdpa"
    assert choose_attention("auto", CUDA, torch.float32) == "sdpa"
    assert choose_attention("auto", CUDA, torch.bfloat16) == "varlen"
    on_ampere("varlen")
    assert choose_attention("auto", CUDA, torch.float16) == "flash_attention_2"
    on_ampere("flash_attn")
    assert choose_attention("auto", CUDA, torch.float16) == "sdpa"


@pytest.mark.parametrize("choice", ["sdpa", "eager"])
def test_what_runs_everywhere_is_taken_by_name(choice):
    for device in (CPU, CUDA):
        assert choose_attention(choice, device, torch.float32) == choice


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
):
    """The function of the package of that name as its page describes it, computed plainly."""
    assert cu_seqlens_q.dtype == torch.int32
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    lengths = cu_seqlens_q.diff().tolist()
    assert max_seqlen_q == max_seqlen_k == max(lengths)
    assert all(part.is_contiguous() for part in (q, k, v))
    assert k.shape[1] == v.shape[1] == 2  # the kernel shares key heads by itself
    heads = [part.transpose(0, 1) for part in (q, k, v)]
    return by_definition(*heads, lengths, causal, softmax_scale).transpose(0, 1)


def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size):
    assert cu_seq_q.dtype == torch.int32
    lengths = cu_seq_q.diff().tolist()
    assert torch.equal(cu_seq_q, cu_seq_k)
    assert max_q == max_k == max(lengths)
    assert window_size in ((-1, 0), (-1, -1))
    heads = [part.transpose(0, 1) for part in (q, k, v)]
    return by_definition(*heads, lengths, window_size[1] == 0, scale).transpose(0, 1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("choice", GPU_KERNELS)
def test_a_ragged_kernel_is_told_the_boundaries_and_what_a_token_sees(monkeypatch, choice, causal):
    package = types.ModuleType("flash_attn")
    package.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(attention, "varlen_attn", varlen_attn)
    monkeypatch.setattr(attention, "_missing", lambda *_: None)
    lengths = [3, 0, 1, 5, 5]
    inputs = draw(sum(lengths))
    results = []
    for each in (choice, "eager"):
        out = packed_attention(
            *inputs, offsets_of(lengths), causal=causal, scaling=0.3, choice=each
        )
        results.append(
            [out, *torch.autograd.grad(out, inputs, torch.ones_like(out) + out.detach())]
        )
    for mine, plain in zip(*results, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-12, atol=1e-12)


def test_a_retriever_attends_by_the_kernel_that_was_chosen(retriever, pages, monkeypatch):
    taken = []
    for name in ("_eager", "_sdpa"):
        kernel = getattr(attention, name)
        monkeypatch.setattr(
            attention, name, lambda *given, n=name, f=kernel: taken.append(n) or f(*given)
        )
    packed = retriever.collator.documents(pages)
    for choice, expected in (("eager", "_eager"), ("auto", "_sdpa"), ("sdpa", "_sdpa")):
        set_attention(retriever.backbone, choice)
        retriever(packed)
        assert taken == [expected] * 4  # two layers of each tower
        taken.clear()


def test_a_kernel_that_cannot_run_is_refused_in_the_call_too(retriever, texts):
    set_attention(retriever.backbone, "varlen")
    with pytest.raises(ColfolioError, match="attention varlen needs half precision"):
        retriever(retriever.collator.queries(texts))


def test_another_retriever_keeps_its_own_choice(make_retriever):
    one, other = make_retriever(), make_retriever()
    set_attention(one.backbone, "eager")
    assert one.backbone.language_model.config._attn_implementation == "colfolio_packed_eager"
    assert one.backbone.visual.config._attn_implementation == "colfolio_packed_eager_flash"
    assert other.backbone.language_model.config._attn_implementation == "colfolio_packed"
