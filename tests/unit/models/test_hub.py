import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from colfolio.errors import CheckpointError
from colfolio.models import Retriever, hub
from colfolio.models.contract import Source

COMMIT = "0123456789abcdef" * 2 + "01234567"


def refused(kind, status):
    """An error as the library raises it; how one is built differs between its releases."""
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error\nRequest ID")
    error.response = SimpleNamespace(status_code=status)
    return error


@pytest.fixture
def stored(tmp_path, shared_retriever):
    """A model where the hub's cache keeps one."""
    folder = tmp_path / "models--owner--name" / "snapshots" / COMMIT
    shared_retriever.save_pretrained(folder)
    return folder


@pytest.fixture
def calls(monkeypatch):
    """What was asked of the hub; an entry in `answers` is raised, or returned."""
    asked, answers = [], {}

    def method(name):
        def call(*arguments, **keywords):
            keywords.pop("self", None)
            asked.append((name, arguments, keywords))
            answer = answers.get(name)
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    api = SimpleNamespace(
        **{name: method(name) for name in ("create_repo", "repo_info", "upload_folder")}
    )
    monkeypatch.setattr(hub, "HfApi", lambda: api)
    monkeypatch.setattr(hub, "snapshot_download", method("snapshot_download"))
    return SimpleNamespace(asked=asked, answers=answers)


def test_a_folder_is_itself_and_has_no_commit(tmp_path):
    assert hub.locate(tmp_path) == hub.Location(tmp_path, None, None)
    assert hub.local_folder(tmp_path) == tmp_path


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no revision 'main'"):
        hub.locate(tmp_path, "main")


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(CheckpointError, match="is a file"):
        hub.locate(tmp_path / "model.safetensors")


def test_the_commit_of_a_hub_id_is_pinned_into_the_contract(calls, stored):
    calls.answers["snapshot_download"] = str(stored)
    loaded = Retriever.from_pretrained("owner/name", revision="v1")
    assert loaded.contract.source.name == "owner/name"
    assert loaded.contract.source.revision == COMMIT
    assert loaded.contract.loaded_from == loaded.contract.source
    (asked,) = calls.asked
    assert asked[1] == ("owner/name",)
    assert asked[2]["revision"] == "v1"


def test_what_a_model_of_the_hub_came_from_is_kept_when_it_is_loaded(calls, stored, retriever):
    published = Source(name="Qwen/Qwen2-VL-2B", revision="b" * 40)
    retriever.contract = retriever.contract.model_copy(update={"source": published})
    retriever.save_pretrained(stored)
    calls.answers["snapshot_download"] = str(stored)
    loaded = Retriever.from_pretrained("owner/name")
    assert loaded.contract.source == published
    assert loaded.contract.loaded_from == Source(name="owner/name", revision=COMMIT)


def test_no_weights_are_fetched_where_none_are_needed(calls, stored):
    calls.answers["snapshot_download"] = str(stored)
    hub.locate("owner/name", with_weights=False)
    hub.locate("owner/name")
    patterns = [keywords["allow_patterns"] for _, _, keywords in calls.asked]
    assert ["*.safetensors" in each for each in patterns] == [False, True]
    assert not any("bin" in pattern for each in patterns for pattern in each)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (refused(GatedRepoError, 403), "gated; accept its terms"),
        (refused(RevisionNotFoundError, 404), "no such revision"),
        (refused(RepositoryNotFoundError, 404), "none of that name"),
        (refused(RepositoryNotFoundError, 401), "hf auth login"),
        (OfflineModeIsEnabled("Cannot reach"), "HF_HUB_OFFLINE"),
        (OSError("We couldn't connect\nto the hub"), "couldn't connect.*give a folder"),
    ],
)
def test_what_the_hub_refuses_is_told_with_the_id_and_what_to_do(calls, error, words):
    calls.answers["snapshot_download"] = error
    with pytest.raises(CheckpointError, match=f"owner/name at revision v1.*{words}") as told:
        hub.locate("owner/name", "v1")
    assert "\n" not in str(told.value)


def run_here(script, tmp_path, **environment):
    """Runs in a process of its own, because the library reads its environment at import."""
    own = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-c", f"from colfolio.models import hub\n{script}"],
        env=os.environ | own | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.stderr.strip().splitlines()


def test_an_endpoint_that_nobody_answers_at_is_told_at_once(tmp_path):
    lines = run_here("hub.locate('owner/name')", tmp_path)
    assert "CheckpointError: owner/name: no folder of that name here" in lines[-1]
    assert "cannot be reached" in lines[-1]
    assert not any("Retry" in line for line in lines)


def test_pushing_to_an_endpoint_that_nobody_answers_at_is_told_at_once(tmp_path, stored):
    script = f"import pathlib; hub.push(pathlib.Path({str(stored)!r}), 'owner/name')"
    lines = run_here(script, tmp_path)
    assert "CheckpointError: owner/name" in lines[-1]
    assert "was not pushed: the hub cannot be reached" in lines[-1]
    assert not any("Retry" in line for line in lines)


def test_offline_mode_is_heeded_and_named(tmp_path):
    lines = run_here("hub.locate('owner/name')", tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE" in lines[-1]


def test_a_folder_is_pushed_without_what_is_no_model_file(calls, stored):
    calls.answers["repo_info"] = SimpleNamespace(private=True)
    calls.answers["upload_folder"] = SimpleNamespace(commit_url="https://hub/commit/1")
    assert hub.push(stored, "owner/name", private=True) == "https://hub/commit/1"
    (_, _, made), _, (_, _, sent) = calls.asked
    assert made == {"private": True, "exist_ok": True}
    assert sent["folder_path"] == stored
    assert not any(pattern in sent["allow_patterns"] for pattern in ("*", "*.bin", "*.pt"))


def test_a_model_that_was_to_be_private_is_not_put_into_a_public_place(calls, stored):
    calls.answers["repo_info"] = SimpleNamespace(private=False)
    with pytest.raises(CheckpointError, match=r"is public.*nothing was pushed"):
        hub.push(stored, "owner/name", private=True)
    assert [name for name, _, _ in calls.asked] == ["create_repo", "repo_info"]


def test_a_folder_without_a_model_is_not_pushed(calls, tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CheckpointError, match="holds no model"):
        hub.push(tmp_path, "owner/name")
    assert not calls.asked


def test_a_name_without_an_owner_is_refused_before_the_hub_is_asked(calls, stored):
    with pytest.raises(CheckpointError, match="'name': not a hub id"):
        hub.push(stored, "name")
    assert not calls.asked


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LocalTokenNotFoundError("Token is required"), "hf auth login"),
        (refused(RepositoryNotFoundError, 401), "hf auth login"),
        (refused(RepositoryNotFoundError, 403), "no right to do that|not yours"),
        (refused(RepositoryNotFoundError, 404), "none of that name"),
        (OfflineModeIsEnabled("Cannot reach"), "HF_HUB_OFFLINE"),
    ],
)
def test_why_nothing_was_pushed_is_told(calls, stored, error, words):
    calls.answers["create_repo"] = error
    with pytest.raises(CheckpointError, match=rf"owner/name: .* was not pushed.*({words})"):
        hub.push(stored, "owner/name")
