"""What is found out before a push, while nothing has been made for it yet."""

from types import SimpleNamespace

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError

from colfolio.errors import CheckpointError
from colfolio.models import hub


def missing(status):
    """The hub's answer to a repository that it does not show."""
    error = RepositoryNotFoundError.__new__(RepositoryNotFoundError)
    Exception.__init__(error, f"{status} Client Error")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.fixture
def answering(monkeypatch):
    """Sets what the hub says of a repository, to one who is logged in."""

    def answer(said, token="hf_token"):
        asked = []

        def repo_info(repo_id, timeout):
            asked.append((repo_id, timeout))
            if isinstance(said, Exception):
                raise said
            return said

        monkeypatch.setattr(hub, "get_token", lambda: token)
        monkeypatch.setattr(hub, "HfApi", lambda: SimpleNamespace(repo_info=repo_info))
        return asked

    return answer


@pytest.mark.parametrize("repo_id", ["me/", "/model", "me", "me/a/b", "me/a model", "", "me/-a"])
def test_what_is_no_hub_id_is_refused_without_asking(repo_id, answering):
    asked = answering(SimpleNamespace(private=False))
    with pytest.raises(CheckpointError, match="not a hub id"):
        hub.check_push(repo_id)
    assert asked == []


def test_who_is_not_logged_in_is_told_without_asking(answering):
    asked = answering(SimpleNamespace(private=False), token=None)
    with pytest.raises(CheckpointError, match=r"me/model.*hf auth login"):
        hub.check_push("me/model")
    assert asked == []


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (missing(401), "hf auth login"),
        (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
        (OSError("no route"), "no route"),
    ],
)
def test_a_hub_that_would_not_take_it_is_told(said, words, answering):
    answering(said)
    with pytest.raises(CheckpointError, match=f"me/model.*{words}"):
        hub.check_push("me/model")


@pytest.mark.parametrize("said", [missing(404), SimpleNamespace(private=True)])
@pytest.mark.parametrize("private", [False, True])
def test_a_repository_that_is_not_there_or_is_fitting_is_no_hindrance(said, private, answering):
    (asked,) = [answering(said)]
    hub.check_push("me/model", private=private)
    ((repo_id, timeout),) = asked
    assert repo_id == "me/model"
    assert timeout < 60


def test_a_public_repository_is_told_of_where_a_private_one_is_asked_for(answering):
    answering(SimpleNamespace(private=False))
    hub.check_push("me/model")
    with pytest.raises(CheckpointError, match="is public"):
        hub.check_push("me/model", private=True)
