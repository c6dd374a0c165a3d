"""Bundle short extracts of freely licensed PDF documentation for the demo.

The demo of Colfolio trains a tiny model to find a section of a document by its title.  It needs
many documents in many fonts, each with an outline whose titles stand as headings on the pages
that they point to.  This script makes such a corpus out of unpacked Debian packages::

    apt-get download PACKAGE ...
    for deb in *.deb; do dpkg -x "$deb" "unpacked/$(basename "$deb" .deb)"; done
    python tools/bundle_documents.py unpacked staging colfolio/demo/documents

Every folder in ``unpacked`` bears the name ``PACKAGE_VERSION_ARCHITECTURE`` of its package.  The
script examines each PDF below it (outline, English text, bitmaps), picks the pages with the most
outline titles, writes them as a candidate extract into ``staging``, then chooses candidates
greedily (new titles and fonts for few bytes) until the budget is spent, and copies them to the
last folder with a ``SOURCES.md`` and the licence texts.  The same inputs give the same bytes.

It needs ``pikepdf``, ``pypdfium2``, Pillow and Ghostscript (``gs``, which cuts the fonts down to
the glyphs of the extract; a file so rewritten is kept only if it renders like the original).
Neither the library nor its demo needs ``pikepdf`` or Ghostscript.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import unquote

import pikepdf
import pypdfium2
from PIL import ImageChops, ImageStat

MOST_INPUT_BYTES = 20_000_000
MOST_INPUT_PAGES = 800
MOST_PAGES = 16
MOST_FILE_BYTES = 1_900_000
MOST_PAGE_IMAGE_BYTES = 25_000
MOST_EXTRACT_BYTES = 200_000
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

STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        the of and to in is a for that be this are it with as on by can if or not you an which
        from will use used at have has when may should all your there then its but one these we
        they was were more into only also such than each so other about how what
        """,
    )
)
FOREIGN_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        der die und das von mit nicht ist eine les des une est dans pour que le la del los para
        il che di een het van je nie jest i w z o do na com um uma
        """,
    )
)
TEX_LICENCES = {
    "lppl": "LPPL", "lppl1": "LPPL-1.0", "lppl1.2": "LPPL-1.2", "lppl1.3": "LPPL-1.3",
    "lppl1.3a": "LPPL-1.3a", "lppl1.3c": "LPPL-1.3c", "gpl": "GPL-1.0-or-later",
    "gpl2": "GPL-2.0", "gpl2+": "GPL-2.0-or-later", "gpl3": "GPL-3.0",
    "gpl3+": "GPL-3.0-or-later", "lgpl": "LGPL-2.1", "lgpl2.1": "LGPL-2.1", "lgpl3": "LGPL-3.0",
    "pd": "public-domain", "mit": "MIT", "x11": "X11", "bsd": "BSD-3-Clause",
    "bsd2": "BSD-2-Clause", "bsd3": "BSD-3-Clause", "apache2": "Apache-2.0", "isc": "ISC",
    "ofl": "OFL-1.1", "cc0": "CC0-1.0", "cc-by-3": "CC-BY-3.0", "cc-by-4": "CC-BY-4.0",
    "cc-by-sa-3": "CC-BY-SA-3.0", "cc-by-sa-4": "CC-BY-SA-4.0", "artistic": "Artistic-1.0",
}  # fmt: skip

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
    "X11": ("docbook-xsl-doc-pdf_*/**/copyright", "License: X11", ""),
    "ISC": ("yosys-doc_*/**/copyright", "License: ISC\n ", "License: "),
    "IPL-1.0": ("openafs-doc_*/**/copyright", "IBM Public License Version 1.0", ""),
    "bzip2-1.0.6": ("bzip2-doc_*/**/copyright", "License: BSD-variant", "Files: "),
    "Debian-FAQ": ("debian-faq_*/**/copyright", "  Copyright (C) 1996", ""),
    "GNATColl-docs": ("libgnatcoll-doc_*/**/copyright", "This document may be", "Files: "),
}
# Holders of TeX packages that name theirs in a place that this script does not read.
HOLDERS = {"drawmatrix": "Elmar Peise", "matrix-skeleton": "Nicolas Dudebout"}
# Fonts that are not free themselves; documents that embed them are left out.
UNFREE_FONTS = re.compile(
    r"^MT(EX|MI|SY)|Syntax"
    r"|Aldus|Hoefler|Lucida|Tiempos|^Unit[RS]|^Unit-"
    r"|Hira(Min|Kaku|gino)|Verdana|ZapfHumanist|Minion"
    r"|Myriad|^Arial|TimesNewRoman|Calibri|Cambria|Georgia|PalatinoLinotype|Optima|Zapfino|GillSans"
    r"|Futura|Trebuchet|Consolas|CourierNew|Univers|Frutiger|Garamond(Pro|Premier)|HelveticaN"
    r"|Tahoma|Menlo|Monaco|Baskerville-|Didot|Segoe|^Corbel|Candara|Constantia|MTPro|Adobe|^Bembo"
)
SKIPPED = re.compile(
    r"-(de|fr|es|it|ja|ru|zh|pl|pt|cn|chinese|german|french|a4|code|dev)$|^latex-dev/|-dev/"
)
# Packages of one project, and their common family.
SIBLINGS = {
    "biblatex-bath": "bath-bst",
    "l3experimental": "latex3",
    "l3kernel": "latex3",
    "l3packages": "latex3",
    "numerica-plus": "numerica",
    "numerica-tables": "numerica",
    "numerica-basics": "numerica",
    "tkz-base": "tkz",
    "tkz-berge": "tkz",
    "tkz-euclide": "tkz",
    "tkz-fct": "tkz",
    "tkz-graph": "tkz",
    "tkz-tab": "tkz",
    "eledmac": "reledmac",
    "ledmac": "reledmac",
    "andika": "sil-fonts",
    "charissil": "sil-fonts",
    "doulossil": "sil-fonts",
    "gentium-sil": "sil-fonts",
    "chemformula": "chemmacros",
}
PREFACE = """# Sources of the bundled documents

