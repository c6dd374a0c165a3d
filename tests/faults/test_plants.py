"""The plants do what they say: each fault is there, by other means than a diagnosis."""

from itertools import islice

import pytest
import torch
from faults import breakage
from faults.ground import COUNTED, Ground
from faults.pictures import fewer, write_pictures

from colfolio.batch import MultiVectors
from colfolio.data.dataset import load_dataset
from colfolio.data.picks import BatchSettings, Picker
from colfolio.data.preparing.deduplicate import pixel_digest
from colfolio.data.sampler import SamplerPosition
from colfolio.models.retriever import Retriever
from colfolio.training import exact_batch

LOOK = fewer(COUNTED.look, 64)


@pytest.fixture(scope="session")
def ground(tmp_path_factory):
    return Ground(tmp_path_factory.mktemp("plants"), COUNTED)


@pytest.fixture(scope="session")
def base(ground):
    return ground.base("drawn", 0)


@pytest.fixture
def written(tmp_path):
    def write(way):
        write_pictures(tmp_path / way, LOOK, 3, way)
        return load_dataset(tmp_path / way, "train")

    return write


def images_of(dataset):
    return [dataset.corpus.image(row) for row in range(len(dataset.corpus))]


def digests_of(dataset):
    return [pixel_digest(image) for image in images_of(dataset)]


def test_plain_images_are_all_different_and_labelled_as_they_are_drawn(written):
    plain = written("plain")
    assert len(set(digests_of(plain))) == LOOK.train
    assert all(
        plain.positives(query.id) == [row_id]
        for query, row_id in zip(plain.queries, plain.corpus.ids, strict=True)
    )


def test_two_of_five_pages_are_blank(written):
    blank = [bool((image == 255).all()) for image in images_of(written("blank"))]
    assert sum(blank) == 2 * LOOK.train // 5


def test_copied_pages_stand_under_many_ids_and_texts(written):
    copied = written("copied")
    assert len(set(digests_of(copied))) == LOOK.train // 32
    assert len({query.text for query in copied.queries}) == LOOK.train


def test_shifted_labels_are_those_of_the_next_row(written):
    shifted, plain = written("shifted"), written("plain")
    answers = [shifted.positives(query.id)[0] for query in shifted.queries]
    assert answers == [*shifted.corpus.ids[1:], shifted.corpus.ids[0]]
    assert [query.text for query in shifted.queries] == [query.text for query in plain.queries]


def test_half_of_the_validation_split_is_in_training(ground):
    folder = ground.data("leaked", 0)
    trained, held_out = (set(digests_of(load_dataset(folder, s))) for s in ("train", "validation"))
    assert len(trained & held_out) == COUNTED.look.validation // 2


def test_queries_without_letters_are_the_same_tokens(ground):
    model = Retriever.from_pretrained(ground.base("latin", 0), device="cpu")
    texts = [query.text for query in load_dataset(ground.data("greek", 0), "train").queries]
    assert len(set(texts)) == len(texts)
    assert len({tuple(ids) for ids in model.collator.prompter.query_ids(texts)}) == 1


def test_a_projection_is_another_at_every_load(base):
    with breakage.projection_drawn_anew():
        first, second = (Retriever.from_pretrained(base, device="cpu") for _ in range(2))
    assert not torch.equal(first.projection.weight, second.projection.weight)
    assert torch.equal(
        first.backbone.state_dict()["language_model.norm.weight"],
        second.backbone.state_dict()["language_model.norm.weight"],
    )


@pytest.mark.parametrize(
    "broken", [breakage.flattened, breakage.transposed, breakage.rolled, breakage.other_scheme]
)
def test_positions_are_others_than_the_collator_makes(broken, base, ground):
    model = Retriever.from_pretrained(base, device="cpu")
    images = images_of(load_dataset(ground.data("plain", 0), "validation"))[:3]
    right = model.collator.documents(images)
    with broken():
        wrong = model.collator.documents(images)
    assert right.position_ids.shape == wrong.position_ids.shape
    assert not torch.equal(right.position_ids, wrong.position_ids)


def test_rows_that_are_cut_off_have_fewer_tokens_than_their_grids(base, ground):
    model = Retriever.from_pretrained(base, device="cpu")
    images = images_of(load_dataset(ground.data("plain", 0), "validation"))[:3]
    with breakage.rows_cut_off():
        packed = model.collator.documents(images)
    visual = packed.token_ids == model.collator.prompter.image_token_id
    assert int(visual.sum()) < int(packed.grid_thw.prod(dim=1).sum()) // 4
    assert packed.lengths.max() < model.collator.documents(images).lengths.max()


def test_lost_pixels_give_all_images_the_same_vectors(base, ground):
    model = Retriever.from_pretrained(base, device="cpu")
    images = images_of(load_dataset(ground.data("plain", 0), "validation"))[:2]
    with breakage.pixels_lost():
        vectors = model.encode_documents(images)
    torch.testing.assert_close(vectors[0], vectors[1])
    assert not torch.allclose(*(model.encode_documents([image])[0] for image in images))


def test_other_templates_give_other_tokens(base):
    with breakage.templates_of_another():
        other = Retriever.from_pretrained(base, device="cpu").collator.prompter
    own = Retriever.from_pretrained(base, device="cpu").collator.prompter
    assert other.query_ids(["red"]) != own.query_ids(["red"])
    assert other.document_ids([4]) != own.document_ids([4])


@pytest.mark.parametrize("broken", [breakage.same_order, breakage.shuffled_once])
def test_batches_are_the_same_in_every_epoch(broken, ground):
    dataset = load_dataset(ground.data("plain", 0), "train")
    with broken():
        picker = Picker(dataset, BatchSettings(rows=64), 0)
        picks = list(islice(picker.picks(SamplerPosition()), 2 * len(dataset.queries) // 64))
    half = len(picks) // 2
    assert [each.queries for each in picks[:half]] == [each.queries for each in picks[half:]]


def test_no_gradient_passes_a_detached_tower(base, ground):
    model = Retriever.from_pretrained(base, device="cpu").train()
    images = images_of(load_dataset(ground.data("plain", 0), "validation"))[:2]
    with breakage.vision_detached():
        model(model.collator.documents(images)).vectors.sum().backward()
    assert all(parameter.grad is None for parameter in model.backbone.visual.parameters())
    assert model.projection.weight.grad is not None


def test_scores_are_rounded_to_bf16():
    vectors = torch.nn.functional.normalize(
        torch.randn(8, 4, generator=torch.Generator().manual_seed(0)), dim=1
    )
    rows = MultiVectors(vectors, torch.tensor([0, 4, 8]))
    with breakage.scores_in_bf16():
        scores = exact_batch.maxsim(rows, rows)
    assert torch.equal(scores, scores.bfloat16().float())
    assert not torch.equal(scores, exact_batch.maxsim(rows, rows))


@pytest.mark.slow
def test_an_adapter_whose_names_are_passed_over_changes_no_vector(ground):
    texts = ["red circle", "blue square"]
    with breakage.adapter_names_passed_over():
        silent = Retriever.from_pretrained(ground.base("adapted", 0), device="cpu")
    base = Retriever.from_pretrained(ground.base("drawn", 0), device="cpu")
    adapted = Retriever.from_pretrained(ground.base("adapted", 0), device="cpu")
    expected = base.encode_queries(texts).vectors
    assert torch.equal(silent.encode_queries(texts).vectors, expected)
    assert not torch.allclose(adapted.encode_queries(texts).vectors, expected, atol=1e-3)
