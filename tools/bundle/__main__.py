"""Makes the bundle: `python -m tools.bundle PACKAGES STAGING TARGET`, see the package."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path

import tools.bundle
from tools.bundle.candidate import Candidate
from tools.bundle.choose import choose
from tools.bundle.licences import write_licences
from tools.bundle.listing import deliver
from tools.bundle.staging import stage_candidates


def main() -> None:
    """Read the command line and make the bundle."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.bundle",
        description=tools.bundle.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("packages", type=Path, help="folder of unpacked packages")
    parser.add_argument("staging", type=Path, help="folder for candidate extracts")
    parser.add_argument("target", type=Path, help="folder of the bundled documents")
    parser.add_argument("--budget", type=int, default=17_900_000, help="bytes of all PDFs")
    parser.add_argument("--family", type=int, default=2, help="most extracts of one family")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    if not arguments.packages.is_dir():
        parser.error(f"no folder of unpacked packages at {arguments.packages}")
    if shutil.which("gs") is None:
        parser.error("Ghostscript (gs) is not installed; it cuts the fonts down")
    candidates = stage_candidates(arguments.packages, arguments.staging, arguments.workers)
    chosen = choose(candidates, arguments.budget, arguments.family)
    deliver(chosen, arguments.staging, arguments.target)
    for licence in write_licences(arguments.packages, chosen, arguments.target):
        print(f"no text of {licence}")
    print(f"{len(candidates)} candidates")
    _print_summary(chosen)


def _print_summary(chosen: Sequence[Candidate]) -> None:
    families = len({item.source.family for item in chosen})
    pages = sum(len(item.pages) for item in chosen)
    found = sum(entry.found for item in chosen for entry in item.entries)
    headings = sum(entry.heading for item in chosen for entry in item.entries)
    size = sum(item.size for item in chosen)
    print(f"{len(chosen)} files of {families} families, {pages} pages")
    print(f"{found} titles found on their pages, {headings} on lines of their own, {size} bytes")


if __name__ == "__main__":
    main()
