"""What a user of Colfolio can catch.

Every class is a `ValueError`, so that a caller who does not care which file was at fault needs to
know nothing of this module. A message states the rule, what was received, where, and what to do.
"""


class ColfolioError(ValueError):
    """A mistake in what Colfolio was given, or an input that it cannot honour."""


class DocumentError(ColfolioError):
    """A document that cannot be read: damaged, encrypted, empty, too large, of an unknown kind."""

    def __init__(self, path: object, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class DatasetError(ColfolioError):
    """A dataset whose columns, ids or relevance judgements do not fit together."""


class RecipeError(ColfolioError):
    """A recipe with an unknown key, a value out of range, or a wish that cannot be honoured.

    Args:
        key: where in the settings, as `thaw.1.open`; the message then begins with it.
    """

    def __init__(self, message: object = "", key: str = "") -> None:
        super().__init__(f"{key}: {message}" if key else message)
        self.key = key


class CheckpointError(ColfolioError):
    """A model or training state that is incomplete, damaged, or not what it claims to be."""


class TensorsError(CheckpointError):
    """Tensors that are missing, or are not those of the architecture by name or shape."""


class NotFiniteError(CheckpointError):
    """Weights among which there are NaN or infinite numbers."""


class TemplatesError(CheckpointError):
    """Strings around queries and documents that cannot be read, or that lack their slot."""


class OtherBaseError(CheckpointError):
    """An adapter that was trained on other weights than those it is put on."""


class IndexStoreError(ColfolioError):
    """A search index that is missing, damaged, or was made by another model."""
