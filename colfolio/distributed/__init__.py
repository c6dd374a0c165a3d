"""Several processes that train as one: who they are, what they exchange, how they are started."""

from colfolio.distributed.join import end_rank, is_in_world, join_world
from colfolio.distributed.launcher import launch
from colfolio.distributed.sharding import gather_state, place_optimiser_state, shard, whole
from colfolio.distributed.world import SharedError, World

__all__ = [
    "SharedError",
    "World",
    "end_rank",
    "gather_state",
    "is_in_world",
    "join_world",
    "launch",
    "place_optimiser_state",
    "shard",
    "whole",
]