These are extracts of freely licensed documentation: chosen pages, unmodified in appearance, with
the part of the outline that points to them.  Links, annotations, metadata and attachments were
left out and most fonts cut down to the glyphs in use, so every file is a changed version of its
original.  The whole originals, and the sources
from which they were made, are in the named Debian packages (and the source packages of these) of
Debian 12 "bookworm".  Licences were read from the copyright files of the packages; for the TeX Live
packages from the list of licences per TeX package that comes with them.  The texts of the licences
are in the folder `LICENSES`; those of the Creative Commons licences without a file there are at
https://creativecommons.org/licenses/.  `LPPL` alone stands for the LaTeX Project Public License
where the list names no version, `LPPL-1.3` for version 1.3 or later (the text is that of 1.3c).

`tools/bundle_documents.py` made the extracts and this list.
"""
# Package: family, licence, copyright holders; as its copyright file says for the documentation.
PACKAGES: dict[str, tuple[str, str, str]] = {
    "asymptote-doc": ("asymptote", "GPL-3.0-or-later", "Andy Hammerlindl, John Bowman, Tom Prince"),
    "augeas-doc": ("augeas", "LGPL-2.1-or-later", "Red Hat Inc."),
    "auto-multiple-choice-doc-pdf": (
        "auto-multiple-choice",
        "GPL-2.0-or-later",
        "Alexis Bienvenüe",
    ),
    "bird2-doc": ("bird", "GPL-2.0-or-later", "Martin Mareš and others"),
    "bzip2-doc": ("bzip2", "bzip2-1.0.6", "Julian R Seward"),
    "dblatex-doc": ("dblatex", "GPL-2.0-or-later", "Benoit Guillon"),
    "debian-faq": ("debian-faq", "Debian-FAQ", "Software in the Public Interest"),
    "debian-handbook": (
        "debian-handbook",
        "GPL-2.0-or-later OR CC-BY-SA-3.0",
        "Raphaël Hertzog, Roland Mas",
    ),
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
    "docbook-xsl-doc-pdf": ("docbook-xsl", "X11", "Norman Walsh, the DocBook Project"),
    "doxygen-doc": ("doxygen", "GPL-2.0", "Dimitri van Heesch and others"),
    "fai-doc": ("fai", "GPL-2.0-or-later", "Thomas Lange"),
    "gap-guava": ("guava", "GPL-2.0-or-later", "The GUAVA Group"),
    "gitmagic": ("gitmagic", "GPL-3.0", "Ben Lynn"),
    "glpk-doc": ("glpk", "GFDL-1.3-no-invariants-or-later", "Free Software Foundation, Inc."),
    "gretl-doc": ("gretl", "GPL-3.0", 'Allin Cottrell, Riccardo "Jack" Lucchetti'),
    "gri-pdf-doc": ("gri", "GPL-3.0-or-later", "Dan E. Kelley"),
    "hmmer-doc": ("hmmer", "GPL-3.0", "Sean R. Eddy"),
    "krb5-doc": ("krb5", "CC-BY-SA-3.0", "Massachusetts Institute of Technology"),
    "libdwarf-dev": ("libdwarf", "GPL-2.0", "David Anderson"),
    "libgnatcoll-doc": ("gnatcoll", "GNATColl-docs", "AdaCore"),
    "libigraph-doc": ("igraph", "GPL-2.0-or-later", "The igraph development team"),
    "live-manual-pdf": ("live-manual", "GPL-3.0-or-later", "Live Systems Project"),
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
    "parallel": ("parallel", "GPL-3.0-or-later", "Ole Tange, Free Software Foundation, Inc."),
    "python-lark-doc": ("lark", "MIT", "Erez Shinan"),
    "python-mpi4py-doc": ("mpi4py", "BSD-2-Clause", "Lisandro Dalcin"),
    "python-reportlab-doc": ("reportlab", "BSD-3-Clause", "ReportLab Inc."),
    "r-cran-actuar": ("actuar", "GPL-2.0-or-later", "Vincent Goulet"),
    "r-cran-hsaur3": ("hsaur3", "GPL-2.0", "Torsten Hothorn, Brian S. Everitt"),
    "r-cran-markovchain": ("markovchain", "GPL-2.0", "Giorgio Alfredo Spedicato"),
    "r-cran-zoo": ("zoo", "GPL-2.0-or-later", "Achim Zeileis, Gabor Grothendieck"),
    "sdcc-doc": ("sdcc", "GPL-2.0-or-later", "Sandeep Dutta and the SDCC authors"),
    "secilc-doc": ("secilc", "BSD-2-Clause", "Tresys Technology, LLC."),
    "siscone-doc-pdf": ("siscone", "GPL-2.0-or-later", "Gavin Salam"),
    "slurm-wlm-doc": ("slurm", "GPL-2.0-or-later", "The Regents of the University of California"),
    "swig4.0-doc": ("swig", "GPL-3.0-or-later", "The SWIG authors"),
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
    "yade": ("yade", "GPL-2.0", "Yade developers"),
    "yosys-doc": ("yosys", "ISC", "Clifford Wolf"),
}


def slug(text: str) -> str:
    """Return the text in lower case with everything but letters and digits as hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-") or "document"


