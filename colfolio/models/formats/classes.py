"""Which classes of other libraries stand over which backbones."""

from __future__ import annotations

from dataclasses import dataclass

from colfolio.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Classes:
    """The classes of other libraries over the backbones of one family.

    Args:
        engine, engine_processor: of colpali-engine.
        engine_dim: dimensions of a vector, fixed in its code.
        processor: of transformers.
        retrieval: of transformers, with a projection; None where it has none.
    """

    engine: str
    engine_processor: str
    engine_dim: int
    processor: str
    retrieval: str | None = None


RETRIEVAL_TYPE = "colqwen2"  # `model_type` of transformers' ColQwen2ForRetrieval
RETRIEVAL_PROCESSOR = "ColQwen2Processor"
_CLASSES = {
    "qwen2_vl": Classes(
        "ColQwen2", "ColQwen2Processor", 128, "Qwen2VLProcessor", "ColQwen2ForRetrieval"
    ),
    "qwen2_5_vl": Classes("ColQwen2_5", "ColQwen2_5_Processor", 128, "Qwen2_5_VLProcessor"),
    "qwen3_vl": Classes("ColQwen3", "ColQwen3Processor", 320, "Qwen3VLProcessor"),
}


def classes_of(model_type: str) -> Classes:
    """The classes of other libraries over a backbone.

    Raises:
        CheckpointError: they have none.
    """
    if model_type not in _CLASSES:
        raise CheckpointError(
            f"no other library has a class for backbones of {model_type}, only for "
            f"{', '.join(_CLASSES)}; export it `--to colfolio`"
        )
    return _CLASSES[model_type]


def engine_name(model_type: str) -> str:
    """The class that `config.json` of our own folders names; other tools show it."""
    known = _CLASSES.get(model_type)
    return known.engine if known else "Retriever"


def check_engine(model_type: str, dim: int) -> Classes:
    """The classes of colpali-engine for vectors of so many dimensions.

    Raises:
        CheckpointError: it has none.
    """
    classes = classes_of(model_type)
    if dim != classes.engine_dim:
        raise CheckpointError(
            f"{classes.engine} of colpali-engine gives vectors of {classes.engine_dim} dimensions, "
            f"fixed in its code, and this model gives {dim}; export it `--to "
            f"sentence-transformers`{' or `--to transformers`' if classes.retrieval else ''}, or "
            f"make a base with `--dim {classes.engine_dim}`"
        )
    return classes


def check_retrieval(model_type: str) -> str:
    """The retrieval class of transformers.

    Raises:
        CheckpointError: it has none over this backbone.
    """
    retrieval = classes_of(model_type).retrieval
    if retrieval is None:
        known = [name for name, classes in _CLASSES.items() if classes.retrieval]
        raise CheckpointError(
            f"transformers has no class for retrieval over {model_type}, only over "
            f"{', '.join(known)}; export it `--to sentence-transformers`"
        )
    return retrieval
