"""Colfolio: late-interaction retrievers for page images and video, trained and told truthfully."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colfolio.batch import MultiVectors
    from colfolio.data.video import Clip
    from colfolio.maxsim import maxsim
    from colfolio.models import Retriever
    from colfolio.models.document_inputs import Page, pdf_pages

__all__ = ["Clip", "MultiVectors", "Page", "Retriever", "maxsim", "pdf_pages"]

_HOMES = {
    "Clip": "colfolio.data.video",
    "MultiVectors": "colfolio.batch",
    "Page": "colfolio.models.document_inputs",
    "Retriever": "colfolio.models",
    "maxsim": "colfolio.maxsim",
    "pdf_pages": "colfolio.models.document_inputs",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `colfolio --help` answers at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'colfolio' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
