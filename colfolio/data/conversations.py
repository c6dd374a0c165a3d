"""Questions about images and videos, and their answers, for next-token training.

A dataset is a folder with one or more Parquet or JSONL files a split: `train.jsonl`,
`train.parquet`, `data/train-00000-of-00003.parquet`, or all files in `train/`. Columns: `question`,
`answer`, and in each row one of `image`, `video` or `frames` (a list of images), beside `frames`
optionally `seconds_per_frame`. An image is a path below the folder, or in Parquet encoded bytes, or
a struct of both as `datasets` writes it; a video is a path.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import UInt8

from colfolio.data.documents import content_hash
from colfolio.data.formats.conversation_files import SECONDS, SEEN, read_table
from colfolio.data.pages.images import load_image
from colfolio.data.video import Clip, load_clip
from colfolio.errors import DatasetError, DocumentError

_MOST_FRAMES = 768


class ConversationDataset:
    """One split: what is asked about what is seen, and what is to be answered.

    Args:
        table: columns as at the top of the file, checked.
        root: the folder that paths are relative to.
        split: its name.

    Attributes:
        questions, answers: in the order of the files.
    """

    def __init__(self, table: pa.Table, root: Path, split: str) -> None:
        self.name, self.split = root.resolve().name, split
        self.questions: list[str] = table.column("question").to_pylist()
        self.answers: list[str] = table.column("answer").to_pylist()
        self._table, self._root = table, root

    def __len__(self) -> int:
        return len(self.answers)

    def visual(
        self, row: int, frame_rate: float, max_pixels: int
    ) -> UInt8[np.ndarray, "_H _W 3"] | Clip:
        """The decoded image or clip of a row.

        Args:
            frame_rate: frames a second that are read of a video, and of frames without a time.
            max_pixels: of a video's frame, see `load_clip`.

        Raises:
            DatasetError: it cannot be read; row and reason are named.
        """
        kind, value = self._seen(row)
        try:
            if kind == "video":
                return load_clip(self._root / _source(value), frame_rate, _MOST_FRAMES, max_pixels)
            if kind == "image":
                return self._image(value)
            frames = [self._image(each) for each in value]
        except DocumentError as error:
            raise DatasetError(f"{self._where(row)}: {error}") from None
        sizes = sorted({frame.shape[:2] for frame in frames})
        if len(sizes) > 1:
            raise DatasetError(
                f"{self._where(row)}: the frames of a clip are of one size, here of {sizes}"
            )
        return Clip(np.stack(frames), self._seconds(row) or 1 / frame_rate)

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the content: texts, images and videos, in order."""
        digest = hashlib.sha256()
        for row in range(len(self)):
            kind, value = self._seen(row)
            seen = [self._digest(each) for each in (value if kind == "frames" else [value])]
            told = [self.questions[row], self.answers[row], kind, self._seconds(row), seen]
            digest.update(json.dumps(told).encode())
        return digest.hexdigest()

    def _seen(self, row: int) -> tuple[str, Any]:
        """Which column shows what the row is about, and its value there."""
        cells = (
            (kind, self._table.column(kind)[row])
            for kind in SEEN
            if kind in self._table.column_names
        )
        return next((kind, cell.as_py()) for kind, cell in cells if cell.is_valid)

    def _seconds(self, row: int) -> float | None:
        has_any = SECONDS in self._table.column_names
        value = self._table.column(SECONDS)[row].as_py() if has_any else None
        return None if value is None else float(value)

    def _image(self, value: Any) -> UInt8[np.ndarray, "_H _W 3"]:
        source = _source(value)
        return load_image(source if isinstance(source, bytes) else self._root / source)

    def _digest(self, value: Any) -> str:
        source = _source(value)
        if isinstance(source, bytes):
            return hashlib.sha256(source).hexdigest()
        return content_hash(self._root / source)

    def _where(self, row: int) -> str:
        return f"{self.name}, split {self.split!r}, row {row + 1}"


def load_conversations(source: str | Path, split: str) -> ConversationDataset:
    """One split of a folder of conversations.

    Raises:
        DatasetError: there is no such folder or split, it is a dataset for retrieval, a file is
            damaged, a row lacks a text or what is seen or has two of it, or names a file that is
            not there or lies outside of the folder.
    """
    folder = Path(source)
    return ConversationDataset(read_table(folder, split), folder, split)


def _source(value: Any) -> Any:
    """Encoded bytes, or a path below the folder."""
    if not isinstance(value, dict):
        return value
    return value["path"] if value["bytes"] is None else value["bytes"]
