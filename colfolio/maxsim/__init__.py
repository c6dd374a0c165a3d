"""Late interaction: packed queries and documents to one float32 score a pair."""

import sys
from types import ModuleType
from typing import Any

from colfolio.maxsim.definition import maxsim_by_definition
from colfolio.maxsim.tiled import maxsim_tiled as maxsim

__all__ = ["maxsim", "maxsim_by_definition"]


class _Callable(ModuleType):
    """Python binds `colfolio.maxsim` to this package; called, it is the public function."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return maxsim(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
