"""Datasets of the Hugging Face hub: their Parquet files, downloaded once."""

from __future__ import annotations

import re
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
)

from colfolio.errors import DatasetError

_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
_TIMEOUT_SECONDS = 10


def download(repository: str) -> Path:
    """The folder of a dataset's Parquet files and README, from the cache if they are there.

    Raises:
        DatasetError: it is no dataset id, the hub cannot be reached, or has no such dataset.
    """
    if not _ID.match(repository):
        raise DatasetError(
            f"{repository}: there is no such folder or file, and it is no dataset id of the hub "
            "(as in vidore/esg_reports_v2)"
        )
    try:
        folder = huggingface_hub.snapshot_download(
            repository,
            repo_type="dataset",
            allow_patterns=["*.parquet", "README.md"],
            etag_timeout=_TIMEOUT_SECONDS,
        )
    except GatedRepoError:
        raise DatasetError(
            f"{repository}: the hub asks for permission; accept its terms there and run "
            "`hf auth login`"
        ) from None
    except (RepositoryNotFoundError, HFValidationError):
        raise DatasetError(
            f"{repository}: there is no such folder here, and no such dataset on the hub"
        ) from None
    except Exception as error:  # no network, or what the HTTP library of this version calls it
        raise DatasetError(
            f"{repository}: there is no such folder here, and it cannot be fetched: cannot reach "
            "the hub. Check the path, or the network (and HF_HUB_OFFLINE), or download the dataset "
            f"elsewhere and name its folder ({type(error).__name__})"
        ) from None
    return Path(folder)
