"""Bundles short extracts of freely licensed PDF documentation for the demo.

The demo trains a tiny model to find a section of a document by its title. It needs many documents
in many fonts, each with an outline whose titles stand as headings on the pages that they point to.
This package makes such a corpus out of unpacked Debian packages; run it in the repository's root:

    apt-get download PACKAGE ...
    for deb in *.deb; do dpkg -x "$deb" "unpacked/$(basename "$deb" .deb)"; done
    python -m tools.bundle unpacked staging colfolio/demo/documents

Every folder in `unpacked` bears the name `PACKAGE_VERSION_ARCHITECTURE` of its package. Each PDF
below it is examined (outline, English text, bitmaps), and the pages with the most outline titles
are written into `staging` as a candidate. Candidates are then chosen greedily (new titles and fonts
for few bytes) until the budget is spent, and copied to the last folder with a `SOURCES.md` and the
texts of the licences. The same inputs give the same bytes.

It needs `pikepdf`, `pypdfium2`, Pillow and Ghostscript (`gs`, which cuts the fonts down to the
glyphs of the extract; a file so rewritten is kept only if it renders like the original). Neither
the library nor its demo needs `pikepdf` or Ghostscript.
"""
