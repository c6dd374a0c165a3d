"""Colfolio: late-interaction retrievers for page images and video, trained and told truthfully."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from colfolio.batch import MultiVectors
    from colfolio.maxsim import maxsim
    from colfolio.models import Retriever

__all__ = ["MultiVectors", "Retriever", "maxsim"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `colfolio --help` answers at once."""
    if name == "MultiVectors":
        from colfolio.batch import MultiVectors  # noqa: PLC0415

        return MultiVectors
    if name == "maxsim":
        from colfolio.maxsim import maxsim  # noqa: PLC0415

        return maxsim
    if name == "Retriever":
        from colfolio.models import Retriever  # noqa: PLC0415

        return Retriever
    raise AttributeError(f"module 'colfolio' has no attribute {name!r}")