def normalise(text: str) -> str:
    """Return text in a form in which a title and its heading on the page are the same."""
    text = re.sub(r"[\x02\ufffe\u00ad]\s*", "", text)
    text = unicodedata.normalize("NFKC", text).lower()
    text = text.replace("\u2019", "'").replace("\u2018", "'").replace("`", "'")
    text = re.sub(r"[\u201c\u201d]|''", '"', text)
    text = re.sub(r"[\u2010-\u2015\u2212]|--+", "-", text)
    return re.sub(r"\s+", " ", text).strip()


def bare_title(title: str) -> str:
    """Return a normalised title without its section number."""
    text = normalise(title)
    text = re.sub(r"^(chapter|appendix|part|section)\s+([0-9]+|[a-z]|[ivxlc]+)\b[.:]?\s+", "", text)
    return re.sub(r"^(([0-9]+|[a-z])(\.[0-9]+)+\.?|[0-9]+\.?|[a-zivx]+[.)])\s+", "", text)


def letters(text: str) -> int:
    """Return how many letters the text has."""
    return sum(character.isalpha() for character in text)


def english_share(text: str) -> float:
    """Return the share of frequent English words among the words, less foreign ones."""
    words = re.findall(r"[^\W\d_]+", text.lower())
    if not words:
        return 0.0
    score = sum((word in STOP_WORDS) - (word in FOREIGN_WORDS) for word in words)
    return score / len(words)


def listing_share(text: str) -> float:
    """Return the share of characters that are typical of code rather than of prose."""
    signs = sum(character in "\\{}[]$#@|<>=_^&*+/~%;" for character in text)
    return signs / max(1, len(text))


def text_marks(text: str) -> list[int]:
    """Return a sample of hashes of the text's runs of eight words, to find copies of one text."""
    words = re.findall(r"[a-z]{2,}", normalise(text))
    runs = (" ".join(words[start : start + 8]) for start in range(len(words) - 7))
    hashes = {zlib.crc32(run.encode()) for run in runs}
    return sorted(number for number in hashes if number % 16 == 0)


def copyright_holders(texts: list[str]) -> str:
    """Return who the first copyright notice with a year names, if there is one."""
    notice = re.compile(
        r"(?:copyright|\u00a9|\(c\))[ \t:,]*(?:\(c\)|\u00a9)?[ \t]*(?:\d{4}[-\u2013, \t\d]*)"
        r"(?:by |,)?[ \t]*([A-Z\u00c0-\u017e][^\n<(|\\{]{3,70})",
        re.IGNORECASE,
    )
    for text in texts:
        match = notice.search(text)
        if match:
            name = re.split(
                r"[`%#_;]|(?<=[a-z]{2})\. |,? \S*@|, \(| and others|all rights|this "
                r"|permission|license| in \d| \d{4}",
                match[1],
                flags=re.I,
            )[0]
            name = re.sub(r"\s+", " ", name).strip(" .,;:-*\u00a9(")
            if letters(name) >= 6 and not re.search(r"(?i)your name|^the authors?$", name):
                return name
    return ""


def is_heading(title: str, lines: list[str]) -> bool:
    """Tell whether the title, or the first line of a long one, stands on a line of its own."""
    return any(line == title or (len(line) >= 24 and title.startswith(line)) for line in lines)


def page_text(document: pypdfium2.PdfDocument, number: int) -> str:
    """Return the text of one page."""
    page = document[number]
    textpage = page.get_textpage()
    text = textpage.get_text_range()
    textpage.close()
    page.close()
    return text


