"""A model card says of a model what is so: trained, a base, another library's, an adapter."""

import pytest
import yaml

from colfolio.models import Retriever
from colfolio.models.adapters import LoraSettings, add_lora
from colfolio.models.contract import Source
from colfolio.models.formats import Found, read, write, write_beside_adapter, write_checkpoint
from colfolio.models.formats.card import model_card

TARGETS = ["colfolio", "colpali-engine", "transformers", "sentence-transformers"]
RECIPE = {"train": {"steps": 7}}


@pytest.fixture
def retriever(make_retriever):
    return make_retriever(dim=128)


def found(retriever, **contract):
    config, weights = retriever.backbone.config, retriever.weights()
    changed = retriever.contract.model_copy(update=contract)
    return Found("any", config, weights, retriever.tokenizer, changed)


def card_of(one, folder, target):
    write(one, folder, target)
    return (folder / "README.md").read_text()


def front_of(card):
    return yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("target", TARGETS)
def test_a_base_is_not_said_to_be_trained(target, retriever, tmp_path):
    card = card_of(found(retriever), tmp_path / "out", target)
    assert "A base to train from" in card
    assert "Trained with" not in card


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_with_a_recipe_is_trained(target, retriever, tmp_path):
    card = card_of(found(retriever, recipe=RECIPE), tmp_path / "out", target)
    assert "Trained with Colfolio, by the recipe below." in card
    assert "steps: 7" in card


@pytest.mark.filterwarnings("ignore::colfolio.models.formats.AssumedWarning")
@pytest.mark.parametrize("target", TARGETS)
def test_another_librarys_checkpoint_is_not_said_to_be_trained_here(target, retriever, tmp_path):
    write(found(retriever), tmp_path / "theirs", "colpali-engine")
    (tmp_path / "theirs" / "colfolio.json").unlink()
    card = card_of(read(tmp_path / "theirs"), tmp_path / "out", target)
    assert "those of another library's checkpoint; Colfolio did not train them" in card


def test_weights_that_changed_without_a_recipe_are_not_explained(retriever, tmp_path):
    retriever.projection.weight.data.add_(1)
    card = card_of(found(retriever), tmp_path / "out", "colfolio")
    assert "are not those of its base, and no recipe says" in card


@pytest.mark.parametrize("target", ["colfolio", "colpali-engine"])
@pytest.mark.parametrize("recipe", [None, RECIPE])
def test_an_adapter_has_a_card_with_its_base(target, recipe, retriever, tmp_path):
    add_lora(retriever, LoraSettings(rank=2), 0)
    notes = write_beside_adapter(found(retriever, recipe=recipe), tmp_path, target, "owner/base")
    card = (tmp_path / "README.md").read_text()
    assert "its base is owner/base" in " ".join(notes)
    assert "its base is owner/base" in card
    assert "adapters alone are here" in card
    assert ("Trained with Colfolio" in card) == (recipe is not None)


def test_a_card_for_colfolio_has_one_program(retriever, tmp_path):
    card = card_of(found(retriever), tmp_path / "out", "colfolio")
    (program,) = card.split("```python\n")[1:]
    compile(program.split("```")[0], "card", "exec")
    assert front_of(card)["library_name"] == "colfolio"


def test_a_saved_checkpoint_has_no_card(retriever, tmp_path):
    write_checkpoint(found(retriever), tmp_path / "model")
    retriever.save_pretrained(tmp_path / "saved")
    names = [sorted(path.name for path in (tmp_path / n).iterdir()) for n in ("model", "saved")]
    assert names[0] == names[1]
    assert "README.md" not in names[0]
    Retriever.from_pretrained(tmp_path / "model")


@pytest.mark.parametrize(
    ("sentence", "bullet"),
    [
        ("image tokens have places", "- Image tokens have places."),
        ("process_queries of it writes", "- process_queries of it writes."),
        ("preprocessor_config.json leaves out", "- preprocessor_config.json leaves out."),
        ("vision_config.depth is", "- vision_config.depth is."),
    ],
)
def test_names_keep_their_letters(sentence, bullet, retriever):
    assert bullet in model_card(found(retriever), "colfolio", (sentence,), "")


@pytest.mark.parametrize(
    ("source", "bases"),
    [
        (None, None),
        (Source(name="folder"), None),
        (Source(name="owner/base", revision="a" * 40), "owner/base"),
        (Source(name="a/text + b/tower", revision="a + b"), ["a/text", "b/tower"]),
        (Source(name="folder + b/tower", revision="no commit + b"), "b/tower"),
    ],
)
def test_the_hub_is_told_of_bases_that_it_has(source, bases, retriever):
    card = model_card(found(retriever, source=source), "colfolio", (), "")
    assert front_of(card).get("base_model") == bases


def test_every_family_has_a_card_for_colfolio(make_family_retriever, tmp_path):
    card = card_of(found(make_family_retriever("colfolio_grafted")), tmp_path / "out", "colfolio")
    assert "A colfolio_grafted with a projection" in card
