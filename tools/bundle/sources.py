"""Which PDFs of the unpacked packages may be bundled: their families, licences and holders."""

from __future__ import annotations

import gzip
import re
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote

from tools.bundle.candidate import Source

# Taken with all their pages, and in any case.
WHOLE_DOCUMENTS = frozenset(
    (
        "omniorb/omniorb",
        "dblatex/manual",
        "developers-reference/developers-reference",
        "gitmagic/gitmagic",
        "maint-guide/maint-guide-en",
        "secilc/cil-reference-guide",
    )
)

# Package: family, licence, copyright holders; as its copyright file says for the documentation.
PACKAGES: dict[str, tuple[str, str, str]] = {
    "asymptote-doc": ("asymptote", "GPL-3.0-or-later", "Andy Hammerlindl, John Bowman, Tom Prince"),
    "auto-multiple-choice-doc-pdf": (
        "auto-multiple-choice",
        "GPL-2.0-or-later",
        "Alexis Bienvenüe",
    ),
    "bird2-doc": ("bird", "GPL-2.0-or-later", "Martin Mareš and others"),
    "dblatex-doc": ("dblatex", "GPL-2.0-or-later", "Benoit Guillon"),
    "debian-faq": ("debian-faq", "Debian-FAQ", "Software in the Public Interest"),
    "debian-history": (
        "debian-history",
        "GPL-2.0-or-later",
        "Bdale Garbee, Debian Documentation Team",
    ),
    "debian-policy": (
        "debian-policy",
        "GPL-2.0-or-later",
        "Ian Jackson, Christian Schwarz, many Debian contributors",
    ),
    "debian-reference-en": ("debian-reference", "GPL-2.0-or-later", "Osamu Aoki"),
    "debmake-doc": ("maint-guide", "MIT", "Osamu Aoki"),
    "developers-reference": (
        "developers-reference",
        "GPL-2.0-or-later",
        "Christian Schwarz and others",
    ),
    "doxygen-doc": ("doxygen", "GPL-2.0", "Dimitri van Heesch and others"),
    "fai-doc": ("fai", "GPL-2.0-or-later", "Thomas Lange"),
    "gap-guava": ("guava", "GPL-2.0-or-later", "The GUAVA Group"),
    "gitmagic": ("gitmagic", "GPL-3.0", "Ben Lynn"),
    "glpk-doc": ("glpk", "GFDL-1.3-no-invariants-or-later", "Free Software Foundation, Inc."),
    "gri-pdf-doc": ("gri", "GPL-3.0-or-later", "Dan E. Kelley"),
    "hmmer-doc": ("hmmer", "GPL-3.0", "Sean R. Eddy"),
    "krb5-doc": ("krb5", "CC-BY-SA-3.0", "Massachusetts Institute of Technology"),
    "libgnatcoll-doc": ("gnatcoll", "GNATColl-docs", "AdaCore"),
    "maint-guide": ("maint-guide", "GPL-2.0-or-later", "Josip Rodin, Osamu Aoki"),
    "menhir-doc": ("menhir", "GPL-2.0", "Inria"),
    "ngspice-doc": (
        "ngspice",
        "BSD-3-Clause AND CC-BY-SA-4.0",
        "Holger Vogt, Marcel Hendrix, Paolo Nenzi",
    ),
    "nut-doc": ("nut", "GPL-2.0-or-later", "Russell Kroll, Arnaud Quette and the NUT Team"),
    "omniorb-doc": ("omniorb", "LGPL-2.0-or-later", "AT&T Laboratories Cambridge"),
    "openafs-doc": ("openafs", "IPL-1.0", "IBM Corporation"),
    "python-mpi4py-doc": ("mpi4py", "BSD-2-Clause", "Lisandro Dalcin"),
    "python-reportlab-doc": ("reportlab", "BSD-3-Clause", "ReportLab Inc."),
    "r-cran-actuar": ("actuar", "GPL-2.0-or-later", "Vincent Goulet"),
    "r-cran-hsaur3": ("hsaur3", "GPL-2.0", "Torsten Hothorn, Brian S. Everitt"),
    "r-cran-markovchain": ("markovchain", "GPL-2.0", "Giorgio Alfredo Spedicato"),
    "sdcc-doc": ("sdcc", "GPL-2.0-or-later", "Sandeep Dutta and the SDCC authors"),
    "secilc-doc": ("secilc", "BSD-2-Clause", "Tresys Technology, LLC."),
    "texworks-help-en": (
        "texworks",
        "GPL-2.0-or-later OR CC-BY-SA-3.0",
        "Alain Delmotte, Stefan Löffler and others",
    ),
    "ubuntu-packaging-guide-pdf": ("ubuntu-packaging-guide", "CC-BY-SA-3.0", "Ubuntu Developers"),
    "userv": ("userv", "GPL-3.0-or-later", "Ian Jackson"),
    "verilator": ("verilator", "Artistic-2.0 OR LGPL-3.0", "Wilson Snyder"),
    "why3-doc-pdf": ("why3", "LGPL-2.1", "INRIA - CNRS - Paris-Sud University"),
    "xorg-docs": ("xorg-docs", "MIT", "The X.Org Foundation, The Open Group and others"),
    "yosys-doc": ("yosys", "ISC", "Clifford Wolf"),
}
# Holders of TeX packages that name theirs in a place that this script does not read.
HOLDERS = {"drawmatrix": "Elmar Peise", "matrix-skeleton": "Nicolas Dudebout"}
# Packages of one project, and their common family.
SIBLINGS = {
    "biblatex-bath": "bath-bst",
    "l3experimental": "latex3",
    "l3kernel": "latex3",
    "l3packages": "latex3",
    "numerica-plus": "numerica",
    "numerica-tables": "numerica",
    "tkz-base": "tkz",
    "tkz-berge": "tkz",
    "tkz-euclide": "tkz",
    "tkz-fct": "tkz",
    "tkz-tab": "tkz",
    "eledmac": "reledmac",
    "ledmac": "reledmac",
    "andika": "sil-fonts",
    "charissil": "sil-fonts",
    "doulossil": "sil-fonts",
    "chemformula": "chemmacros",
}
SKIPPED = re.compile(
    r"-(de|fr|es|it|ja|ru|zh|pl|pt|cn|chinese|german|french|a4|code|dev)$|^latex-dev/|-dev/"
)
TEX_LICENCES = {
    "lppl": "LPPL", "lppl1": "LPPL-1.0", "lppl1.2": "LPPL-1.2", "lppl1.3": "LPPL-1.3",
    "lppl1.3a": "LPPL-1.3a", "lppl1.3c": "LPPL-1.3c", "gpl": "GPL-1.0-or-later",
    "gpl2": "GPL-2.0", "gpl2+": "GPL-2.0-or-later", "gpl3": "GPL-3.0",
    "gpl3+": "GPL-3.0-or-later", "lgpl": "LGPL-2.1", "lgpl2.1": "LGPL-2.1", "lgpl3": "LGPL-3.0",
    "pd": "public-domain", "mit": "MIT", "bsd": "BSD-3-Clause",
    "bsd2": "BSD-2-Clause", "bsd3": "BSD-3-Clause", "apache2": "Apache-2.0", "isc": "ISC",
    "ofl": "OFL-1.1", "cc0": "CC0-1.0", "cc-by-4": "CC-BY-4.0",
    "cc-by-sa-3": "CC-BY-SA-3.0", "cc-by-sa-4": "CC-BY-SA-4.0", "artistic": "Artistic-1.0",
}  # fmt: skip


