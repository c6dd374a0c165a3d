"""Images from files, bytes or Pillow to RGB pixels, with their size checked before decoding."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from colfolio.errors import DocumentError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".bmp", ".gif"})
MAX_IMAGE_PIXELS = 100_000_000
MAX_ASPECT = 200


def load_image(
    source: Path | bytes | Image.Image, page: int = 0
) -> UInt8[np.ndarray, "height width 3"]:
    """Decode an image as it is meant to be seen: EXIF orientation applied, alpha laid on white.

    The size is read from the header and checked before any pixel is decoded.

    Args:
        page: which image of a file that holds several.

    Raises:
        DocumentError: missing, unreadable, damaged, more than `MAX_IMAGE_PIXELS`, or one side over
            `MAX_ASPECT` times the other.
    """
    name = source if isinstance(source, Path) else "image"
    with _image_errors(name), _opened(source) as opened:
        if page:
            opened.seek(page)
        _check_size(opened, name)
        image = ImageOps.exif_transpose(opened)
        if image.has_transparency_data:
            image = image.convert("RGBA")
            paper = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(paper, image)
        elif image.mode in ("I", "I;16", "I;16B", "F"):
            image = Image.fromarray(_to_eight_bits(np.asarray(image)))
        return np.array(image.convert("RGB"))


def num_images(path: Path) -> int:
    """How many images a file holds as pages: more than one only in a TIFF."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return 1
    with _image_errors(path), Image.open(path) as image:
        return getattr(image, "n_frames", 1)


def _opened(source: Path | bytes | Image.Image) -> AbstractContextManager[Image.Image]:
    if isinstance(source, Image.Image):
        return nullcontext(source)
    return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)


def _check_size(image: Image.Image, name: object) -> None:
    width, height = image.size
    if width * height > MAX_IMAGE_PIXELS:
        raise DocumentError(name, _too_large(f"{width} x {height}"))
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise DocumentError(
            name,
            f"has {width} x {height} pixels, one side over {MAX_ASPECT} times the other; "
            "cut it into pieces",
        )


def _too_large(size: str) -> str:
    return f"has {size} pixels; at most {MAX_IMAGE_PIXELS:,} are read; scale it down"


@contextmanager
def _image_errors(name: object) -> Iterator[None]:
    try:
        yield
    except Image.DecompressionBombError:
        raise DocumentError(name, _too_large(f"far more than {MAX_IMAGE_PIXELS:,}")) from None
    except UnidentifiedImageError:
        raise DocumentError(name, "is not an image that can be read") from None
    except FileNotFoundError:
        raise DocumentError(name, "does not exist") from None
    except DocumentError:
        raise
    except (OSError, SyntaxError, ValueError, EOFError, TypeError, IndexError) as error:
        raise DocumentError(name, f"is a damaged image ({error})") from None


def _to_eight_bits(pixels: np.ndarray) -> UInt8[np.ndarray, "height width"]:
    values = pixels.astype(np.float32)
    top = 65535.0 if values.max(initial=0.0) > 255 else 255.0
    return np.clip(values * (255.0 / top), 0, 255).astype(np.uint8)
