import math

import pytest
import torch
from torch import nn

from colfolio.models.adapters import LoraSettings, add_lora
from colfolio.models.parts import inventory
from colfolio.training import part_norms, start_training, train
from colfolio.training.part_norms import PartNorms, trained_parts

ONE = torch.ones(())


def plain_norm(tensors):
    return math.sqrt(sum(tensor.double().square().sum().item() for tensor in tensors))


@pytest.fixture
def watched(make_retriever, shapes, settings, monkeypatch):
    """Trains, noting the weights before each step and the gradients that arrive at it."""

    def watched(change=lambda _: None, **changed):
        retriever = make_retriever()
        change(retriever)
        state = start_training(retriever, settings.model_copy(update=changed))
        seen = []

        def note(self, scale):
            named = [(n, p) for n, p in state.retriever.named_parameters() if p.requires_grad]
            weights = {name: p.detach().clone() for name, p in named}
            gradients = {name: p.grad / scale for name, p in named if p.grad is not None}
            seen.append((weights, gradients))
            return before_step(self, scale)

        before_step = PartNorms.before_step
        monkeypatch.setattr(PartNorms, "before_step", note)
        reports = []
        for report in train(state, shapes):
            after = {name: p.detach().clone() for name, p in state.retriever.named_parameters()}
            reports.append((report, *seen.pop(), after))
        return state, reports

    return watched


def check_reports(state, reports):
    places = inventory(state.retriever).places
    for report, weights, gradients, after in reports:
        for part, numbers in report.parts.items():
            names = [name for name in weights if places[name].part == part]
            assert numbers.trains == sum(weights[name].numel() for name in names)
            mine = [gradients[name] for name in names if name in gradients]
            assert numbers.gradient_norm == pytest.approx(plain_norm(mine), rel=1e-5)
            change = plain_norm([after[name] - weights[name] for name in names])
            ratio = change / plain_norm([weights[name] for name in names])
            assert numbers.update_ratio == pytest.approx(ratio, rel=1e-5)
            assert numbers.lr == numbers.lr_least == report.lr
            alive = sum(int(gradient.count_nonzero()) for gradient in mine)
            assert numbers.dead == pytest.approx(1 - alive / numbers.trains, abs=1e-6)


def test_a_report_has_gradient_norm_update_ratio_and_rate_of_each_part(watched):
    state, reports = watched()
    check_reports(state, reports)
    parts = ["vision", "merger", "embedding", "layers", "norm", "projection"]
    assert [list(report.parts) for report, *_ in reports] == [parts] * 6
    for report, *_ in reports:
        together = math.sqrt(sum(part.gradient_norm**2 for part in report.parts.values()))
        assert together == pytest.approx(report.gradient_norm, rel=1e-5)


@pytest.mark.parametrize("changed", [{"precision": "bf16"}, {"precision": "fp16"}])
def test_half_precision_reports_the_gradients_as_they_are_without_their_scale(watched, changed):
    state, reports = watched(**changed)
    taken = [each for each in reports if not each[0].skipped]
    assert len(taken) >= 3
    check_reports(state, taken)


def test_a_frozen_part_is_not_reported(watched):
    state, reports = watched(lambda retriever: retriever.backbone.visual.requires_grad_(False))
    check_reports(state, reports)
    assert list(reports[0][0].parts) == ["embedding", "layers", "norm", "projection"]


def test_adapters_are_a_part_of_their_own(watched):
    pytest.importorskip("peft")
    state, reports = watched(lambda retriever: add_lora(retriever, LoraSettings(), seed=0))
    check_reports(state, reports)
    assert "adapters" in reports[0][0].parts
    assert "layers" not in reports[0][0].parts


def test_a_step_that_is_skipped_changes_nothing(make_retriever, shapes, settings, monkeypatch):
    state = start_training(make_retriever(), settings.model_copy(update={"precision": "fp16"}))
    backward = state.exact.backward

    def overflow(*arguments):
        summary = backward(*arguments)
        state.retriever.projection.weight.grad[0, 0] = float("inf")
        return summary

    monkeypatch.setattr(state.exact, "backward", overflow)
    report = next(train(state, shapes))
    assert report.skipped
    assert {part.update_ratio for part in report.parts.values()} == {0.0}
    assert report.parts["projection"].gradient_norm == math.inf
    assert math.isfinite(report.parts["vision"].gradient_norm)


def test_measuring_never_changes_a_weight(trained, settings, monkeypatch):
    measured, _ = trained(settings)
    nothing = torch.zeros(0, 3)
    monkeypatch.setattr(PartNorms, "before_step", lambda *_: None)
    monkeypatch.setattr(PartNorms, "after_step", lambda *_: nothing)
    monkeypatch.setattr(PartNorms, "reports", lambda *_: {})
    assert trained(settings)[0].retriever.fingerprint() == measured.retriever.fingerprint()


def test_of_a_large_part_a_sample_says_the_ratio_of_all(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    weights = [
        nn.Parameter(torch.randn(size, 96, generator=generator) * scale)
        for size, scale in ((700, 0.1), (300, 2.0))
    ]
    change = [torch.randn(weight.shape, generator=generator) * 1e-3 for weight in weights]
    expected = plain_norm(change) / plain_norm([weight.detach() for weight in weights])
    found = []
    for most in (2**20, 8000):
        monkeypatch.setattr(part_norms, "_MOST_SAMPLED", most)
        stepped = [nn.Parameter(weight.detach().clone()) for weight in weights]
        parts = PartNorms({"layers": stepped})
        before = parts.before_step(ONE)
        assert sum(map(len, before.weights)) <= min(most, 96_000)
        for weight, step in zip(stepped, change, strict=True):
            weight.data.add_(step)
        found.append(parts.after_step(before)[0, 1].item())
    assert found[0] == pytest.approx(expected, rel=1e-3)
    assert found[0] != found[1]
    assert found[1] == pytest.approx(expected, rel=0.05)


def test_a_part_without_gradients_or_of_zeros_has_numbers_all_the_same():
    parts = PartNorms({"projection": [nn.Parameter(torch.zeros(3, 2))]})
    assert parts.after_step(parts.before_step(ONE)).tolist() == [[0.0, 0.0, 1.0]]


def test_the_dead_share_counts_what_has_no_gradient_also_in_a_sample(monkeypatch):
    weights = [nn.Parameter(torch.ones(400, 10)) for _ in range(2)]
    weights[0].grad = torch.ones(400, 10)
    weights[0].grad[:100] = 0
    for most in (2**20, 1000):
        monkeypatch.setattr(part_norms, "_MOST_SAMPLED", most)
        parts = PartNorms({"layers": weights})
        dead = parts.after_step(parts.before_step(ONE))[0, 2].item()
        assert dead == pytest.approx((1000 + 4000) / 8000, abs=0.01)


def test_a_part_has_the_highest_rate_of_its_parameters():
    low, high = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimiser = torch.optim.AdamW(
        [{"params": [low], "lr": 0.1}, {"params": [high], "lr": torch.tensor(0.5)}]
    )
    (report,) = PartNorms({"layers": [low, high]}).reports([1.0, 2.0, 0.25], optimiser).values()
    assert (report.lr, report.gradient_norm, report.update_ratio, report.trains) == (0.5, 1, 2, 5)
    assert report.dead == 0.25


def test_parts_follow_what_trains_now(retriever):
    assert "vision" in trained_parts(retriever)
    retriever.requires_grad_(False)
    retriever.projection.requires_grad_(True)
    (parts,) = trained_parts(retriever).items()
    assert (parts[0], len(parts[1])) == ("projection", 2)
