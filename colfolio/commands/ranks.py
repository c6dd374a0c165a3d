"""How many processes a command trains in."""

from __future__ import annotations

import torch

from colfolio.distributed import is_in_world
from colfolio.errors import ColfolioError


def ranks_to_start(asked: int | None, device: str | None) -> int:
    """Processes that this one should start; 1 if it trains by itself.

    Args:
        asked: by the user; None is one for each GPU of the host.
        device: asked for likewise; None is a GPU if there is one.

    Raises:
        ColfolioError: a number was asked for, but a launcher has started the ranks already, or the
            host has fewer GPUs.
    """
    if is_in_world():
        if asked is not None:
            raise ColfolioError(
                f"--ranks {asked}: a launcher has started this process as a rank already; leave "
                "the number of ranks to it"
            )
        return 1
    gpus = torch.cuda.device_count() if device in (None, "cuda") else 0
    if asked is not None and gpus and asked > gpus:
        raise ColfolioError(
            f"--ranks {asked}: this host has {gpus} GPUs; ask for at most as many, or for "
            "--device cpu"
        )
    return asked or max(1, gpus)