def read_entries(document: pypdfium2.PdfDocument, texts: list[str]) -> list[Entry]:
    """Return the outline entries that have a page, each checked against the page's text."""
    normal = [normalise(text) for text in texts]
    lines = [[bare_title(line) for line in text.splitlines()] for text in texts]
    entries = []
    for bookmark in document.get_toc(max_depth=8):
        title = re.sub(r"\s+", " ", bookmark.get_title() or "").strip()
        destination = bookmark.get_dest()
        page = destination.get_index() if destination else None
        if page is None or not 0 <= page < len(texts) or not title:
            continue
        bare = bare_title(title)
        usable = letters(bare) >= 4
        found = usable and bare in normal[page]
        entry = Entry(title, bookmark.level, page, destination_top(destination), found, False)
        entry.heading = found and is_heading(bare, lines[page])
        entries.append(entry)
    return entries


def destination_top(destination: pypdfium2.PdfDest) -> float | None:
    """Return the height on the page that a destination names, if it names one."""
    mode, numbers = destination.get_view()
    place = {1: 1, 3: 0, 7: 0}.get(mode)
    if place is None or place >= len(numbers) or numbers[place] == 0:
        return None
    return round(float(numbers[place]), 2)


def is_contents(text: str, page: int, entries: list[Entry]) -> bool:
    """Tell whether a page is a table of contents, a list of figures, or an index."""
    if len(re.findall(r"(?:\. ?){4,}", text)) >= 4:
        return True
    flat = normalise(text)
    if re.match(r"(table of )?contents\b|index\b|list of (figures|tables)", flat):
        return True
    titles = {bare_title(entry.title) for entry in entries if abs(entry.page - page) > 1}
    there = sum(len(title) >= 12 and title in flat for title in titles)
    numbered = len(re.findall(r"(?m)[^\d\s]\s+\d{1,3}(?:, ?\d{1,3})*\s*$", text))
    return there >= 6 or numbered >= 16


def image_bytes(page: pikepdf.Page) -> int:
    """Return the stored size of all bitmaps that a page draws, forms included."""
    total = 0
    seen: set[tuple[int, int]] = set()
    pending = [page.obj.get("/Resources", pikepdf.Dictionary())]
    while pending:
        objects = pending.pop().get("/XObject", {})
        for item in objects.values() if len(objects) < 400 else ():
            if item.objgen in seen:
                continue
            seen.add(item.objgen)
            total += len(item.read_raw_bytes())
            if "/Resources" in item:
                pending.append(item.Resources)
    return total


def page_fonts(page: pikepdf.Page) -> dict[str, int]:
    """Return the base names of a page's fonts and the stored size of each; bitmap fonts too."""
    fonts: dict[str, int] = {}
    for font in page.obj.get("/Resources", {}).get("/Font", {}).values():
        if font.get("/Subtype") == "/Type3":
            fonts["Type3"] = 0
            continue
        name = re.sub(r"^[A-Z]{6}\+", "", str(font.get("/BaseFont", "/unnamed"))[1:])
        inner = font["/DescendantFonts"][0] if "/DescendantFonts" in font else font
        descriptor = inner.get("/FontDescriptor", {})
        for key in ("/FontFile", "/FontFile2", "/FontFile3"):
            if key in descriptor:
                fonts[name] = len(descriptor[key].read_raw_bytes())
        fonts.setdefault(name, 0)
    return fonts


def choose_pages(texts: list[str], entries: list[Entry], heavy: set[int], most: int) -> list[int]:
    """Return the pages with the most headings, or none when the document does not fit."""
    titles: dict[int, set[str]] = {}
    for entry in entries:
        if entry.heading and len(entry.title) <= 90:
            titles.setdefault(entry.page, set()).add(bare_title(entry.title))
    scores = {}
    for page, names in titles.items():
        text = texts[page]
        if page in heavy or is_contents(text, page, entries) or len(text) < 500:
            continue
        share, listing = english_share(text), listing_share(text)
        if share < 0.16 or listing > 0.07:
            continue
        scores[page] = min(len(names), 5) + min(1.0, len(text) / 2500) + share - 8 * listing
    ranked = sorted(scores, key=lambda page: (-scores[page], page))
    return sorted(ranked[:most])


def outline_into(extract: pikepdf.Pdf, entries: list[Entry], pages: list[int]) -> None:
    """Write the entries of the kept pages as the outline of the extract, nested."""
    place = {page: number for number, page in enumerate(pages)}
    with extract.open_outline() as outline:
        open_items: list[tuple[int, list[pikepdf.OutlineItem]]] = [(-1, outline.root)]
        for entry in entries:
            if entry.page not in place:
                continue
            while open_items[-1][0] >= entry.level:
                open_items.pop()
            if entry.top is None:
                item = pikepdf.OutlineItem(entry.title, place[entry.page], "Fit")
            else:
                item = pikepdf.OutlineItem(entry.title, place[entry.page], "XYZ", top=entry.top)
            open_items[-1][1].append(item)
            open_items.append((entry.level, item.children))


def copy_pages(data: bytes, pages: list[int], target: Path) -> None:
    """Copy pages into a new file without their annotations, metadata and other attachments."""
    dropped = ["Annots", "Thumb", "StructParents", "B", "AA", "Metadata", "PieceInfo", "Tabs"]
    with pikepdf.open(io.BytesIO(data)) as source, pikepdf.new() as extract:
        for number in pages:
            page = source.pages[number]
            for key in dropped:
                if f"/{key}" in page.obj:
                    del page.obj[f"/{key}"]
            extract.pages.append(page)
        extract.remove_unreferenced_resources()
        save(extract, target)


