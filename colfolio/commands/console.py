"""The terminal that commands print to."""

import functools
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

_LEAST_WIDTH = 20


@functools.cache
def console() -> Console:
    """The one console of this process; plain text where the output is no terminal."""
    return Console(highlight=False, soft_wrap=True)


def print_wrapped(
    out: Console,
    text: str | Text,
    *,
    indent: int = 0,
    label: str = "",
    style: str = "",
    label_style: str = "",
) -> None:
    """Print a paragraph, broken between words at a terminal's width, and not broken elsewhere.

    Args:
        indent: blanks before each line.
        label: stands in those of the first line.
    """
    paragraph = Text(text, style=style) if isinstance(text, str) else text
    width = max(_LEAST_WIDTH, out.width - indent)
    lines = paragraph.wrap(out, width) if out.is_terminal else [paragraph]
    for number, line in enumerate(lines):
        line.rstrip()
        before = f"{'' if number else label:<{indent}}"
        out.print(Text.assemble((before, label_style), line))


def program() -> str:
    """What a shell finds this command line by: its name, or its path where only that will do."""
    name = "colfolio"
    beside = Path(sys.executable).with_name(name)
    if shutil.which(name) or not beside.exists():
        return name
    here = Path.cwd()
    return str(beside.relative_to(here) if beside.is_relative_to(here) else beside)
