import re

import pytest
import torch

from colfolio.errors import RecipeError
from colfolio.models.adapters import add_lora
from colfolio.models.parts import inventory
from colfolio.training import TrainSettings, start_training, train
from colfolio.training.loop import check_epochs
from colfolio.training.optim import OptimiserSettings, learning_rates
from colfolio.training.start import begin_policy, check_settings
from colfolio.training.thaw import ThawStage, stage_groups
from colfolio.training.thaw_schedule import check_schedule, trains_line

STAGE = {"open": ["norm"], "step": 2, "lr": 1e-3}
LORA = {"rank": 2, "dropout": 0.0}


def settings_of(**values):
    return TrainSettings.model_validate({"steps": 20, "precision": "fp32"} | values)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"lr": 0}, "greater than 0"),
        ({"lr": -1e-3}, "greater than 0"),
        ({"step": None}, "one of step, epoch, margin_flat, at_chance, and has none of them"),
        ({"epoch": 1.0}, "has step and epoch"),
        ({"step": -1}, "step"),
        ({"open": []}, "open"),
        ({"open": ["head"]}, "'head' is no selector"),
        ({"open": ["layers[3:1]"]}, "takes no layer"),
        ({"depth_decay": 0}, "depth_decay"),
        ({"depth_decay": 1.5}, "depth_decay"),
        ({"warmup": -1}, "warmup"),
    ],
)
def test_a_stage_that_means_nothing_is_refused(values, told):
    with pytest.raises(ValueError, match=told):
        ThawStage.model_validate(STAGE | values)


@pytest.mark.parametrize(
    ("values", "key", "told"),
    [
        (
            {"frozen": ["norm"], "thaw": [STAGE], "optimiser": {"state": "torchao_8bit"}},
            "optimiser.state",
            "settles what it keeps",
        ),
        (
            {"frozen": ["norm"], "thaw": [STAGE | {"step": 20}]},
            "thaw.0.step",
            "at step 20 at the earliest, and the run ends with 20 steps",
        ),
        (
            {"frozen": ["norm"], "thaw": [STAGE | {"step": 5}, STAGE]},
            "thaw.1.step",
            "step 2 is past .* opens at step 5 at the earliest",
        ),
        (
            {"frozen": ["norm"], "thaw": [STAGE | {"step": None, "epoch": e} for e in (2.0, 1.5)]},
            "thaw.1.epoch",
            "1.5 is past .* epoch 2",
        ),
        (
            {"frozen": ["norm"], "thaw": [STAGE | {"step": None, "margin_flat": 9}]}
            | {"thaw_window": 2},
            "thaw.0.margin_flat",
            "step 20 at the earliest",
        ),
        (
            {"frozen": ["norm"], "thaw": [STAGE, STAGE | {"step": None, "at_chance": 18}]},
            "thaw.1.at_chance",
            "step 20 at the earliest",
        ),
        (
            {
                "objective": "generation",
                "frozen": ["norm"],
                "thaw": [STAGE | {"step": None, "at_chance": 2}],
            },
            "thaw.0.at_chance",
            "signal of retrieval",
        ),
        ({"thaw_window": 7}, "thaw_window", "is 7, and no stage of `thaw` has margin_flat"),
        (
            {"frozen": ["norm"], "thaw": [STAGE], "thaw_window": 7},
            "thaw_window",
            "is 7, and no stage of `thaw` has margin_flat",
        ),
        (
            {"objective": "generation", "lora": LORA},
            "lora.projection",
            "is 'adapter', and the head of a generator",
        ),
    ],
)
def test_stages_that_cannot_open_are_refused_with_their_key(values, key, told):
    with pytest.raises(RecipeError, match=rf"^{key}: .*{told}") as caught:
        check_settings(settings_of(**values))
    assert caught.value.key == key


def test_an_epoch_that_the_run_does_not_reach_is_refused_with_the_data(retriever, shapes):
    stage = STAGE | {"step": None, "epoch": 2.0}
    fits = settings_of(steps=9, batch={"rows": 6}, frozen=["norm"], thaw=[stage])
    check_settings(fits)  # nobody knows yet
    state = start_training(retriever, fits)
    next(train(state, shapes))  # four batches an epoch
    state.settings = fits.model_copy(update={"steps": 8})
    with pytest.raises(RecipeError, match=r"thaw\.0\.epoch: it opens at step 8 .* ends with 8"):
        train(state, shapes)
    halved = fits.model_copy(update={"accumulation": 2})  # two steps an epoch
    check_epochs(halved.model_copy(update={"steps": 5}), shapes)
    with pytest.raises(RecipeError, match=r"thaw\.0\.epoch: it opens at step 4 .* ends with 4"):
        check_epochs(halved.model_copy(update={"steps": 4}), shapes)


def test_a_signal_that_can_still_fire_is_not_refused():
    signal = STAGE | {"step": None, "margin_flat": 8}
    check_schedule([ThawStage.model_validate(signal)], window=2, steps=19)
    with pytest.raises(RecipeError, match="step 18"):
        check_schedule([ThawStage.model_validate(signal)], window=2, steps=18)


