import pytest
import torch
from PIL import Image

from colfolio import MultiVectors, maxsim
from colfolio.data import collate
from colfolio.errors import DocumentError


def test_vectors_are_of_unit_length_float32_and_as_many_as_tokens(shared_retriever, texts, pages):
    queries = shared_retriever.encode_queries(texts)
    documents = shared_retriever.encode_documents(pages)
    collator = shared_retriever.collator
    assert queries.lengths.tolist() == collator.query_lengths(texts)
    assert documents.lengths.tolist() == collator.documents(pages).lengths.tolist()
    for many in (queries, documents):
        assert many.vectors.dtype == torch.float32
        torch.testing.assert_close(many.vectors.norm(dim=1), torch.ones(len(many.vectors)))


def test_half_precision_weights_still_give_float32_of_unit_length(make_retriever, texts, pages):
    retriever = make_retriever(dtype="bfloat16").eval()
    for many in (retriever.encode_queries(texts), retriever.encode_documents(pages)):
        assert many.vectors.dtype == torch.float32
        torch.testing.assert_close(many.vectors.norm(dim=1), torch.ones(len(many.vectors)))


def test_arrays_pictures_and_paths_are_the_same_documents(shared_retriever, random_image, tmp_path):
    pixels = random_image(56, 84)
    Image.fromarray(pixels).save(tmp_path / "page.png")
    path = tmp_path / "page.png"
    many = shared_retriever.encode_documents([pixels, Image.fromarray(pixels), path, str(path)])
    for row in range(1, 4):
        torch.testing.assert_close(many[row], many[0], rtol=0, atol=1e-6)


def test_nothing_to_encode_gives_no_rows(shared_retriever):
    for many in (shared_retriever.encode_queries([]), shared_retriever.encode_documents([])):
        assert len(many) == 0
        assert many.vectors.shape == (0, shared_retriever.dim)


def test_one_text_in_place_of_a_list_is_refused(shared_retriever):
    with pytest.raises(TypeError, match=r"list of texts"):
        shared_retriever.encode_queries("find me")


def test_an_empty_query_still_has_its_augmentation_tokens(shared_retriever):
    assert shared_retriever.encode_queries(["", "a"]).lengths.tolist()[0] == 2


def test_a_query_of_no_tokens_at_all_is_refused_by_name(make_retriever, tiny_shape):
    templates = tiny_shape.templates.model_copy(update={"num_query_suffix": 0})
    retriever = make_retriever(templates=templates).eval()
    with pytest.raises(ValueError, match=r"query 1 .*no tokens"):
        retriever.encode_queries(["a", ""])


def test_an_image_that_cannot_be_read_is_named(shared_retriever, tmp_path):
    (tmp_path / "page.png").write_bytes(b"no picture")
    with pytest.raises(DocumentError, match=r"page\.png"):
        shared_retriever.encode_documents([tmp_path / "page.png"])


def test_the_visual_span_of_an_image_covers_exactly_its_tokens(shared_retriever, pages):
    packed = shared_retriever.collator.documents(pages)
    rows = packed.token_ids.split(packed.lengths.tolist())
    for page, ids in zip(pages, rows, strict=True):
        span = shared_retriever.visual_span(page.shape[:2])
        visual = (ids == shared_retriever.collator.prompter.image_token_id).nonzero()[:, 0]
        assert visual.tolist() == list(range(span.first, span.first + span.rows * span.columns))


def test_the_visual_span_is_row_major(shared_retriever, random_image):
    # each merged cell of the tower's input carries its own row and column in the position ids
    page = random_image(56, 112)
    span = shared_retriever.visual_span(page.shape[:2])
    packed = shared_retriever.collator.documents([page])
    places = (
        packed.position_ids[1:, span.first : span.first + span.rows * span.columns] - span.first
    )
    assert places.T.tolist() == [[r, c] for r in range(span.rows) for c in range(span.columns)]


def test_encoded_vectors_can_be_trained_against(shared_retriever, texts, pages):
    documents = shared_retriever.encode_documents(pages)
    queries = shared_retriever.encode_queries(texts)
    for trained, fixed in ((queries, documents), (documents, queries)):
        assert not fixed.vectors.is_inference()
        vectors = trained.vectors.clone().requires_grad_()
        moving = MultiVectors(vectors, trained.offsets)
        sides = (moving, fixed) if trained is queries else (fixed, moving)
        maxsim(*sides).sum().backward()
        assert vectors.grad.abs().sum() > 0


def test_encoding_gives_back_the_mode_it_found(retriever, texts, monkeypatch):
    for mode in (True, False):
        retriever.train(mode)
        retriever.encode_queries(texts)
        assert retriever.training is mode
    retriever.train()
    monkeypatch.setattr(collate.Collator, "queries", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        retriever.encode_queries(texts)
    assert retriever.training


def test_encoding_in_training_mode_has_no_dropout(make_retriever, texts):
    retriever = make_retriever(text={"attention_dropout": 0.5}).train()
    first, again = (retriever.encode_queries(texts).vectors for _ in range(2))
    assert torch.equal(first, again)


def test_encoding_makes_no_graph(retriever, texts):
    assert not retriever.encode_queries(texts).vectors.requires_grad


def test_every_parameter_is_reached_by_a_batch_of_both_sides(retriever, texts, pages):
    queries = retriever(retriever.collator.queries(texts))
    documents = retriever(retriever.collator.documents(pages))
    (maxsim(queries, documents) ** 2).sum().backward()
    for name, parameter in retriever.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
