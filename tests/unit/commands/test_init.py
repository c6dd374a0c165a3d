import pytest

from colfolio.commands.init import init_command
from colfolio.errors import ColfolioError, RecipeError
from colfolio.models import Retriever
from colfolio.models.contract import hash_weights


def test_a_shape_and_a_dataset_make_a_base(shape_file, shapes_folder, tmp_path):
    init_command(str(shape_file), tmp_path / "base", dataset=str(shapes_folder))
    base = Retriever.from_pretrained(tmp_path / "base")
    assert base.dim == 16
    assert hash_weights(base.weights()) == base.contract.base_hash


def test_one_seed_makes_one_base(shape_file, shapes_folder, tmp_path):
    hashes = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        init_command(str(shape_file), tmp_path / name, seed=seed, dataset=str(shapes_folder))
        hashes.append(Retriever.from_pretrained(tmp_path / name).contract.base_hash)
    assert hashes[0] == hashes[1] != hashes[2]
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_the_given_dim_wins_over_the_shapes(shape_file, shapes_folder, tmp_path):
    init_command(str(shape_file), tmp_path / "base", dim=24, dataset=str(shapes_folder))
    assert Retriever.from_pretrained(tmp_path / "base").dim == 24


def test_the_vocabulary_comes_from_the_training_split_alone(shape_file, tmp_path, write_shapes):
    for name, sizes in (("a", {"train": 12}), ("b", {"train": 12, "validation": 12})):
        write_shapes(tmp_path / name, sizes)
        init_command(str(shape_file), tmp_path / f"base-{name}", dataset=str(tmp_path / name))
    first, second = (tmp_path / f"base-{name}" / "tokenizer.json" for name in "ab")
    assert first.read_bytes() == second.read_bytes()


def test_published_weights_make_a_base(tmp_path, retriever, tiny_tokenizer):
    retriever.backbone.save_pretrained(tmp_path / "published")
    tiny_tokenizer.save(str(tmp_path / "published" / "tokenizer.json"))
    init_command(str(tmp_path / "published"), tmp_path / "base")
    assert Retriever.from_pretrained(tmp_path / "base").dim == 128


def test_a_shape_without_a_dataset_is_refused(shape_file, tmp_path):
    with pytest.raises(RecipeError, match="--dataset"):
        init_command(str(shape_file), tmp_path / "base")


def test_nothing_is_left_of_a_base_that_failed(shape_file, shapes_folder, tmp_path):
    shape_file.write_text(shape_file.read_text().replace("depth: 2", "depht: 2"))
    with pytest.raises(ColfolioError, match="depht"):
        init_command(str(shape_file), tmp_path / "base", dataset=str(shapes_folder))
    assert not (tmp_path / "base").exists()


def test_what_is_no_base_is_named(tmp_path):
    with pytest.raises(ColfolioError, match=r"nothing"):
        init_command(str(tmp_path / "nothing"), tmp_path / "base")


def test_a_folder_that_is_not_free_is_left_as_it_is(shape_file, shapes_folder, tmp_path):
    init_command(str(shape_file), tmp_path / "base", dataset=str(shapes_folder))
    before = (tmp_path / "base" / "model.safetensors").read_bytes()
    with pytest.raises(ColfolioError, match="base: is not free"):
        init_command(str(shape_file), tmp_path / "base", seed=1, dataset=str(shapes_folder))
    assert (tmp_path / "base" / "model.safetensors").read_bytes() == before


def test_vectors_without_dimensions_are_refused(shape_file, shapes_folder, tmp_path, retriever):
    with pytest.raises(ColfolioError, match="dim 0"):
        init_command(str(shape_file), tmp_path / "base", dim=0, dataset=str(shapes_folder))
    with pytest.raises(ColfolioError, match="dim 0"):
        init_command(str(tmp_path), tmp_path / "base", dim=0)


def test_what_had_to_be_assumed_is_printed(tmp_path, retriever, tiny_tokenizer, capsys):
    retriever.backbone.save_pretrained(tmp_path / "published")
    tiny_tokenizer.save(str(tmp_path / "published" / "tokenizer.json"))
    init_command(str(tmp_path / "published"), tmp_path / "base")
    assert "no preprocessor_config.json" in capsys.readouterr().out
