"""`colfolio positions`: which positions a model really uses on an image and on a clip."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from rich.table import Table
from rich.text import Text

from colfolio.commands.console import console
from colfolio.data.pages.images import load_image
from colfolio.data.video import Clip, load_clip
from colfolio.errors import CheckpointError, ColfolioError
from colfolio.models.contract import CONTRACT_FILE
from colfolio.models.formats import detect
from colfolio.models.formats.sentence_transformers import read_modules
from colfolio.models.hub import local_folder
from colfolio.models.retriever import Retriever
from colfolio.models.shell import Shell, shell_of
from colfolio.mrope import IMAGE, SCHEMES, VIDEO, Qwen2VL, Watch, watch

_NUM_FRAMES = 6
_MAX_FRAMES = 64
_SECONDS = 0.5  # from one blank frame to the next


def positions_command(
    model: str,
    image: Path | None = None,
    video: Path | None = None,
    revision: str | None = None,
    scheme: str | None = None,
) -> bool:
    """Print which positions a model uses, beside the right ones; whether they are right.

    Args:
        model: a checkpoint folder or hub id. What another library will call is asked as that
            library calls it, whoever wrote it, and only its configuration is read.
        image: a file to ask with; without `image` and `video` blank ones are made.
        video: a clip to ask with.
        revision: of a hub id.
        scheme: a name in `colfolio.mrope.SCHEMES`; None takes the family's.

    Raises:
        ColfolioError: the model or the file cannot be read, or the model takes no such input.
    """
    if image is not None and video is not None:
        raise ColfolioError("give --image or --video, not both")
    folder = local_folder(model, revision, with_weights=False)
    if scheme is not None and scheme not in SCHEMES:
        raise ColfolioError(f"scheme {scheme!r} is none of {', '.join(SCHEMES)}")
    place = _called_by_another(folder)
    if place is None:
        right = _ask_retriever(
            model, Retriever.from_pretrained(model, revision), image, video, scheme
        )
    else:
        right = _ask_shell(shell_of(place), image, video, scheme)
    return all(right)


def _called_by_another(folder: Path) -> Path | None:
    """Where the model lies that the code of another library calls; None if Colfolio's does.

    Our contract beside another library's files changes nothing of how that library calls them.
    """
    try:
        format = detect(folder)
    except CheckpointError:  # a model that is no retriever has positions, too
        return folder
    if format == "sentence-transformers":
        return read_modules(folder).backbone
    is_ours = format == "colfolio" or (format == "adapter" and (folder / CONTRACT_FILE).is_file())
    return None if is_ours else folder


def _ask_retriever(
    model: str, retriever: Retriever, image: Path | None, video: Path | None, scheme: str | None
) -> list[bool]:
    console().print(f"{model}: a retriever, as it encodes documents")
    documents: dict[str, np.ndarray | Clip] = {}
    side = retriever.contract.pixel_budget.factor
    blank = np.full((_NUM_FRAMES, 2 * side, 3 * side, 3), 255, np.uint8)
    if image is not None:
        documents["image"] = load_image(image)
    elif video is not None:
        most_pixels = retriever.contract.pixel_budget.max_pixels
        documents["clip"] = load_clip(
            video, retriever.contract.frame_rate, _MAX_FRAMES, most_pixels
        )
    else:
        documents["image"] = blank[0]
        if retriever.collator.prompter.video_token_id is not None:
            documents["clip"] = Clip(blank, 1 / retriever.contract.frame_rate)
    return [_as_encoded(retriever, what, document, scheme) for what, document in documents.items()]


def _as_encoded(
    retriever: Retriever, what: str, document: np.ndarray | Clip, scheme: str | None
) -> bool:
    packed = retriever.collator.documents([document]).to(retriever.device)
    told: dict[str, Any] = {}
    if isinstance(document, Clip):  # the guard takes the grids of a packed batch as of images
        seconds = document.seconds_per_frame * retriever.contract.pixel_budget.temporal_patch
        told = {"image_grid_thw": packed.grid_thw[:0], "video_grid_thw": packed.grid_thw}
        told["second_per_grid_ts"] = [seconds]
    return _judged(retriever, lambda: retriever(packed), what, scheme, **told)


def _ask_shell(
    shell: Shell, image: Path | None, video: Path | None, scheme: str | None
) -> list[bool]:
    console().print(
        f"{shell.name} of transformers {transformers.__version__}, built from config.json with one "
        "layer in each tower: positions do not depend on weights"
    )
    right = []
    if video is None:
        frames = shell.blank(1) if image is None else load_image(image)[None]
        inputs = shell.inputs(frames, IMAGE)
        right.append(_judged(shell.model, lambda: shell.model(**inputs), "image", scheme))
    if video is not None or (image is None and shell.takes_clips):
        clip = Clip(shell.blank(_NUM_FRAMES), _SECONDS) if video is None else _clip(video)
        clip_inputs = shell.inputs(clip.frames, VIDEO, clip.seconds_per_frame)
        right.append(_judged(shell.model, lambda: shell.model(**clip_inputs), "clip", scheme))
    return right


def _clip(path: Path) -> Clip:
    return load_clip(path, max_frames=_MAX_FRAMES)


def _judged(
    model: Any, call: Callable[[], object], what: str, scheme: str | None, **told: Any
) -> bool:
    """Run a call under the guard, and print its table and verdict.

    Args:
        told: to the guard, of what the call does not say.
    """
    try:
        with torch.no_grad(), watch(model, scheme, **told) as seen:
            call()
        verdict = seen.verdict
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ColfolioError(f"{type(model).__name__} cannot be asked ({what}): {error}") from error
    console().print(_table(seen, what))
    console().print(Text(f"{what}: {verdict}", style="green" if verdict.is_right else "red"))
    note = _note(seen)
    if note:
        console().print(Text(f"{what}: {note}", style="yellow"))
    return verdict.is_right


def _note(seen: Watch) -> str:
    """Where text behind a clip goes on in the paper, if `transformers` has it elsewhere."""
    call = seen.calls[-1]
    if not isinstance(call.scheme, Qwen2VL) or call.scheme.behind_time:
        return ""
    published = replace(call, scheme=replace(call.scheme, behind_time=True))
    if call.expected is None or published.expected is None:
        return ""
    behind, meant = int(call.expected.max(0)[0][0, -1]), int(published.expected[0, 0, -1])
    if behind == meant:
        return ""
    return (
        f"the last token lies at {behind}, as in transformers 5, which goes on behind the longer "
        f"of height and width; in the paper and in transformers 4 it lies at {meant}, behind the "
        "clip's last time as well (schemes `…_published`). Keep to the one that the weights know."
    )


def _table(seen: Watch, what: str) -> Table:
    """Seen and right positions of the first tokens; a row that differs is marked."""
    table = Table(title=what, title_justify="left", box=None, pad_edge=False)
    for name in ("token", "kind", "seen t h w", "right t h w", ""):
        table.add_column(name, justify="right" if name.endswith("w") else "left")
    for token in seen.table():
        differs = token.seen != token.expected
        table.add_row(
            str(token.index),
            token.kind,
            " ".join(f"{place:3d}" for place in token.seen),
            " ".join(f"{place:3d}" for place in token.expected),
            "differs" if differs else "",
        )
    return table
