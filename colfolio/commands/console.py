"""The terminal that commands print to."""

import functools

from rich.console import Console


@functools.cache
def console() -> Console:
    """The one console of this process; plain text where the output is no terminal."""
    return Console(highlight=False, soft_wrap=True)
