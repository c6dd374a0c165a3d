"""Each check passes on a sound run, fails where its fault is planted, and leaves no trace."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from colfolio.batch import MultiVectors
from colfolio.data import collate, sampler
from colfolio.data.collate import Collator
from colfolio.data.dataset import CorpusRow, Query, load_dataset, write_split
from colfolio.data.picks import BatchSettings, Picker
from colfolio.data.prompts import Prompter
from colfolio.data.relations import Relations
from colfolio.diagnosis.evidence import DataFacts, Settled
from colfolio.diagnosis.ledgers.ledger import make_ledger
from colfolio.diagnosis.preflight import check_first, check_run, score_checks
from colfolio.diagnosis.preflight import data_checks as data
from colfolio.diagnosis.preflight import equality_checks as equality
from colfolio.diagnosis.preflight import input_checks as inputs
from colfolio.diagnosis.preflight import learning_checks as learning
from colfolio.diagnosis.preflight import start_checks as start
from colfolio.diagnosis.preflight import vector_checks as vectors
from colfolio.diagnosis.preflight.check import Check, run_checks
from colfolio.diagnosis.preflight.steps import Descent
from colfolio.diagnosis.preflight.trial import make_trial
from colfolio.diagnosis.run_evidence import settled_of
from colfolio.diagnosis.signals import measure_data, probe
from colfolio.errors import DatasetError
from colfolio.models import Retriever, projected
from colfolio.models.adapters import LoraSettings, add_lora, save_adapter
from colfolio.training import TrainSettings, start_training
from colfolio.training.exact_batch import ExactBatch

SETTINGS = {
    "steps": 6,
    "seed": 3,
    "batch": {"rows": 8},
    "optimiser": {"lr": 1e-2, "warmup_steps": 2},
    "precision": "fp32",
}
SETTLED = Settled("info_nce", rows=12)


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory, write_shapes):
    folder = tmp_path_factory.mktemp("shapes") / "shapes"
    write_shapes(folder, {"train": 24, "validation": 12})
    return folder


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory, shared_retriever):
    folder = tmp_path_factory.mktemp("base") / "base"
    shared_retriever.save_pretrained(folder)
    return folder


@pytest.fixture
def begin(base_folder):
    """The state of a run of the base, with some settings other than usual."""

    def begin(**changed):
        settings = TrainSettings.model_validate(SETTINGS | changed)
        return start_training(Retriever.from_pretrained(base_folder), settings)

    return begin


@pytest.fixture
def checks_of(shapes_folder, base_folder):
    """All checks of a run by name."""

    def checks_of(state, folder=shapes_folder):
        dataset, held_out = (load_dataset(folder, split) for split in ("train", "validation"))
        lengths = state.retriever.collator.query_lengths

        def count():
            return make_ledger(dataset, state.settings, 1, lengths)

        checks = check_run(state, dataset, held_out, count, str(base_folder))
        return {check.name: check for check in checks}

    return checks_of


@pytest.fixture
def trial_of(shapes_folder):
    """What the checks of a run are made on."""
    return lambda state, folder=shapes_folder: make_trial(state, load_dataset(folder, "train"))


@pytest.fixture
def count_of(shapes_folder):
    """Makes the ledger of a run."""

    def count_of(state):
        dataset = load_dataset(shapes_folder, "train")
        lengths = state.retriever.collator.query_lengths
        return lambda: make_ledger(dataset, state.settings, 1, lengths)

    return count_of


@pytest.fixture
def start_of(trial_of, count_of):
    """The check of a run's first loss."""
    return lambda state: start.start_of_loss(trial_of(state), count_of(state))