@pytest.mark.parametrize(
    ("values", "key", "told"),
    [
        ({"thaw": [STAGE]}, "thaw", "everything trains from the beginning"),
        ({"frozen": ["layers[0:3]"]}, "frozen", r"'layers\[0:3\]'.*This model has vision\[0:2\]"),
        ({"frozen": ["adapters"]}, "frozen", "there are no adapters"),
        (
            {"lora": LORA, "frozen": ["vision"]},
            "frozen",
            "'vision' freezes nothing: beside adapters .* so vision is frozen without it; "
            "leave it out$",
        ),
        (
            {"lora": LORA | {"vision": ["qkv"]}, "frozen": ["adapters", "vision", "merger"]},
            "frozen",
            "'vision' freezes nothing: .* The adapters in it train; `lora.vision` says which",
        ),
        (
            {"lora": LORA, "frozen": ["layers[1]"]},
            "frozen",
            r"'layers\[1\]' freezes nothing: .*`lora.text` says which",
        ),
        (
            {"lora": LORA, "frozen": ["projection"]},
            "frozen",
            "'projection' freezes nothing: .*`lora.projection` says which",
        ),
        ({"frozen": ["all"]}, "frozen", "no parameter .* trains in the first step"),
        (
            {"frozen": ["vision"], "thaw": [STAGE]},
            "thaw.0.open",
            "norm trains by then already",
        ),
        (
            {"frozen": ["norm"], "thaw": [STAGE, STAGE]},
            "thaw.1.open",
            "norm trains by then already",
        ),
        (
            {"frozen": ["vision[1]"], "thaw": [STAGE | {"open": ["vision"]}]},
            "thaw.0.open",
            r"vision\[0\] trains by then already",
        ),
        (
            {"frozen": ["norm"], "thaw": [STAGE, STAGE | {"open": ["all"]}]},
            "thaw.1.open",
            "opens nothing",
        ),
        (
            {"frozen": ["norm"], "thaw": [STAGE | {"open": ["vision[2]"]}]},
            "thaw.0.open",
            r"'vision\[2\]' reaches beyond",
        ),
        (
            {
                "lora": LORA,
                "thaw": [STAGE | {"open": ["all"]}, STAGE | {"open": ["adapters"]}],
            },
            "thaw.1.open",
            "opens nothing: all of it trains by then already, or was merged",
        ),
    ],
)
def test_what_the_model_does_not_have_or_trains_already_is_refused(retriever, values, key, told):
    with pytest.raises(RecipeError, match=rf"^{key}: .*{told}") as caught:
        begin_policy(retriever, settings_of(**values))
    assert caught.value.key == key


def test_adapters_are_not_added_to_a_model_that_has_some(retriever):
    add_lora(retriever, settings_of(lora=LORA).lora, 0)
    with pytest.raises(RecipeError, match=r"^lora: the model has an adapter already, which trains"):
        start_training(retriever, settings_of(lora=LORA))


def test_two_stages_may_open_at_one_step(retriever, shapes):
    stages = [STAGE, {"open": ["merger"], "step": 2, "lr": 2e-3}]
    state = start_training(
        retriever, settings_of(steps=3, batch={"rows": 6}, frozen=["norm", "merger"], thaw=stages)
    )
    opened = [report.opened for report in train(state, shapes)]
    assert opened == [[], [], ["norm", "merger"]]


def plain_rate(lr, opened, warmup, factor, step, settings, steps):
    """The product that the documentation tells."""
    rise = min(1.0, (step - opened + 1) / warmup) if warmup else 1.0
    begun = settings.warmup_steps
    along = max(0, step - begun) / (steps - begun)
    cosine = (1 + torch.cos(torch.tensor(torch.pi * along, dtype=torch.float64)).item()) / 2
    schedule = settings.final_lr_share + (1 - settings.final_lr_share) * cosine
    return lr * factor * rise * schedule


def test_a_stage_rises_by_itself_and_falls_with_the_run(retriever, shapes):
    plan = {"lr": 1e-2, "warmup_steps": 2, "final_lr_share": 0.1}
    stage = {"open": ["layers", "norm"], "step": 3, "lr": 4e-3, "warmup": 3, "depth_decay": 0.5}
    settings = settings_of(
        steps=9, batch={"rows": 6}, optimiser=plan, frozen=["layers", "norm"], thaw=[stage]
    )
    state = start_training(retriever, settings)
    optimiser = OptimiserSettings.model_validate(plan)
    for report in train(state, shapes):
        step = report.step - 1
        expected = {"first": plain_rate(1e-2, 0, 2, 1.0, step, optimiser, 9)}
        if step >= 3:
            for part, factor in (("layers[0]", 0.25), ("layers[1]", 0.5), ("norm", 1.0)):
                expected[part] = plain_rate(4e-3, 3, 3, factor, step, optimiser, 9)
        found = {
            "first" if group["opened"] == 0 else group["part"]: float(group["lr"])
            for group in state.optimiser.param_groups
        }
        assert found == pytest.approx(expected, rel=1e-12)
        assert report.lr == max(found.values())
        if step >= 3:
            assert report.parts["norm"].lr == pytest.approx(expected["norm"])
            layers = report.parts["layers"]
            rates = [expected["layers[0]"], expected["layers[1]"]]
            assert [layers.lr_least, layers.lr] == pytest.approx(rates)
    assert learning_rates(state.optimiser, 9, 9, optimiser)[0] == pytest.approx(1e-3)


