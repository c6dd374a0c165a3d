"""Checks of a model by itself, of whichever library its files are, before anybody relies on it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from colfolio.batch import Packed
from colfolio.data.prompts import QUERY_SLOT, Templates
from colfolio.diagnosis.preflight import input_checks
from colfolio.diagnosis.preflight.check import Check, run_checks
from colfolio.diagnosis.preflight.input_checks import POSITIONS
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
from colfolio.diagnosis.preflight.vector_checks import (
    ADAPTER,
    ALONE,
    APART,
    ROUNDING,
    SAVED,
    adapter_works,
    alike,
    largest,
    most_apart,
    tells_apart,
)
from colfolio.errors import (
    CheckpointError,
    ColfolioError,
    NotFiniteError,
    OtherBaseError,
    TemplatesError,
    TensorsError,
)
from colfolio.models.adapters import adapter_in, has_adapter, save_adapter
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
from colfolio.models.precision import SettledPrecision
from colfolio.models.retriever import Retriever
from colfolio.models.shell import Shell, shell_of
from colfolio.models.weights import listed
from colfolio.mrope import IMAGE, VIDEO, Verdict, watch

LOADS, TEMPLATE = "loads", "template"
_ENDS = END_TOKEN * NUM_END_TOKENS
KNOWN_QUERIES = {
    "colpali-engine from 0.3.11": QUERY_SLOT + _ENDS,
    "colpali-engine up to 0.3.10": PREFIX + QUERY_SLOT + _ENDS,
    "transformers 5": f"{PREFIX}{QUERY_SLOT}{_ENDS}\n",
}
_PADDING = 3  # tokens beyond the longest row, so that every row is padded
_NUM_FRAMES = 4
_CAUSES: dict[type[CheckpointError], str] = {
    OtherBaseError: "adapter_of_another_base",
    NotFiniteError: "not_finite",
    TemplatesError: "wrong_template",
}
_LENIENT = (
    "Libraries that read less strictly load such files all the same, and what is missing or of "
    "another shape is then drawn at random, or left out"
)
_PRECISIONS: dict[torch.dtype, SettledPrecision] = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}


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
            APART: apart,
            ALONE: batch,
            SAVED: round_trip,
        }
        if has_adapter(subjects[0].retriever):
            asked = {ADAPTER: adapter} | asked
        yield from run_checks({name: partial(ask, subjects[0]) for name, ask in asked.items()})


def loads(location: Location, device: str | None = None) -> tuple[Subject | None, Check]:
    """Read a model strictly, twice: every tensor out of the files, and both times the same."""
    is_adapter = is_adapter_folder(location.folder)
    try:
        retriever, again = (read(location, device) for _ in range(2))
    except TensorsError as error:
        cause = "adapter_not_loaded" if is_adapter else "fresh_tensors"
        told = f"{str(error).removesuffix('.')}. {_LENIENT}"
        return None, Check(LOADS, False, told, cause)
    except CheckpointError as error:
        return None, Check(LOADS, False, str(error), _CAUSES.get(type(error), ""))
    subject = subject_of(retriever, location.folder, is_adapter=is_adapter)
    return subject, _loaded(subject, again)


def _loaded(subject: Subject, again: Retriever) -> Check:
    """What two loads of a model say."""
    weights, loaded = subject.retriever.weights(), adapter_in(subject.retriever)
    told = f"{len(weights)} tensors for {subject.library}"
    if subject.retriever.fingerprint() != again.fingerprint():
        other = [name for name, one in again.weights().items() if not one.equal(weights[name])]
        told += f", and a second load gives others, {listed(other)}: they are drawn at each load"
        return Check(LOADS, False, told, "fresh_tensors")
    told += f" and {len(loaded[1])} of an adapter" if loaded else ""
    return Check(LOADS, True, f"{told}, each out of the files; two loads give the same")


def adapter(subject: Subject) -> Check:
    """The adapter changes vectors, and is of the base that it lies on."""
    return adapter_works(subject.retriever, probe_rows(subject.retriever), "fp32")


def apart(subject: Subject) -> Check:
    """Vectors are finite, of length 1, and others for other rows."""
    return tells_apart(subject.retriever, probe_rows(subject.retriever))


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
    sides, most = (rows.queries, rows.documents), _rounding(subject.retriever)
    if subject.is_ours:
        found = largest(_alone_and_packed(retriever, each) for each in sides)
        return alike(ALONE, found, most, f"{found:.1e}, in a packed batch", "padding_side")
    library = library_model(
        retriever, merged_weights(retriever), is_retrieval=is_retrieval(subject)
    )
    by_side = {
        side: largest(_padding_effect(library, each, side) for each in sides) for side in SIDES
    }
    told = ", ".join(f"{found:.1e} padded on the {side}" for side, found in by_side.items())
    return alike(ALONE, largest(by_side.values()), most, told, "padding_side")


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
    found = largest(
        most_apart(_packed(retriever, each), _packed(back, each))
        for each in (rows.queries, rows.documents)
    )
    told = f"{found:.1e}, once written for {subject.library} and read back"
    return alike(SAVED, found, _rounding(retriever), told, "fresh_tensors")


def _rounding(retriever: Retriever) -> float:
    """What it makes of vectors, by the narrowest dtype; a projection may be wider than the rest."""
    dtypes = {weight.dtype for weight in retriever.weights().values()}
    return max(ROUNDING[_PRECISIONS.get(dtype, "fp32")] for dtype in dtypes)


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
    return most_apart(alone, _packed(retriever, packed))


def _padding_effect(library: LibraryModel, packed: Packed, side: Side) -> float:
    """How far vectors in a batch that is padded on a side are from those of rows alone."""
    rows = [packed.rows(row, row + 1) for row in range(len(packed))]
    alone = [library.rows(row, side, 0)[0] for row in rows]
    return most_apart(alone, library.rows(packed, side, _PADDING))