def everything_of(state):
    """All that a check could leave a trace in."""
    named = {name: tensor.clone() for name, tensor in state.model.state_dict().items()}
    modes = [module.training for module in state.model.modules()]
    generators = torch.get_rng_state(), np.random.get_state()[1].tolist()
    gradients = [parameter.grad for parameter in state.model.parameters()]
    others = state.retriever.contract, len(state.optimiser.state), state.step, state.position
    return named, modes, generators, gradients, others


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"precision": "bf16"},
        {"frozen": ["vision", "merger"]},
        {"lora": {"rank": 8, "projection": "full"}},
        {"loss": {"kind": "pairwise"}},
        {"gradient_checkpointing": "all", "memory": {"chunk_tokens": 16}},
    ],
    ids=["whole", "bf16", "frozen", "lora", "pairwise", "checkpointed"],
)
def test_a_sound_run_passes_every_check_with_a_number(changed, begin, checks_of):
    checks = checks_of(begin(**changed))
    assert [check for check in checks.values() if not check.passed] == []
    for check in checks.values():
        assert any(letter.isdigit() for letter in check.told), check
        assert check.seconds > 0


@pytest.mark.parametrize("changed", [{}, {"lora": {"rank": 2}}])
def test_checks_leave_no_trace_in_the_state(changed, begin, checks_of):
    state = begin(**changed)
    torch.manual_seed(5)
    before = everything_of(state)
    checks_of(state)
    after = everything_of(state)
    assert before[0].keys() == after[0].keys()
    for name, tensor in before[0].items():
        assert torch.equal(tensor, after[0][name]), name
    assert torch.equal(before[2][0], after[2][0])
    assert (before[1], before[2][1], before[3:]) == (after[1], after[2][1], after[3:])


def test_the_first_checks_are_some_of_all(begin, checks_of, shapes_folder, base_folder):
    state = begin()
    dataset = load_dataset(shapes_folder, "train")
    ledger = make_ledger(dataset, state.settings, 1, state.retriever.collator.query_lengths)
    first = [check.name for check in check_first(state, dataset, ledger, str(base_folder))]
    assert first == list(checks_of(state))[: len(first)]
    assert {inputs.POSITIONS, inputs.TEMPLATES, learning.GRADIENT} <= set(first)


def assert_fails(check, cause):
    assert (check.passed, check.cause) == (False, cause), check


def test_an_unknown_query_template_is_found(begin, trial_of, monkeypatch):
    own = Prompter.query_ids
    monkeypatch.setattr(
        Prompter, "query_ids", lambda self, queries: [ids[:-1] for ids in own(self, queries)]
    )
    trial = trial_of(begin())
    assert_fails(inputs.templates(trial.retriever, trial.rows), "wrong_template")


def test_flattened_positions_are_found(begin, trial_of, monkeypatch):
    own = Collator.documents

    def flat(self, documents, behind=None):
        packed = own(self, documents, behind)
        ranges = [torch.arange(int(length)) for length in packed.lengths]
        packed.position_ids.copy_(torch.cat(ranges).expand(3, -1))
        return packed

    monkeypatch.setattr(Collator, "documents", flat)
    trial = trial_of(begin())
    assert_fails(inputs.positions(trial.retriever, trial.rows), "positions_flattened")


def test_image_tokens_that_are_cut_off_are_found(begin, trial_of):
    trial = trial_of(begin())
    documents = trial.rows.documents
    token_ids = documents.token_ids.clone()
    image = trial.retriever.collator.prompter.image_token_id
    token_ids[(token_ids == image).nonzero()[0]] = 0
    cut = replace(trial.rows, documents=replace(documents, token_ids=token_ids))
    assert_fails(inputs.token_counts(trial.retriever, cut), "truncated_images")


def test_weights_that_a_load_draws_are_found(begin, base_folder):
    state = begin()
    with torch.no_grad():
        state.retriever.projection.weight.normal_()
    check = inputs.weights_of_files(state.retriever, str(base_folder))
    assert_fails(check, "fresh_tensors")
    assert "custom_text_proj.weight" in check.told


def test_too_few_candidates_are_found(begin, shapes_folder):
    state = begin(batch={"rows": 8, "candidates": 9})
    dataset, lengths = load_dataset(shapes_folder, "train"), state.retriever.collator.query_lengths
    check = data.candidates(
        lambda: make_ledger(dataset, state.settings, 1, lengths), state.settings
    )
    assert_fails(check, "few_candidates")


