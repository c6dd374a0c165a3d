"""What the bitmaps and fonts of a page weigh."""

from __future__ import annotations

import re

import pikepdf


def image_bytes(page: pikepdf.Page) -> int:
    """The stored size of all bitmaps that a page draws, forms included."""
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
    """The stored size of each of a page's fonts by base name; 0 where it is not in the file."""
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
