"""The texts of the licences of the chosen extracts, one file a licence."""

from __future__ import annotations

import gzip
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from tools.bundle.candidate import Candidate

COMMON_LICENCES = Path("/usr/share/common-licenses")
# Licence: file below the folder of packages (or a common licence of Debian), first words, end.
LICENCE_TEXTS = {
    "GPL-1.0": ("GPL-1", "", ""),
    "GPL-2.0": ("GPL-2", "", ""),
    "GPL-3.0": ("GPL-3", "", ""),
    "LGPL-2.0": ("LGPL-2", "", ""),
    "LGPL-2.1": ("LGPL-2.1", "", ""),
    "LGPL-3.0": ("LGPL-3", "", ""),
    "Apache-2.0": ("Apache-2.0", "", ""),
    "CC0-1.0": ("CC0-1.0", "", ""),
    "GFDL-1.3-no-invariants": ("GFDL-1.3", "", ""),
    "Artistic-1.0": ("Artistic", "", ""),
    "BSD-3-Clause": ("BSD", "", ""),
    "LPPL-1.0": ("texlive-latex-base-doc_*/**/lppl-1-0.txt.gz", "", ""),
    "LPPL-1.2": ("texlive-latex-base-doc_*/**/lppl-1-2.txt.gz", "", ""),
    "LPPL": ("texlive-latex-base-doc_*/**/lppl.txt.gz", "", ""),
    "LPPL-1.3": ("texlive-latex-base-doc_*/**/lppl.txt.gz", "", ""),
    "LPPL-1.3a": ("texlive-latex-base-doc_*/**/lppl.txt.gz", "", ""),
    "LPPL-1.3c": ("texlive-latex-base-doc_*/**/lppl.txt.gz", "", ""),
    "OFL-1.1": ("texlive-fonts-extra-doc_*/**/raleway/OFL.txt.gz", "", ""),
    "CC-BY-SA-3.0": ("texworks-help-en_*/**/copyright", "License: CC-BY-SA-3.0\n ", ""),
    "Artistic-2.0": (
        "verilator_*/**/verilator/copyright",
        "License: Artistic-2.0\n ",
        "License: L",
    ),
    "BSD-2-Clause": ("secilc-doc_*/**/copyright", "License: BSD-2-Clause\n ", ""),
    "MIT": ("python-lark-doc_*/**/copyright", "License: MIT\n ", "License: MPL"),
    "ISC": ("yosys-doc_*/**/copyright", "License: ISC\n ", "License: "),
    "IPL-1.0": ("openafs-doc_*/**/copyright", "IBM Public License Version 1.0", ""),
    "Debian-FAQ": ("debian-faq_*/**/copyright", "  Copyright (C) 1996", ""),
    "GNATColl-docs": ("libgnatcoll-doc_*/**/copyright", "This document may be", "Files: "),
}


def write_licences(packages: Path, chosen: Sequence[Candidate], target: Path) -> list[str]:
    """Write the text of every licence of the chosen extracts once, where there is one.

    Returns:
        The licences without a text.
    """
    names = {name for item in chosen for name in re.split(r" (?:AND|OR) ", item.source.licence)}
    folder = target / "LICENSES"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    missing = []
    for name in sorted(names):
        short = name.removesuffix("-or-later")
        text = _licence_text(packages, short) if short in LICENCE_TEXTS else ""
        if text:
            (folder / f"{short}.txt").write_text(text, encoding="utf-8")
        else:
            missing.append(name)
    return missing


def _licence_text(packages: Path, licence: str) -> str:
    """The text of a licence as found on a Debian system or in the packages."""
    pattern, start, end = LICENCE_TEXTS[licence]
    base = packages if "/" in pattern else COMMON_LICENCES
    paths = sorted(base.glob(pattern))
    if not paths:
        return ""
    stored = paths[0].read_bytes()
    stored = gzip.decompress(stored) if paths[0].suffix == ".gz" else stored
    text = stored.decode("utf-8", "replace")
    if start:
        rest = text.partition(start)[2]
        rest = rest.partition(end)[0] if end else rest
        text = re.sub(r"(?m)^ +\.$", "", start + rest)
    return text.strip() + "\n"