def test_each_parameter_of_a_stage_is_in_one_group_of_its_depth(retriever):
    found = inventory(retriever)
    stage = ThawStage.model_validate(STAGE | {"open": ["all"], "depth_decay": 0.7})
    names = frozenset(found.places)
    groups = stage_groups(retriever, names, stage, 5, OptimiserSettings())
    assert sorted(name for group in groups for name in group.names) == sorted(names)
    top = max(place.depth for place in found.places.values())
    for group in groups:
        for name in group.names:
            assert group.depth_factor == 0.7 ** (top - found.places[name].depth)
            is_matrix = retriever.get_parameter(name).ndim >= 2 and "embed_tokens" not in name
            assert (group.weight_decay > 0) == is_matrix
        assert (group.opened, group.base_lr) == (5, 1e-3)


@pytest.mark.parametrize(("lr", "falls"), [(1e-3, False), (1e-3 * 0.7**3, True)])
def test_a_stage_begins_at_its_own_rate_however_low_it_opens(retriever, shapes, lr, falls):
    """With the `lr` of the stage before it layer 0 gets more than layer 1, two layers above it."""
    upper = {"open": ["layers[1]", "norm"], "step": 1, "lr": 1e-3, "depth_decay": 0.7}
    lower = {"open": ["embedding", "layers[0]"], "step": 2, "lr": lr, "depth_decay": 0.7}
    settings = settings_of(
        steps=3,
        batch={"rows": 6},
        frozen=["embedding", "layers", "norm"],
        thaw=[upper, lower],
        optimiser={"warmup_steps": 0, "final_lr_share": 1.0},
    )
    state = start_training(retriever, settings)
    assert len(list(train(state, shapes))) == 3
    rates_of = {group["part"]: float(group["lr"]) for group in state.optimiser.param_groups}
    rates = [rates_of[part] for part in ("embedding", "layers[0]", "layers[1]", "norm")]
    expected = [0.7 * lr, lr, 0.7e-3, 1e-3]
    assert rates == pytest.approx(expected)
    assert (rates == sorted(rates)) == falls


def test_the_ledger_line_tells_what_trains_now_and_later(retriever):
    stages = [
        STAGE | {"open": ["layers[1]"], "step": 300},
        STAGE | {"open": ["merger"], "step": None, "epoch": 1.5},
        STAGE | {"open": ["vision"], "step": None, "margin_flat": 3},
        STAGE | {"open": ["all"], "step": None, "at_chance": 20},
    ]
    settings = settings_of(steps=900, lora=LORA, thaw=stages)
    begin_policy(retriever, settings)
    line = trains_line(retriever, settings)
    assert line == (
        "adapters (1.95 k of 57.3 k, 3.41 %); at step 300 also layers[1], adapters merged; from "
        "epoch 1.5 on also merger; once the margin is flat for 3 windows of 50 steps also vision; "
        "once the loss is at chance for 20 steps also embedding, layers[0], norm, projection, "
        "adapters merged"
    )


def test_frozen_takes_what_would_train_and_nothing_else(retriever):
    settings = settings_of(lora=LORA | {"projection": "full"}, frozen=["projection"])
    begin_policy(retriever, settings)
    assert trains_line(retriever, settings).startswith("adapters (")


def test_a_model_that_came_with_an_adapter_trains_that_and_says_so(retriever):
    """Also that a stage may open its base, and that nothing of it is frozen twice."""
    add_lora(retriever, settings_of(lora=LORA | {"projection": "full"}).lora, 0)
    stage = STAGE | {"open": ["layers[1]"]}
    settings = settings_of(thaw=[stage])
    groups = begin_policy(retriever, settings)
    trained = {name for group in groups for name in group.names}
    assert trained == inventory(retriever).select(["projection", "adapters"])
    assert re.fullmatch(
        r"projection, adapters \(.* %\), for the model came with an adapter, and the weights of "
        r"its base are frozen; at step 2 also layers\[1\], adapters merged",
        trains_line(retriever, settings),
    )
    with pytest.raises(RecipeError, match=r"^frozen: 'vision' freezes nothing.* leave it out$"):
        begin_policy(retriever, settings_of(frozen=["vision"]))


def test_a_model_without_weights_tells_the_same(retriever, make_retriever):
    settings = settings_of(lora=LORA, thaw=[STAGE | {"open": ["layers[1]"]}])
    outline = make_retriever().to("meta")
    assert begin_policy(outline, settings) == begin_policy(retriever, settings)
    assert trains_line(outline, settings) == trains_line(retriever, settings)
