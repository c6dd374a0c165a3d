"""Facts of the model: each fault is named where it is planted, and a sound model has none."""

from dataclasses import replace

import pytest
import torch
from conversing import generator_of, write_moving

from colfolio.data.conversations import load_conversations
from colfolio.data.prompts import Prompter
from colfolio.diagnosis.signals import measure_model
from colfolio.diagnosis.signals.model_facts import (
    adapter_effect,
    can_retrieve,
    drawn_parts,
    open_and_frozen,
    positions_of,
    row_difference,
    text_positions,
)
from colfolio.diagnosis.signals.template_faults import template_faults
from colfolio.models import adapters
from colfolio.models.contract import Source
from colfolio.mrope import Qwen2VL, Span, Verdict


@pytest.fixture
def with_adapter(make_retriever):
    """A retriever with an adapter that does something, as one that was trained."""

    def make(scale=0.1, **settings):
        retriever = make_retriever()
        adapters.add_lora(
            retriever, adapters.LoraSettings.model_validate({"rank": 2} | settings), 0
        )
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, parameter in retriever.named_parameters():
                if "lora_B" in name:
                    parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
        return retriever

    return make


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "colfolio_grafted"])
def test_a_sound_model_of_any_family_has_no_fault(make_family_retriever, make_batch, family):
    from colfolio.diagnosis.signals import Probe

    retriever = make_family_retriever(family)
    probe = Probe(make_batch(retriever=retriever))
    facts = measure_model(retriever, probe, "fp32", read_again=retriever.weights)
    assert (facts.positions, facts.template_faults) == ("right", ())
    assert "right" in facts.positions_told
    assert facts.row_difference < 1e-4
    assert (facts.fresh, facts.is_trained, facts.drawn) == ((), False, tuple(facts.trains))
    assert (facts.adapter_effect, facts.adapter_is_of_base, facts.frozen) == (None, None, {})
    total = sum(parameter.numel() for parameter in retriever.parameters())
    assert sum(facts.trains.values()) == total


def test_flattened_positions_are_named(retriever, make_batch):
    from colfolio.diagnosis.signals import Probe

    batch = make_batch()
    rows = batch.documents
    flat = torch.cat([torch.arange(length) for length in rows.lengths.tolist()])
    flattened = replace(rows, position_ids=flat.repeat(3, 1))
    facts = measure_model(retriever, Probe(replace(batch, documents=flattened)), "fp32")
    assert facts.positions == "flattened"
    assert "flattened" in facts.positions_told


def test_rows_of_another_template_are_told_with_an_example(retriever, make_batch, monkeypatch):
    templates = retriever.contract.templates.model_copy(update={"num_query_suffix": 0})
    other = Prompter(retriever.tokenizer, templates)
    monkeypatch.setattr(retriever.collator, "prompter", other)
    (told,) = template_faults(retriever, make_batch(retriever=retriever))
    assert told.startswith("20 of 20 queries have other tokens than the contract's template")
    assert "<|endoftext|>" in told


def test_documents_of_another_template_are_told(retriever, make_batch, monkeypatch):
    document = "<|vision_start|><|image_pad|><|vision_end|>other words"
    templates = retriever.contract.templates.model_copy(update={"document": document})
    monkeypatch.setattr(retriever.collator, "prompter", Prompter(retriever.tokenizer, templates))
    (told,) = template_faults(retriever, make_batch(retriever=retriever))
    assert "20 of 20 documents" in told
    assert "other words'" in told
    assert "page'" in told


def test_lost_image_tokens_are_no_fault_of_the_template(retriever, make_batch):
    batch = make_batch()
    kept = batch.documents.token_ids != retriever.collator.prompter.image_token_id
    lengths = [int(each.sum()) for each in kept.split(batch.documents.lengths.tolist())]
    from colfolio.batch import offsets_of

    cut = replace(
        batch.documents,
        token_ids=batch.documents.token_ids[kept],
        position_ids=batch.documents.position_ids[:, kept],
        offsets=offsets_of(lengths),
    )
    assert template_faults(retriever, replace(batch, documents=cut)) == ()


def test_tensors_that_a_second_load_has_otherwise_are_named(retriever, probe):
    def drawn_anew():
        weights = dict(retriever.weights())
        weights["custom_text_proj.weight"] = torch.randn(16, 32)
        del weights["custom_text_proj.bias"]
        return weights

    facts = measure_model(retriever, probe, "fp32", read_again=drawn_anew)
    assert set(facts.fresh) == {"custom_text_proj.weight", "custom_text_proj.bias"}


def test_weights_in_another_dtype_are_the_same(make_retriever, probe):
    narrow, wide = make_retriever(dtype="bfloat16"), make_retriever(dtype="bfloat16").float()
    facts = measure_model(wide, probe, "fp32", read_again=narrow.weights)
    assert facts.fresh == ()


