"""A file rewritten by Ghostscript with fonts of only the glyphs in use, if it still looks alike."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pikepdf
import pypdfium2
from PIL import ImageChops, ImageStat

from tools.bundle.resources import page_fonts
from tools.bundle.text import normalise

_MOST_CHANGE = 1.2  # mean difference of grey levels, of 255


def distil(path: Path) -> None:
    """Replace a file by a smaller one of the same look, where Ghostscript can make one."""
    with pikepdf.open(path) as extract:
        is_possible = _may_distil(extract)
    small = _rewritten(path) if is_possible else None
    if small is None:
        return
    if small.stat().st_size < path.stat().st_size and _looks_alike(path, small):
        small.replace(path)
    else:
        small.unlink()


def _may_distil(extract: pikepdf.Pdf) -> bool:
    """Whether Ghostscript can rewrite the fonts without a change of fonts or coordinates."""
    for page in extract.pages:
        box = [float(number) for number in page.mediabox]
        crop = [float(number) for number in page.cropbox]
        if box[:2] != [0.0, 0.0] or crop != box or int(page.obj.get("/Rotate", 0)):
            return False
        if any(not size for size in page_fonts(page).values()):
            return False
    return True


def _rewritten(path: Path) -> Path | None:
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


def _looks_alike(one: Path, other: Path) -> bool:
    """Whether two files have the same pages."""
    first, second = pypdfium2.PdfDocument(one), pypdfium2.PdfDocument(other)
    if len(first) != len(second):
        return False
    return all(_pages_alike(left, right) for left, right in zip(first, second, strict=True))


def _pages_alike(left: pypdfium2.PdfPage, right: pypdfium2.PdfPage) -> bool:
    """Whether two pages have the same size, nearly the same pixels, the same amount of text."""
    if any(abs(a - b) > 0.6 for a, b in zip(left.get_size(), right.get_size(), strict=True)):
        return False
    pictures = [page.render(scale=0.75, grayscale=True).to_pil() for page in (left, right)]  # pyright: ignore[reportArgumentType]
    if pictures[0].size != pictures[1].size:
        return False
    change = ImageStat.Stat(ImageChops.difference(*pictures)).mean[0]
    words = [normalise(page.get_textpage().get_text_range()) for page in (left, right)]
    is_same_text = abs(len(words[0]) - len(words[1])) <= 0.02 * len(words[0]) + 5
    return change <= _MOST_CHANGE and is_same_text