def find_sources(packages: Path) -> Iterator[tuple[Path, Source]]:
    """Every PDF below the package folders of which the licence is known, in sorted order."""
    seen: set[str] = set()
    for folder in sorted(item for item in packages.iterdir() if item.is_dir()):
        package, version, _ = folder.name.split("_")
        tex = _tex_licences(folder)
        for path in sorted(folder.rglob("*.pdf")) + sorted(folder.rglob("*.pdf.gz")):
            if not path.is_file() or path.is_symlink():
                continue
            place = path.relative_to(folder).as_posix().partition("/texlive-doc/")[2]
            family, project, licence, holders = _identify(package, place, tex)
            original = path.name.removesuffix(".gz")
            name = _slug(original.removesuffix(".pdf"))
            source = Source(
                family, name, original, package, project, unquote(version), licence, holders
            )
            if licence and source.key not in seen and not SKIPPED.search(source.key):
                seen.add(source.key)
                yield path, source


def is_whole(source: Source) -> bool:
    """Whether a document is taken with all its pages, and in any case."""
    return source.key in WHOLE_DOCUMENTS


def _identify(
    package: str, place: str, tex: dict[str, tuple[str, str]]
) -> tuple[str, str, str, str]:
    """Family, TeX package, licence and copyright holders of a PDF at a place inside a package."""
    if not package.startswith("texlive"):
        family, licence, holders = PACKAGES.get(package, ("", "", ""))
        return family, "", licence, holders
    matches = [key for key in tex if place.startswith(key + "/")]
    project, words = tex[max(matches, key=len)] if matches else ("", "")
    family = re.sub(r"(?<=[a-z]{3})[-_]?\d[-.\d]*$", "", _slug(project))
    return SIBLINGS.get(family, family), project, _spdx_of(words), HOLDERS.get(project, "")


def _tex_licences(folder: Path) -> dict[str, tuple[str, str]]:
    """For each documentation folder of a TeX Live package its TeX package and licence."""
    found: dict[str, tuple[str, str]] = {}
    for listing in sorted(folder.glob("usr/share/doc/texlive-*/Licenses.gz")):
        package, licence = "", ""
        for line in gzip.decompress(listing.read_bytes()).decode("utf-8", "replace").splitlines():
            head = re.match(r"([\w.+-]+): *(.*)$", line)
            if head and not line.startswith("texmf"):
                package, licence = head.group(1), head.group(2).strip()
            path = re.match(r"texmf-dist/doc/(.+)/\*$", line)
            if path:
                found[path.group(1)] = (package, licence)
    return found


def _spdx_of(words: str) -> str:
    """SPDX-like names for the licence words of TeX Live, or nothing when one is unclear."""
    names = [TEX_LICENCES.get(word, "") for word in words.split()]
    return " AND ".join(names) if names and all(names) else ""


def _slug(text: str) -> str:
    """The text in lower case with everything but letters and digits as hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "document"