def test_an_adapter_is_measured_and_left_as_it_was(with_adapter, probe):
    retriever = with_adapter()
    before = retriever.fingerprint()
    opened = [parameter.requires_grad for parameter in retriever.parameters()]
    facts = measure_model(retriever, probe, "fp32", has_loaded_adapter=True)
    assert facts.adapter_effect > 0.01
    assert facts.adapter_is_of_base is True
    assert retriever.fingerprint() == before
    assert [parameter.requires_grad for parameter in retriever.parameters()] == opened


def test_the_effect_is_the_relative_difference_to_the_base(with_adapter, make_retriever, probe):
    retriever, base = with_adapter(), make_retriever()
    sides = probe.batch.queries, probe.batch.documents
    with torch.no_grad():
        mine, its = (
            torch.cat([m(side).vectors for side in sides]) for m in (retriever.eval(), base)
        )
    expected = float((mine - its).norm() / its.norm())
    assert adapter_effect(retriever, probe, "fp32") == pytest.approx(expected, rel=1e-4)


def test_an_adapter_without_effect_has_none(with_adapter, probe):
    assert adapter_effect(with_adapter(scale=0.0), probe, "fp32") == 0


def test_an_adapter_on_another_base_is_seen(with_adapter, probe):
    retriever = with_adapter()
    retriever.contract = retriever.contract.model_copy(update={"base_hash": "another"})
    facts = measure_model(retriever, probe, "fp32", has_loaded_adapter=True)
    assert facts.adapter_is_of_base is False


def test_what_trains_and_what_is_frozen_is_counted_by_part(with_adapter, retriever):
    retriever.backbone.visual.requires_grad_(False)
    trains, frozen = open_and_frozen(retriever)
    assert {"layers", "embedding", "norm", "projection"} == set(trains)
    assert {"vision", "merger"} == set(frozen)
    trains, frozen = open_and_frozen(with_adapter())
    assert set(trains) == {"adapters"}
    assert "layers" in frozen


_EVERY = ("vision", "merger", "embedding", "layers", "norm", "projection")


@pytest.mark.parametrize(
    ("changed", "is_trained", "drawn"),
    [
        ({}, False, _EVERY),
        ({"source": Source(name="org/backbone")}, False, ("projection",)),
        ({"recipe": {"train": {}}}, True, ()),
        ({"data": {"shapes train": "…"}}, True, ()),
        ({"source": Source(name="org/retriever"), "recipe": {"train": {}}}, True, ()),
        ({"projection_hash": ""}, True, ()),
    ],
)
def test_what_was_trained_and_what_was_drawn_is_what_the_contract_says(
    retriever, changed, is_trained, drawn
):
    retriever.contract = retriever.contract.model_copy(update=changed)
    assert can_retrieve(retriever) is is_trained
    assert drawn_parts(retriever) == drawn


@pytest.mark.parametrize(
    ("settings", "drawn"),
    [
        ({}, ("vision", "merger", "embedding", "norm")),
        ({"projection": "frozen"}, ("vision", "merger", "embedding", "norm", "projection")),
    ],
)
def test_what_adapters_change_is_not_as_it_was_drawn(with_adapter, settings, drawn):
    assert drawn_parts(with_adapter(**settings)) == drawn


def test_a_row_that_sees_another_is_measured(retriever, probe, monkeypatch):
    forward = type(retriever).forward

    def leaking(self, packed, *rest):
        found = forward(self, packed, *rest)
        return replace(found, vectors=found.vectors + 0.1 * found.vectors.mean(dim=0))

    assert row_difference(retriever, probe, "fp32") < 1e-4
    monkeypatch.setattr(type(retriever), "forward", leaking)
    assert measure_model(retriever, probe, "fp32").row_difference > 1e-3


def test_positions_that_cannot_be_judged_are_not_called_right(retriever, probe, monkeypatch):
    untold = Verdict((), 2, "no grids were told")
    monkeypatch.setattr("colfolio.mrope.guard.judge", lambda *_: untold)
    assert positions_of(retriever, probe)[0] is None


def test_without_a_probe_nothing_is_run(retriever, monkeypatch):
    monkeypatch.setattr(type(retriever), "forward", lambda *_: pytest.fail("was run"))
    facts = measure_model(retriever, None, "fp32", has_loaded_adapter=True)
    assert (facts.positions, facts.template_faults, facts.row_difference) == (None, None, None)
    assert facts.fresh is None
    assert facts.trains


class _Flattened(Qwen2VL):
    """Tokens of a clip lie as those of a text do."""

    def spans(self, kind, frames, height, width, seconds):
        (span,) = super().spans(kind, frames, height, width, seconds)
        return (Span(torch.arange(span.size).expand(3, -1), span.size),)


def test_flattened_positions_of_a_generator_are_named(tiny_shape_of, tmp_path):
    write_moving(tmp_path, "train", 4)
    clips = load_conversations(tmp_path, "train")
    generator = generator_of(tiny_shape_of("colfolio_grafted"))
    assert text_positions(generator, clips)[0] == "right"
    generator.collator.scheme = _Flattened()
    fault, told = text_positions(generator, clips)
    assert fault == "flattened"
    assert "flattened" in told
