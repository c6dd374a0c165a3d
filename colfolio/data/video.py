"""Frames of a video file, sampled evenly in time and turned as they are meant to be seen."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from jaxtyping import UInt8

from colfolio.errors import DocumentError

_SAME_TIME = 1e-4  # seconds: time stamps are rounded to the container's clock


@dataclass(frozen=True, slots=True)
class Clip:
    """Frames of one size, and the seconds from one to the next."""

    frames: UInt8[np.ndarray, "T H W 3"]
    seconds_per_frame: float


def load_clip(
    path: Path, fps: float = 2.0, max_frames: int = 768, max_pixels: int = 768 * 28 * 28
) -> Clip:
    """The frame shown at each multiple of `1 / fps` seconds, from the first on.

    Args:
        fps: frames a second; a clip that would have more than `max_frames` is sampled half as
            often, and again, until it fits.
        max_frames: at least 2.
        max_pixels: of a frame; larger ones are scaled down while decoding, so that a long clip in
            high resolution fits into memory.

    Raises:
        DocumentError: missing, without a picture, or so damaged that it cannot be decoded. Of a
            file that is cut short in a container that allows it (Matroska), the frames that are
            there are read.
        ValueError: a rate, number of frames or of pixels that no clip can have.
    """
    if not 0 < fps < math.inf or max_frames < 2 or max_pixels < 1:
        raise ValueError(
            "fps must be above 0, max_frames at least 2 and max_pixels at least 1, received "
            f"{fps}, {max_frames} and {max_pixels}"
        )
    kept: list[np.ndarray] = []
    interval, number = 1 / fps, 0
    with _video_errors(path), av.open(path) as container:
        if not container.streams.video:
            raise DocumentError(path, "holds no video")
        for time, frame in _shown(container, max_pixels):
            while number * interval < time - _SAME_TIME:
                kept.append(frame)
                number += 1
                if len(kept) > max_frames:
                    kept, interval, number = kept[::2], 2 * interval, (number + 1) // 2
    if not kept:
        raise DocumentError(path, "holds no frame that can be shown")
    return Clip(np.stack(kept), interval)


def _shown(container: InputContainer, max_pixels: int) -> Iterator[tuple[float, np.ndarray]]:
    """Each frame, and the time until which it is shown, counted from the first frame."""
    begin, until, last = None, 0.0, None
    for picture in container.decode(video=0):
        if picture.time is None:
            continue
        begin = picture.time if begin is None else begin
        if last is not None:
            yield picture.time - begin, last
        last = _pixels(picture, max_pixels)
        shown_for = float((picture.duration or 0) * (picture.time_base or 0))
        until = picture.time - begin + max(shown_for, 2 * _SAME_TIME)
    if last is not None:
        yield until, last


def _pixels(picture: av.VideoFrame, max_pixels: int) -> np.ndarray:
    shrink = min(1.0, math.sqrt(max_pixels / (picture.width * picture.height)))
    width, height = max(1, int(picture.width * shrink)), max(1, int(picture.height * shrink))
    pixels = picture.to_ndarray(format="rgb24", width=width, height=height)
    return np.rot90(pixels, picture.rotation // 90)


@contextmanager
def _video_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise DocumentError(path, "does not exist") from None
    except IsADirectoryError:
        raise DocumentError(path, "is a folder, not a video") from None
    except FFmpegError as error:
        raise DocumentError(path, f"is not a video that can be read ({error.strerror})") from None
