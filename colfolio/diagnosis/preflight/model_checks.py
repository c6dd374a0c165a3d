"""Checks of a model by itself, of whichever library its files are, before anybody relies on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from colfolio.batch import Packed
from colfolio.data.prompts import QUERY_SLOT, Templates
from colfolio.diagnosis.preflight import input_checks
from colfolio.diagnosis.preflight.check import Check, run_checks
from colfolio.diagnosis.preflight.library_model import (
    SIDES,
    LibraryModel,
    Side,
    library_model,
)
from colfolio.diagnosis.preflight.subject import (
    Subject,
    is_retrieval,
    library_strings,
    merged_weights,
    place_of,
    probe_rows,
    read,
    subject_of,
)
from colfolio.errors import CheckpointError, ColfolioError
from colfolio.models.adapters import adapter_in, save_adapter
from colfolio.models.encoding import evaluating
from colfolio.models.formats import Found, write
from colfolio.models.formats.chat import whole_query
from colfolio.models.formats.usage import (
    END_TOKEN,
    NUM_END_TOKENS,
    PREFIX,
)
from colfolio.models.hub import Location, locate
from colfolio.models.lora.files import is_adapter_folder
from colfolio.models.retriever import Retriever
from colfolio.models.shell import Shell, shell_of
from colfolio.models.weights import listed
from colfolio.mrope import IMAGE, VIDEO, Verdict, watch

LOADS, POSITIONS, TEMPLATE, BATCH, ROUND_TRIP = (
    "loads",
    "positions",
    "template",
    "a row does not depend on its batch",
    "saved and loaded alike",
)
_ENDS = END_TOKEN * NUM_END_TOKENS
KNOWN_QUERIES = {
    "colpali-engine from 0.3.11": QUERY_SLOT + _ENDS,
    "colpali-engine up to 0.3.10": PREFIX + QUERY_SLOT + _ENDS,
    "transformers 5": f"{PREFIX}{QUERY_SLOT}{_ENDS}\n",
}
_PADDING = 3  # tokens beyond the longest row, so that every row is padded
_WIDE, _NARROW = 1e-4, 5e-2  # of the numbers of a unit vector: float32, half precision
_NUM_FRAMES = 4


def check_model(
    path_or_id: str, revision: str | None = None, device: str | None = None
) -> Iterator[Check]:
    """The checks of a model, one after another; only the first if it does not load.

    Raises:
        CheckpointError: there is no such folder or hub id.
    """
    location = locate(path_or_id, revision)
    subjects: list[Subject] = []

    def load() -> Check:
        subject, check = loads(location, device)
        subjects.extend([subject] if subject else [])
        return check

    yield from run_checks({LOADS: load})
    if subjects:
        asked = {
            POSITIONS: positions,
            TEMPLATE: template,
            BATCH: batch,
            ROUND_TRIP: round_trip,
        }
        yield from run_checks({name: partial(ask, subjects[0]) for name, ask in asked.items()})


def loads(location: Location, device: str | None = None) -> tuple[Subject | None, Check]:
    """Read a model strictly, twice: every tensor out of the files, and both times the same."""
    is_adapter = is_adapter_folder(location.folder)
    try:
        retriever, again = (read(location, device) for _ in range(2))
    except CheckpointError as error:
        cause = "adapter_not_loaded" if is_adapter else "fresh_tensors"
        told = (
            f"{error}. Libraries that read less strictly load such files all the same, and what is "
            "missing or of another shape is then drawn at random, or left out"
        )
        return None, Check(LOADS, False, told, cause)
    subject = subject_of(retriever, location.folder, is_adapter=is_adapter)
    return subject, _loaded(subject, again)


def _loaded(subject: Subject, again: Retriever) -> Check:
    """What two loads of a model say."""
    weights, adapter = subject.retriever.weights(), adapter_in(subject.retriever)
    told = f"{len(weights)} tensors for {subject.library}"
    if subject.retriever.fingerprint() != again.fingerprint():
        other = [name for name, one in again.weights().items() if not one.equal(weights[name])]
        told += f", and a second load gives others, {listed(other)}: they are drawn at each load"
        return Check(LOADS, False, told, "fresh_tensors")
    if adapter is not None:
        told += f" and {len(adapter[1])} of an adapter"
        if not any(bool(one.any()) for name, one in adapter[1].items() if ".lora_B." in name):
            told += ", whose matrices B are all zero, so that it changes nothing"
            return Check(LOADS, False, told, "adapter_not_loaded")
    return Check(LOADS, True, f"{told}, each out of the files; two loads give the same")


def positions(subject: Subject) -> Check:
    """The positions that the text tower gets when the library calls it that the files are for."""
    if subject.is_ours:
        return input_checks.positions(subject.retriever, probe_rows(subject.retriever))
    shell = shell_of(place_of(subject))
    asked = {"image": shell.inputs(shell.blank(1), IMAGE)}
    if shell.takes_clips:
        asked["clip"] = shell.inputs(shell.blank(_NUM_FRAMES), VIDEO)
    for what, inputs in asked.items():
        verdict = _verdict(shell, inputs)
        if not verdict.is_right:
            told = f"{what}, as {shell.name} is called: {verdict}"
            return Check(POSITIONS, False, told, input_checks.cause_of(verdict))
    told = f"right for {' and '.join(asked)}, as {shell.name} is called"
    return Check(POSITIONS, True, told)


def template(subject: Subject) -> Check:
    """The library writes the strings that the model was trained with, as far as its files tell."""
    retriever, strings = subject.retriever, subject.retriever.contract.templates
    tokens = input_checks.templates(retriever, probe_rows(retriever))
    if not tokens.passed:
        return tokens
    query = whole_query(strings)
    known = next((name for name, one in KNOWN_QUERIES.items() if one == query), "none of the known")
    told = f"queries are {_short(query)} ({known})"
    library = library_strings(subject)
    if library is not None and _both(library) != _both(strings):
        written, page = _both(library)
        told += (
            f" by its contract, but {subject.format} writes {_short(written)} and pages {page!r}; "
            "give it whole strings, or train with its own"
        )
        return Check(TEMPLATE, False, told, "wrong_template")
    assumed = [each for each in retriever.contract.assumed if "quer" in each]
    return Check(TEMPLATE, True, "; ".join([told, *assumed]))


def batch(subject: Subject) -> Check:
    """Vectors of rows alone are those in a batch; padded on either side where the library pads."""
    retriever, rows = subject.retriever, probe_rows(subject.retriever)
    sides = rows.queries, rows.documents
    if subject.is_ours:
        apart = max(_alone_and_packed(retriever, each) for each in sides)
        return _alike(BATCH, apart, retriever, f"{apart:.1e}, in a packed batch", "padding_side")
    library = library_model(
        retriever, merged_weights(retriever), is_retrieval=is_retrieval(subject)
    )
    found = {side: max(_padding_effect(library, each, side) for each in sides) for side in SIDES}
    told = ", ".join(f"{apart:.1e} padded on the {side}" for side, apart in found.items())
    return _alike(BATCH, max(found.values()), retriever, told, "padding_side")


def round_trip(subject: Subject) -> Check:
    """Written again in the same format and read back, the model gives the same vectors."""
    retriever, rows = subject.retriever, probe_rows(subject.retriever)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        if subject.base is not None:
            save_adapter(retriever, folder, str(subject.base.absolute()))
        else:
            config, weights = retriever.backbone.config, retriever.weights()
            whole = Found(subject.format, config, weights, retriever.tokenizer, retriever.contract)
            write(whole, folder, subject.format)
        back = read(Location(folder), str(retriever.device))
    apart = max(
        _apart(_packed(retriever, each), _packed(back, each))
        for each in (rows.queries, rows.documents)
    )
    told = f"{apart:.1e}, once written for {subject.library} and read back"
    return _alike(ROUND_TRIP, apart, retriever, told, "fresh_tensors")


def _verdict(shell: Shell, inputs: Mapping[str, Tensor]) -> Verdict:
    """What the guard says of a call of another library's model."""
    try:
        with torch.no_grad(), watch(shell.model) as seen:
            shell.model(**inputs)
        return seen.verdict
    except (ValueError, TypeError, RuntimeError, IndexError, AttributeError) as error:
        raise ColfolioError(f"{shell.name} cannot be asked: {error}") from error


