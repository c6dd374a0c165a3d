"""What every way to MaxSim asks of its two sides."""

from __future__ import annotations

from colfolio.batch import MultiVectors


def check_sides(queries: MultiVectors, documents: MultiVectors) -> None:
    """Refuse sides that have no scores.

    Raises:
        ValueError: a row has no vectors, or dimensions or devices differ.
    """
    for side, name in ((queries, "query"), (documents, "document")):
        if (side.lengths == 0).any():
            row = int((side.lengths == 0).nonzero()[0])
            raise ValueError(f"{name} {row} has no vectors, so it has no best match")
    if queries.vectors.shape[1] != documents.vectors.shape[1]:
        raise ValueError(
            f"query vectors have {queries.vectors.shape[1]} dimensions, "
            f"document vectors {documents.vectors.shape[1]}"
        )
    if queries.vectors.device != documents.vectors.device:
        raise ValueError(
            f"query vectors are on {queries.vectors.device}, document vectors on "
            f"{documents.vectors.device}; move one side with `.to(device)`"
        )