def save(extract: pikepdf.Pdf, target: Path) -> None:
    """Write a file compactly, the same bytes for the same pages."""
    extract.save(
        target,
        deterministic_id=True,
        object_stream_mode=pikepdf.ObjectStreamMode.generate,
        compress_streams=True,
        recompress_flate=True,
    )


def may_distil(extract: pikepdf.Pdf) -> bool:
    """Tell whether Ghostscript can rewrite the fonts without a change of fonts or coordinates."""
    for page in extract.pages:
        box = [float(number) for number in page.mediabox]
        crop = [float(number) for number in page.cropbox]
        if box[:2] != [0.0, 0.0] or crop != box or int(page.obj.get("/Rotate", 0)):
            return False
        if any(not size for size in page_fonts(page).values()):
            return False
    return True


def distil(path: Path) -> Path | None:
    """Let Ghostscript subset the fonts to the glyphs of the extract; None when it cannot."""
    target = path.with_suffix(".distilled.pdf")
    command = ["gs", "-q", "-dBATCH", "-dNOPAUSE", "-dSAFER", "-sDEVICE=pdfwrite"]
    command += ["-dCompatibilityLevel=1.7", "-dAutoRotatePages=/None", "-dPreserveAnnots=false"]
    command += ["-dEmbedAllFonts=true", "-dSubsetFonts=true", "-dCompressFonts=true"]
    for kind in ("Color", "Gray"):
        command += [f"-dAutoFilter{kind}Images=false", f"-d{kind}ImageFilter=/FlateEncode"]
        command += [f"-dDownsample{kind}Images=false"]
    command += ["-dPassThroughJPEGImages=true", f"-sOutputFile={target}", str(path)]
    done = subprocess.run(command, capture_output=True, timeout=120, check=False)
    return target if done.returncode == 0 and target.exists() else None


def pages_alike(left: pypdfium2.PdfPage, right: pypdfium2.PdfPage) -> bool:
    """Tell whether two pages have the same size, nearly the same pixels, the same text."""
    if any(abs(a - b) > 0.6 for a, b in zip(left.get_size(), right.get_size(), strict=True)):
        return False
    pictures = [page.render(scale=0.75, grayscale=True).to_pil() for page in (left, right)]
    if pictures[0].size != pictures[1].size:
        return False
    change = ImageStat.Stat(ImageChops.difference(*pictures)).mean[0]
    words = [normalise(page.get_textpage().get_text_range()) for page in (left, right)]
    return change <= 1.2 and abs(len(words[0]) - len(words[1])) <= 0.02 * len(words[0]) + 5


def looks_alike(one: Path, other: Path) -> bool:
    """Tell whether two files have the same pages."""
    first, second = pypdfium2.PdfDocument(one), pypdfium2.PdfDocument(other)
    if len(first) != len(second):
        return False
    return all(pages_alike(left, right) for left, right in zip(first, second, strict=True))


def write_extract(data: bytes, candidate: Candidate, target: Path) -> None:
    """Write the candidate's pages and outline into a new file, and nothing else."""
    copy_pages(data, candidate.pages, target)
    with pikepdf.open(target) as extract:
        possible = may_distil(extract)
    small = distil(target) if possible else None
    if small and small.stat().st_size < target.stat().st_size and looks_alike(target, small):
        shutil.copyfile(small, target)
    if small:
        small.unlink()
    fonts: set[str] = set()
    with pikepdf.open(io.BytesIO(target.read_bytes())) as extract:
        for key in ("/Metadata", "/PageMode", "/OpenAction", "/Names", "/AcroForm", "/Outlines"):
            if key in extract.Root:
                del extract.Root[key]
        for key in ("/Info", "/ID"):
            if key in extract.trailer:
                del extract.trailer[key]
        outline_into(extract, candidate.entries, candidate.pages)
        for page in extract.pages:
            fonts.update(page_fonts(page))
        save(extract, target)
    candidate.fonts = sorted(fonts)
    candidate.size = target.stat().st_size
    check_again(candidate, target)


def check_again(candidate: Candidate, target: Path) -> None:
    """Judge the entries anew by the written file, which is what the demo will read."""
    document = pypdfium2.PdfDocument(target)
    texts = [page_text(document, number) for number in range(len(document))]
    written = read_entries(document, texts)
    kept = [entry for entry in candidate.entries if entry.page in set(candidate.pages)]
    if len(written) != len(kept):
        raise ValueError(f"outline of {target.name} has {len(written)} of {len(kept)} entries")
    for entry in written:
        entry.page = candidate.pages[entry.page]
    candidate.entries = written


def read_pdf(path: Path) -> bytes:
    """Return the bytes of a PDF, unpacked when it is stored compressed."""
    data = path.read_bytes()
    return gzip.decompress(data) if path.suffix == ".gz" else data


