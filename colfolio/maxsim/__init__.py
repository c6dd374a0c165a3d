"""Late interaction: packed queries and documents to one float32 score a pair."""

from colfolio.maxsim.definition import maxsim_by_definition
from colfolio.maxsim.tiled import maxsim_tiled as maxsim

__all__ = ["maxsim", "maxsim_by_definition"]