def test_labels_beside_their_documents_are_found(begin, trial_of, monkeypatch):
    own = Relations.masks

    def shifted(self, queries, rows, look_same=None):
        positives, ignored = own(self, queries, rows, look_same)
        return positives.roll(1, dims=1), ignored

    monkeypatch.setattr(Relations, "masks", shifted)
    assert_fails(data.answers(trial_of(begin())), "shifted_labels")


@pytest.fixture
def facts_of(tmp_path, encode_png, random_image):
    """The facts of a data set of pictures with these numbers, some of them more than once.

    None is a page of one colour.
    """

    def write(split, pictures):
        rows, queries, qrels = [], [], {}
        for place, picture in enumerate(pictures):
            name = f"{split}-{place}"
            pixels = random_image(56, 56, seed=picture or 0)
            image = encode_png(pixels if picture is not None else 0 * pixels)
            rows.append(CorpusRow(name, image, name))
            queries.append(Query(name, f"what is {name}"))
            qrels[name] = {name: 1}
        write_split(tmp_path / "set", split, rows, queries, qrels)
        return load_dataset(tmp_path / "set", split)

    def facts_of(retriever, training, held_out):
        dataset, validation = write("train", training), write("validation", held_out)
        settings = BatchSettings(rows=12, ignore_copies="none")
        picker = Picker(dataset, settings, 0)
        facts = measure_data(dataset, retriever.collator, settings, picker, None, validation)
        return lambda: facts

    return facts_of