def _both(strings: Templates) -> tuple[str, str]:
    return whole_query(strings), strings.document


def _short(query: str) -> str:
    return repr(query.replace(_ENDS, f" {NUM_END_TOKENS} x {END_TOKEN}"))


@torch.no_grad()
def _packed(retriever: Retriever, packed: Packed) -> list[Tensor]:
    with evaluating(retriever):
        return [row.float().cpu() for row in retriever(packed.to(retriever.device))]


def _alone_and_packed(retriever: Retriever, packed: Packed) -> float:
    """How far vectors in a packed batch are from those of rows alone."""
    rows = [packed.rows(row, row + 1) for row in range(len(packed))]
    alone = [_packed(retriever, row)[0] for row in rows]
    return _apart(alone, _packed(retriever, packed))


def _padding_effect(library: LibraryModel, packed: Packed, side: Side) -> float:
    """How far vectors in a batch that is padded on a side are from those of rows alone."""
    rows = [packed.rows(row, row + 1) for row in range(len(packed))]
    alone = [library.rows(row, side, 0)[0] for row in rows]
    return _apart(alone, library.rows(packed, side, _PADDING))


def _apart(these: Sequence[Tensor], those: Sequence[Tensor]) -> float:
    """The largest difference of a number of a vector; infinite where there are other vectors."""
    pairs = list(zip(these, those, strict=True))
    if any(one.shape != other.shape for one, other in pairs):
        return float("inf")
    return max(float((one - other).abs().max()) for one, other in pairs)


def _alike(name: str, apart: float, retriever: Retriever, told: str, cause: str) -> Check:
    is_wide = retriever.projection.weight.dtype.itemsize >= 4
    most = _WIDE if is_wide else _NARROW
    said = f"vectors differ by at most {told}"
    if apart <= most:
        return Check(name, True, said)
    return Check(name, False, f"{said}, where rounding gives {most:.0e}", cause)