def examine(job: tuple[str, str, dict[str, str]]) -> dict | None:
    """Make a staged extract of one PDF, or return None when it is of no use."""
    path, staging, facts = job
    try:
        return examine_pdf(Path(path), Path(staging), facts)
    except (pikepdf.PdfError, pypdfium2.PdfiumError, OSError, ValueError, RecursionError,
            TypeError, KeyError, AttributeError, NotImplementedError,
            subprocess.TimeoutExpired) as error:  # fmt: skip
        print(f"skipped {Path(path).name}: {type(error).__name__} {error}"[:160], flush=True)
        return None


def readmes(path: Path) -> list[str]:
    """Return the read-me texts beside a PDF."""
    texts = []
    for item in sorted(path.parent.iterdir()):
        if re.fullmatch(r"readme(\.md|\.txt)?(\.gz)?", item.name.lower()) and item.is_file():
            data = item.read_bytes()
            data = gzip.decompress(data) if item.suffix == ".gz" else data
            texts.append(data.decode("utf-8", "replace"))
    return texts


def english_texts(document: pypdfium2.PdfDocument) -> list[str]:
    """Return the text of each page, or nothing for a document that is of no use here."""
    count = len(document)
    if not 3 <= count <= MOST_INPUT_PAGES or sum(1 for _ in document.get_toc(max_depth=8)) < 6:
        return []
    sample = " ".join(page_text(document, number) for number in range(1, min(count, 8)))
    if english_share(sample) < 0.1:
        return []
    texts = [page_text(document, number) for number in range(count)]
    return texts if english_share(" ".join(texts)) >= 0.14 else []


def examine_pdf(path: Path, staging: Path, facts: dict[str, str]) -> dict | None:
    """Examine one PDF and stage its extract."""
    data = read_pdf(path)
    if len(data) > MOST_INPUT_BYTES:
        return None
    document = pypdfium2.PdfDocument(data)
    texts = english_texts(document)
    entries = read_entries(document, texts) if texts else []
    if sum(entry.heading for entry in entries) < 6:
        return None
    with pikepdf.open(io.BytesIO(data)) as source:
        sizes = [image_bytes(page) for page in source.pages]
        author = str(source.docinfo.get("/Author", ""))
    heavy = {number for number, size in enumerate(sizes) if size > MOST_PAGE_IMAGE_BYTES}
    whole = f"{facts['family']}/{facts['name']}" in WHOLE_DOCUMENTS
    pages = list(range(len(texts))) if whole else choose_pages(texts, entries, heavy, MOST_PAGES)
    holders = facts["holders"] or copyright_holders([*readmes(path), *texts[:3], *texts[-2:]])
    facts = {**facts, "holders": holders or re.sub(r"\s+", " ", author).strip()}
    kept = [entry for entry in entries if entry.page in set(pages)]
    marks = text_marks(" ".join(texts))
    candidate = Candidate(total_pages=len(texts), pages=pages, entries=kept, marks=marks, **facts)
    if len(pages) < 3 or sum(entry.heading for entry in kept) < 6:
        return None
    target = staging / f"{facts['family']}--{facts['name']}.pdf"
    write_extract(data, candidate, target)
    candidate.staged = target.name
    return asdict(candidate)


def tex_licences(folder: Path) -> dict[str, tuple[str, str]]:
    """Return for each documentation folder of a TeX Live package its TeX package and licence."""
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


def spdx_of(words: str) -> str:
    """Return SPDX-like names for the licence words of TeX Live, or nothing when one is unclear."""
    names = [TEX_LICENCES.get(word, "") for word in words.split()]
    return " AND ".join(names) if names and all(names) else ""


def identify(package: str, place: str, tex: dict[str, tuple[str, str]]) -> tuple[str, ...]:
    """Return family, TeX package, licence and copyright holders of a PDF at a place inside."""
    if not package.startswith("texlive"):
        family, licence, holders = PACKAGES.get(package, (slug(package), "", ""))
        return family, "", licence, holders
    matches = [key for key in tex if place.startswith(key + "/")]
    project, words = tex[max(matches, key=len)] if matches else ("", "")
    family = re.sub(r"(?<=[a-z]{3})[-_]?\d[-.\d]*$", "", slug(project))
    return SIBLINGS.get(family, family), project, spdx_of(words), HOLDERS.get(project, "")


