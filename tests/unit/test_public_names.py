import importlib

import pytest
import torch

import colfolio


def test_the_public_names_are_what_they_say_whatever_was_imported_before():
    from colfolio import MultiVectors, Retriever, maxsim

    importlib.import_module("colfolio.maxsim.tiled")
    one = MultiVectors.from_list([torch.tensor([[0.6, 0.8]])])
    assert maxsim(one, one).tolist() == [[1.0]]
    assert colfolio.maxsim(one, one).tolist() == [[1.0]]
    assert callable(Retriever.from_pretrained)


def test_every_public_name_exists():
    for name in colfolio.__all__:
        assert callable(getattr(colfolio, name))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        _ = colfolio.nothing