def test_copies_of_answers_among_the_negatives_are_found(shared_retriever, facts_of):
    facts = facts_of(shared_retriever, [n // 3 for n in range(24)], range(40, 52))
    assert_fails(data.no_false_negatives(facts, SETTLED), "false_negatives")
    assert data.splits_apart(facts, SETTLED).passed


def test_images_of_two_splits_are_found(shared_retriever, facts_of):
    facts = facts_of(shared_retriever, range(24), range(20, 32))
    assert_fails(data.splits_apart(facts, SETTLED), "leaked_split")
    assert data.no_false_negatives(facts, SETTLED).passed


def test_scores_too_far_apart_for_their_temperature_are_found(begin, start_of):
    check = start_of(begin(loss={"temperature": 0.01}))
    assert_fails(check, "temperature_too_low")
    assert "train.loss.temperature" in check.told


@pytest.fixture
def trained(begin):
    """A run's state whose contract says that its weights were trained before."""

    def trained(**changed):
        state = begin(**changed)
        told = {"recipe": {"train": {}}}
        state.retriever.contract = state.retriever.contract.model_copy(update=told)
        return state

    return trained


def test_trained_weights_that_know_nothing_are_found(trained, start_of):
    assert not start_of(trained()).passed


def test_trained_weights_that_rank_well_pass_whatever_their_loss(trained, start_of, monkeypatch):
    def half_right(trial, precision=None):
        scores = trial.batch.positives.float()
        scores[::2] = 0.9 * scores[::2].roll(1, dims=1) + 0.8 * scores[::2]
        return scores

    monkeypatch.setattr(start, "scores_of", half_right)
    check = start_of(trained(loss={"temperature": 0.02}))
    loss, chance = numbers_of(check)
    assert loss > chance
    assert check.passed


def numbers_of(check):
    """Loss and chance as a line tells them."""
    words = check.told.split()
    return float(words[0]), float(words[3])


def test_with_the_bias_that_is_named_the_loss_of_the_sigmoid_is_least(begin, start_of):
    check = start_of(begin(loss={"kind": "sigmoid"}))
    assert check.passed
    bias = float(check.told.split("bias ")[1].split(",")[0])
    losses = [
        numbers_of(start_of(begin(loss={"kind": "sigmoid", "bias": bias + step})))[0]
        for step in (-1.0, 0.0, 1.0)
    ]
    assert losses[1] < min(losses[0], losses[2])
    assert losses[1] < 0.5 * numbers_of(check)[0]


@pytest.mark.parametrize(
    ("temperature", "cause"),
    [(1.0, ""), (40.0, "temperature_floor"), (1e3, "temperature_too_high")],
)
def test_a_temperature_that_leaves_no_room_is_found(temperature, cause, begin, count_of):
    check = start.floor_of_loss(count_of(begin(loss={"temperature": temperature})))
    assert (check.passed, check.cause) == (not cause, cause), check


def enough(state, count_of, queries, is_trained=False):
    facts = DataFacts(queries, queries)
    settled = settled_of(state.settings)
    return data.enough_candidates(count_of(state), lambda: facts, settled, is_trained=is_trained)


def test_few_candidates_pass_with_a_remark_where_weights_can_retrieve(begin, count_of):
    check = enough(begin(batch={"rows": 4}), count_of, queries=24, is_trained=True)
    assert check.passed
    assert "which are few; weights that were trained before" in check.told


def test_few_candidates_pass_where_there_are_no_more_queries(begin, count_of):
    check = enough(begin(batch={"rows": 4}), count_of, queries=4)
    assert check.passed
    assert "the data has 4 queries in all" in check.told


@pytest.mark.parametrize("accumulation", [1, 4])
def test_candidates_that_are_few_are_found_with_the_setting(accumulation, begin, count_of):
    state = begin(batch={"rows": 2}, accumulation=accumulation)
    check = enough(state, count_of, queries=24)
    assert_fails(check, "few_candidates")
    assert "train.batch.rows=24" in check.told
    assert ("4 accumulated batches of 2 rows" in check.told) == (accumulation > 1)


def test_a_run_whose_batches_teach_nothing_is_told_what_training_would_tell(begin, trial_of):
    with pytest.raises(DatasetError, match="teaches nothing"):
        trial_of(begin(batch={"rows": 1}))


def test_an_order_that_never_changes_is_found(shared_retriever, facts_of, monkeypatch):
    monkeypatch.setattr(sampler, "_epoch_order", lambda weights, *_: np.arange(len(weights)))
    facts = facts_of(shared_retriever, range(96), range(100, 112))
    assert_fails(data.drawn_anew(facts, SETTLED), "fixed_order")
    assert data.pages_show_something(facts, SETTLED).passed


def test_pages_that_show_nothing_are_found(shared_retriever, facts_of):
    facts = facts_of(shared_retriever, [*range(12), *[None] * 12], range(40, 52))
    assert_fails(data.pages_show_something(facts, SETTLED), "blank_documents")


@pytest.mark.parametrize(("place", "is_wrong"), [(0.5, True), (0.3, False)])
def test_labels_that_trained_weights_contradict_are_named(
    place, is_wrong, trained, trial_of, monkeypatch
):
    state, trial = trained(), trial_of(trained())
    picker = Picker(trial.dataset, state.settings.batch, 0)
    settled = settled_of(state.settings)
    monkeypatch.setattr(score_checks, "can_retrieve", lambda _: True)
    own = score_checks.Probe.measure

    def contradicting(self, *given):
        found = own(self, *given)
        rank = place * found.documents
        return replace(found, loss=9.0, accuracy=0.0, confident=0.5, rank=rank)

    assert score_checks.first_scores(trial, lambda: picker, settled).passed
    monkeypatch.setattr(score_checks.Probe, "measure", contradicting)
    check = score_checks.first_scores(trial, lambda: picker, settled)
    assert (check.cause == "wrong_labels", check.passed) == (is_wrong, not is_wrong), check


def test_images_that_are_not_seen_are_named(begin, trial_of, monkeypatch):
    own = collate.to_patches
    monkeypatch.setattr(collate, "to_patches", lambda *given: (own(*given)[0] * 0, own(*given)[1]))
    state = begin()
    picker = Picker(trial_of(state).dataset, state.settings.batch, 0)
    check = score_checks.first_scores(trial_of(state), lambda: picker, settled_of(state.settings))
    assert_fails(check, "images_unseen")


def test_a_loaded_adapter_has_a_line_and_fresh_ones_have_none(
    begin, checks_of, base_folder, tmp_path
):
    assert vectors.ADAPTER not in checks_of(begin(lora={"rank": 2}))
    adapted = Retriever.from_pretrained(base_folder)
    add_lora(adapted, LoraSettings(rank=2), 0)
    save_adapter(adapted, tmp_path / "adapter", str(base_folder))
    settings = TrainSettings.model_validate(SETTINGS)
    state = start_training(Retriever.from_pretrained(tmp_path / "adapter"), settings)
    assert_fails(checks_of(state)[vectors.ADAPTER], "adapter_not_loaded")  # B is zero


def test_a_part_that_no_gradient_reaches_is_found(begin, trial_of, monkeypatch):
    own = projected.run_vision
    monkeypatch.setattr(projected, "run_vision", lambda *given: own(*given).detach())
    check = learning.reach_of_gradient(trial_of(begin()))
    assert_fails(check, "dead_part")
    assert "vision" in check.told


def test_an_adapter_is_reached_though_one_of_its_matrices_is_zero(begin, trial_of):
    check = learning.reach_of_gradient(trial_of(begin(lora={"rank": 2})))
    assert check.passed
    alive, _, rest = check.told.partition(" of ")
    assert int(alive) < int(rest.split()[0])


def test_a_frozen_weight_that_changes_is_found(begin, trial_of):
    state = begin(frozen=["vision"])
    weight = next(state.retriever.backbone.visual.parameters())

    def change(*_):
        with torch.no_grad():
            weight.add_(1e-3)

    state.retriever.projection.register_full_backward_hook(change)
    assert_fails(learning.frozen_weights(trial_of(state)), "frozen_parts")


def test_a_rate_below_what_weights_can_hold_is_found(begin, trial_of):
    settings = {"lr": 1e-12, "weight_decay": 0.0}
    assert_fails(learning.frozen_weights(trial_of(begin(optimiser=settings))), "rate_too_low")


def test_a_pairwise_loss_that_makes_all_scores_equal_has_collapsed(begin, trial_of):
    trial = trial_of(begin(loss={"kind": "pairwise"}))
    left, way = Descent(0.0, 0.0, 1e-3, ""), Descent(0.3, 0.0, 1.0, "")
    assert learning._why_not_learnt(trial, left, left, way)[0] == "collapsed"
    other = trial_of(begin())
    assert learning._why_not_learnt(other, left, left, left)[0] == "collapsed"
    assert learning._why_not_learnt(other, left, left, way)[0] == "rate_too_high"
    assert learning._why_not_learnt(other, way, way, way)[0] == "not_started"


@pytest.mark.parametrize("lr", [1e-7, 1e3])
def test_a_rate_at_which_nothing_is_learnt_is_found(lr, begin, trial_of):
    check = learning.one_batch_by_heart(trial_of(begin(optimiser={"lr": lr})))
    assert_fails(check, "rate_too_low" if lr < 1 else "rate_too_high")
    told = float(check.told.split("train.optimiser.lr=")[1])
    assert told > 100 * lr if lr < 1 else told < 1e-2 * lr


def test_a_batch_that_another_rate_learns_passes_and_says_so(begin, trial_of):
    check = learning.one_batch_by_heart(trial_of(begin(optimiser={"lr": 1e-5})))
    assert check.passed
    assert "10 x the recipe's rate; at its own" in check.told


def test_rows_that_reach_one_another_are_found(begin, trial_of, monkeypatch):
    own = Retriever.forward

    def mixed(self, packed, below=None):
        vectors = own(self, packed, below)
        mean = vectors.vectors.mean(dim=0, keepdim=True)
        return MultiVectors(nn.functional.normalize(vectors.vectors + mean, dim=1), vectors.offsets)

    trial = trial_of(begin())
    monkeypatch.setattr(Retriever, "forward", mixed)
    assert_fails(equality.rows_alone(trial), "padding_side")
    assert not equality.chunks_alike(trial).passed


def test_a_cached_gradient_that_is_scaled_is_found(begin, trial_of, monkeypatch):
    own = ExactBatch._second_pass
    monkeypatch.setattr(
        ExactBatch, "_second_pass", lambda self, chunk, gradient: own(self, chunk, 2 * gradient)
    )
    assert not equality.chunks_alike(trial_of(begin())).passed


def test_chunks_are_run_twice_where_they_are_compared(begin, trial_of, monkeypatch):
    own, kept = ExactBatch._second_pass, []

    def counted(self, chunk, gradient):
        kept.append(chunk.is_kept)
        own(self, chunk, gradient)

    monkeypatch.setattr(ExactBatch, "_second_pass", counted)
    assert equality.chunks_alike(trial_of(begin())).passed
    assert kept.count(False) > len(kept) // 2


def test_a_save_that_loses_what_was_trained_is_found(begin, trial_of, base_folder, monkeypatch):
    own, trial = Retriever.from_pretrained, trial_of(begin())
    monkeypatch.setattr(
        Retriever, "from_pretrained", lambda *_, **given: own(base_folder, dtype=given["dtype"])
    )
    assert_fails(equality.saved_and_loaded(trial, str(base_folder)), "fresh_tensors")


def test_scores_that_half_precision_rounds_away_are_found(begin, trial_of, monkeypatch):
    own, trial = Retriever.forward, trial_of(begin(precision="bf16"))

    def rounded(self, packed, below=None):
        vectors = own(self, packed, below)
        if not torch.is_autocast_enabled("cpu"):
            return vectors
        coarse = vectors.vectors + 0.5 * torch.sin(1e4 * vectors.vectors)
        return MultiVectors(coarse, vectors.offsets)

    assert equality.half_precision(trial).passed
    monkeypatch.setattr(Retriever, "forward", rounded)
    assert_fails(equality.half_precision(trial), "rounded_scores")


def test_negatives_that_change_places_are_no_fault_of_half_precision(begin, trial_of, monkeypatch):
    trial, generator = trial_of(begin(precision="bf16")), torch.Generator().manual_seed(0)
    wide = torch.randn(trial.batch.positives.shape, generator=generator) * 1e-3
    narrow = torch.randn(wide.shape, generator=generator) * 1e-3
    ahead = trial.batch.positives * 1.0
    monkeypatch.setattr(equality, "_both_precisions", lambda *_: (wide + ahead, narrow + ahead))
    assert equality.rank_correlation(wide + ahead, narrow + ahead) < 0.8
    assert equality.half_precision(trial).passed
    monkeypatch.setattr(equality, "_both_precisions", lambda *_: (wide + ahead, wide - ahead))
    assert_fails(equality.half_precision(trial), "rounded_scores")


def test_scores_that_maxsim_rounds_to_bf16_are_found(begin, trial_of, monkeypatch):
    own, state = probe.maxsim, begin(precision="bf16")
    trial = trial_of(state)
    picker = Picker(trial.dataset, state.settings.batch, 0)

    def rounded(*given):  # as scores of more tokens are, which are larger
        return (own(*given) + 32).bfloat16().float() - 32

    monkeypatch.setattr(probe, "maxsim", rounded)
    check = score_checks.first_scores(trial, lambda: picker, settled_of(state.settings))
    assert_fails(check, "rounded_scores")


def test_a_check_that_ends_in_an_error_has_failed():
    def diverge():
        raise FloatingPointError("it diverged")

    (check,) = run_checks({"loss": diverge})
    assert (check.name, check.passed, check.told) == ("loss", False, "it diverged")


def test_a_mistake_in_a_check_fails_its_line_and_the_next_is_asked():
    def mistaken():
        raise ValueError("a rule that nobody thought of")

    asked = {"first": mistaken, "second": lambda: Check("second", True, "1")}
    assert [(check.name, check.passed) for check in run_checks(asked)] == [
        ("first", False),
        ("second", True),
    ]


def test_no_gradient_at_all_is_no_difference_between_chunks(begin, trial_of, monkeypatch):
    own = Retriever.forward

    def cut_off(self, packed, below=None):
        made = own(self, packed, below)
        return MultiVectors(made.vectors + 0 * made.vectors.detach(), made.offsets)

    trial = trial_of(begin())
    monkeypatch.setattr(Retriever, "forward", cut_off)
    with torch.no_grad():
        trial.retriever.projection.weight.zero_()
    check = equality.chunks_alike(trial)
    assert (check.passed, "nan" in check.told) == (True, False), check


def test_rank_correlation_is_one_for_the_same_order_and_minus_one_for_the_other():
    scores = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    assert equality.rank_correlation(scores, scores**3) == pytest.approx(1)
    assert equality.rank_correlation(scores, -scores) == pytest.approx(-1)