def find_jobs(packages: Path, staging: Path) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield every PDF below the package folders of which the licence is known."""
    seen: set[str] = set()
    for folder in sorted(item for item in packages.iterdir() if item.is_dir()):
        package, version, _ = folder.name.split("_")
        tex = tex_licences(folder)
        for path in sorted(folder.rglob("*.pdf")) + sorted(folder.rglob("*.pdf.gz")):
            if not path.is_file() or path.is_symlink():
                continue
            place = path.relative_to(folder).as_posix().partition("/texlive-doc/")[2]
            family, project, licence, holders = identify(package, place, tex)
            source = path.name.removesuffix(".gz")
            name = slug(source.removesuffix(".pdf"))
            key = f"{family}/{name}"
            if not licence or key in seen or SKIPPED.search(key):
                continue
            seen.add(key)
            facts = {"family": family, "name": name, "source": source, "project": project}
            facts |= {"package": package, "version": unquote(version), "licence": licence}
            yield str(path), str(staging), facts | {"holders": holders}


def examine_all(packages: Path, staging: Path, workers: int) -> list[Candidate]:
    """Return the candidates of all PDFs; answers are kept in the staging folder for a rerun."""
    staging.mkdir(parents=True, exist_ok=True)
    store = staging / "answers.json"
    script = hashlib.sha256(Path(__file__).read_bytes().split(b"# ---- selection")[0]).hexdigest()
    known = json.loads(store.read_text()) if store.exists() else {}
    known = known if known.get("script") == script else {"script": script}
    jobs = list(find_jobs(packages, staging))
    fresh = [job for job in jobs if job[0] not in known]
    with ProcessPoolExecutor(workers) as pool:
        answers = pool.map(examine, fresh, chunksize=4)
        for number, (job, answer) in enumerate(zip(fresh, answers, strict=True)):
            known[job[0]] = answer
            if number % 200 == 199:
                print(f"examined {number + 1} of {len(fresh)}", flush=True)
                store.write_text(json.dumps(known))
    store.write_text(json.dumps(known))
    candidates = []
    for job in jobs:
        answer = known.get(job[0])
        if answer:
            facts = {key: word for key, word in job[2].items() if word}
            entries = [Entry(**entry) for entry in answer["entries"]]
            candidates.append(Candidate(**{**answer, **facts, "entries": entries}))
    return candidates


# ---- selection: a change below this line leaves the staged extracts valid


def heading_titles(candidate: Candidate) -> set[str]:
    """Return the distinct titles of a candidate that stand as headings on their pages."""
    return {bare_title(entry.title) for entry in candidate.entries if entry.heading}


def font_families(candidate: Candidate) -> set[str]:
    """Return the names of a candidate's fonts without style and size, Computer Modern as one."""
    families = set()
    for font in candidate.fonts:
        name = re.match(r"[A-Za-z]+[a-z]{2,}|[A-Za-z]+", font)
        family = name[0] if name else font
        if re.match(r"(CM|SF|MS[AB]M|EUF|LCIRCLE|LASY|LINE)[A-Z]*\d", font):
            family = "CM"
        elif re.match(r"LM|LatinModern", font):
            family = "LM"
        families.add(re.split(r"(?<=[a-z])(?=Mono|Sans|Bold|Ital|Regu|Math|Obl)", family)[0])
    return families


def value(titles: set[str], fonts: set[str], size: int, pages: int, taken: Counter[str]) -> float:
    """Return what a candidate adds for its bytes: new titles first, then new fonts and pages."""
    fresh = sum(1 / (1 + taken[title]) for title in sorted(titles))
    news = sum(1 / (1 + taken[font]) for font in sorted(fonts))
    return (fresh + 2.0 * news + 0.4 * pages) / (size + 15_000)


def is_whole(item: Candidate) -> bool:
    """Tell whether a candidate is a whole document, taken in any case."""
    return f"{item.family}/{item.name}" in WHOLE_DOCUMENTS


def same_text(one: Candidate, other: Candidate) -> bool:
    """Tell whether two documents are versions of one text, or share much of it."""
    shared = len(set(one.marks) & set(other.marks))
    most = 0.25 if one.family == other.family else 0.06
    titles, others = heading_titles(one), heading_titles(other)
    if len(titles & others) > 0.5 * min(len(titles), len(others)):
        return True
    return shared > most * max(1, min(len(one.marks), len(other.marks)))


def choose(candidates: list[Candidate], budget: int, most_a_family: int) -> list[Candidate]:
    """Choose candidates greedily within the budget; whole documents and non-TeX ones first."""
    chosen: list[Candidate] = []
    taken: Counter[str] = Counter()
    families: Counter[str] = Counter()
    titles = {item.staged: heading_titles(item) for item in candidates}
    fonts = {item.staged: {f"font {name}" for name in font_families(item)} for item in candidates}
    rest = [item for item in candidates if item.size <= MOST_FILE_BYTES]
    rest = [item for item in rest if not any(map(UNFREE_FONTS.search, item.fonts))]

    def rank(item: Candidate) -> tuple[bool, bool, float, str]:
        other = not item.package.startswith("texlive") and not families[item.family]
        names = titles[item.staged], fonts[item.staged]
        worth = value(*names, item.size, len(item.pages), taken) / (1 + 3 * families[item.family])
        return (is_whole(item), other, worth, item.staged)

    while rest:
        best = max(rest, key=rank)
        rest.remove(best)
        most = budget if is_whole(best) else min(budget, MOST_EXTRACT_BYTES)
        if families[best.family] >= most_a_family or best.size > most:
            continue
        if any(same_text(best, item) for item in chosen):
            continue
        budget -= best.size
        chosen.append(best)
        families[best.family] += 1
        taken.update(titles[best.staged])
        taken.update(fonts[best.staged])
    return sorted(chosen, key=lambda item: (item.family, item.name))


def page_list(pages: list[int]) -> str:
    """Return page indices as one-based ranges."""
    ranges: list[list[int]] = []
    for page in pages:
        if ranges and ranges[-1][1] == page:
            ranges[-1][1] = page + 1
        else:
            ranges.append([page + 1, page + 1])
    return ", ".join(f"{low}" if low == high else f"{low}-{high}" for low, high in ranges)


def tidy_holders(text: str) -> str:
    """Return the names of copyright holders without addresses, signs and placeholders."""
    text = re.split(r"`|%|,? \S*@| ,|, \(|, GitHub|, and is|\d{4}", text.replace("|", "/"))[0]
    text = text.strip(" ,;\u00a9")
    return "" if re.search(r"(?i)your name|^the authors?$", text) else text


def sources_text(chosen: list[Candidate]) -> str:
    """Return the text of SOURCES.md."""
    rows = ["| File | Original | Debian package | Pages | Licence | Copyright or author |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for item in chosen:
        package = f"{item.package} {item.version}"
        if item.project:
            package += f" (TeX package {item.project})"
        pages = f"{page_list(item.pages)} of {item.total_pages}"
        holders = tidy_holders(item.holders) or "as stated in the original"
        rows.append(
            f"| {item.family}/{item.name}.pdf | {item.source} | {package} | {pages} "
            f"| {item.licence} | {holders} |"
        )
    return PREFACE + "\n" + "\n".join(rows) + "\n"


def licence_text(packages: Path, licence: str) -> str:
    """Return the text of a licence as found on a Debian system or in the packages."""
    pattern, start, end = LICENCE_TEXTS[licence]
    base = packages if "/" in pattern else Path("/usr/share/common-licenses")
    paths = sorted(base.glob(pattern))
    if not paths:
        return ""
    data = paths[0].read_bytes()
    data = gzip.decompress(data) if paths[0].suffix == ".gz" else data
    text = data.decode("utf-8", "replace")
    if start:
        rest = text.partition(start)[2]
        rest = rest.partition(end)[0] if end else rest
        text = re.sub(r"(?m)^ +\.$", "", start + rest)
    return text.strip() + "\n"


def write_licences(packages: Path, chosen: list[Candidate], target: Path) -> None:
    """Write the text of every licence of the chosen extracts once, where there is one."""
    names = {name for item in chosen for name in re.split(r" (?:AND|OR) ", item.licence)}
    folder = target / "LICENSES"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in sorted(names):
        short = name.removesuffix("-or-later")
        text = licence_text(packages, short) if short in LICENCE_TEXTS else ""
        if text:
            (folder / f"{short}.txt").write_text(text, encoding="utf-8")
        else:
            print(f"no text of {name}")


def deliver(chosen: list[Candidate], staging: Path, target: Path) -> None:
    """Copy the chosen extracts and write their sources into the target folder."""
    target.mkdir(parents=True, exist_ok=True)
    for old in sorted(target.glob("*/*.pdf")):
        old.unlink()
    for item in chosen:
        (target / item.family).mkdir(exist_ok=True)
        shutil.copyfile(staging / item.staged, target / item.family / f"{item.name}.pdf")
    for folder in sorted(target.iterdir()):
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    (target / "SOURCES.md").write_text(sources_text(chosen), encoding="utf-8")


def main() -> None:
    """Read the command line and build the bundle."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("packages", type=Path, help="folder of unpacked packages")
    parser.add_argument("staging", type=Path, help="folder for candidate extracts")
    parser.add_argument("target", type=Path, help="folder of the bundled documents")
    parser.add_argument("--budget", type=int, default=17_900_000, help="bytes of all PDFs")
    parser.add_argument("--family", type=int, default=2, help="most extracts of one family")
    parser.add_argument("--workers", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    candidates = examine_all(arguments.packages, arguments.staging, arguments.workers)
    chosen = choose(candidates, arguments.budget, arguments.family)
    deliver(chosen, arguments.staging, arguments.target)
    write_licences(arguments.packages, chosen, arguments.target)
    pages = sum(len(item.pages) for item in chosen)
    found = sum(entry.found for item in chosen for entry in item.entries)
    headings = sum(entry.heading for item in chosen for entry in item.entries)
    families = len({item.family for item in chosen})
    size = sum(item.size for item in chosen)
    print(f"{len(candidates)} candidates")
    print(f"{len(chosen)} files of {families} families, {pages} pages")
    print(f"{found} titles found on their pages, {headings} on lines of their own, {size} bytes")


@dataclass
class Entry:
    """One outline entry: where it points to and whether its title stands there."""

    title: str
    level: int
    page: int
    top: float | None
    found: bool
    heading: bool


@dataclass
class Candidate:
    """One PDF of one package, the pages chosen from it, and what the extract holds."""

    family: str
    name: str
    source: str
    package: str
    project: str
    version: str
    licence: str
    holders: str
    total_pages: int
    pages: list[int]
    entries: list[Entry]
    marks: list[int] = field(default_factory=list)
    fonts: list[str] = field(default_factory=list)
    size: int = 0
    staged: str = ""


if __name__ == "__main__":
    main()
