"""What is wrong with position ids: the faults by name, and the verdict on a call.

A fault is named for a row only if its recipe gives the ids seen at all tokens of that row, exactly,
and the scheme does not. So a name is evidence, never a guess, and a new fault is one entry of
`FAULTS`. `guard.py` says where calls come from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from torch import Tensor

from . import recipes
from .calls import Call
from .schemes import IMAGE, KINDS, VIDEO


@dataclass(frozen=True, slots=True)
class Finding:
    """One row whose ids are not those expected.

    Args:
        row: its number; None if the fault is the call's.
        fault: a name in `FAULTS`.
        harmless: all ids are off by the same, which rotary attention does not see.
        evidence: token, expected and seen ids, and what the seen ones equal.
    """

    row: int | None
    fault: str
    harmless: bool
    evidence: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What is to be said of one call.

    Args:
        findings: at most one a row; none if all is right.
        num_rows: in the call.
        unjudged: why nothing can be said, if so.
        remarks: what it rests on and what it leaves out: sentences without their full stops.
    """

    findings: tuple[Finding, ...]
    num_rows: int
    unjudged: str | None = None
    remarks: tuple[str, ...] = ()

    @property
    def is_right(self) -> bool:
        """Whether the call was judged, and attention saw what it must see."""
        return self.unjudged is None and all(finding.harmless for finding in self.findings)

    @property
    def faults(self) -> set[str]:
        """Names of all faults found, harmless ones too."""
        return {finding.fault for finding in self.findings}

    def __str__(self) -> str:
        return " ".join([self._said(), *(f"{remark}." for remark in self.remarks)])

    def _said(self) -> str:
        if self.unjudged is not None:
            return f"Positions not judged: {self.unjudged}."
        if not self.findings:
            rows = f"all {self.num_rows} rows" if self.num_rows > 1 else "1 row"
            return f"Positions are right in {rows}."
        harmful = [finding for finding in self.findings if not finding.harmless]
        whole = f"of {self.num_rows} row{'s' if self.num_rows > 1 else ''}"
        if any(finding.row is None for finding in harmful):
            said = ["Positions cannot be right."]
        elif harmful:
            said = [f"Positions are wrong in {len(harmful)} {whole}."]
        else:
            said = [f"Positions are right, but for a constant in {len(self.findings)} {whole}."]
        kinds = dict.fromkeys((finding.harmless, finding.fault) for finding in self.findings)
        for harmless, name in sorted(kinds):
            alike = [f for f in self.findings if (f.harmless, f.fault) == (harmless, name)]
            rows = [str(finding.row) for finding in alike if finding.row is not None]
            where = f" ({'rows' if len(rows) > 1 else 'row'} {', '.join(rows)})" if rows else ""
            fault = _NAMED[name]
            told = ", harmless: attention sees differences only" if harmless else ""
            said.append(f"{name}{where}{told}: {fault.cause}. Evidence: {alike[0].evidence}.")
            said.append(f"Mend: {fault.mend}.")
        return " ".join(said)


Recipe = Callable[[Call, Sequence[Call]], Iterator[tuple[Tensor, str]]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A way in which position ids go wrong.

    Args:
        name: one word.
        cause, mend: a sentence each, without its full stop.
        recipe: from a call of one row and the calls before it: ids `[3, L]` that this fault would
            have given, and what they are in words. None: named by `judge` when no recipe fits.
        shifts: it can also move all ids alike, which does no harm.
    """

    name: str
    cause: str
    mend: str
    recipe: Recipe | None = field(default=None, repr=False)
    shifts: bool = False


_PASS_IDS = "compute `padded_position_ids(...)` and pass it as `position_ids`"

# in order: where two recipes give the ids seen, the first is named
FAULTS = (
    Fault(
        "flattened",
        "the model was called without token types or grids (`mm_token_type_ids`, "
        "`image_grid_thw`), or its wrapper passes only embeddings on, as `ColQwen2ForRetrieval` of "
        "transformers does, or a step behind a cache was called without `position_ids`, so image "
        "tokens were numbered like text",
        f"{_PASS_IDS}; for a step, one more than the largest id before it",
        recipes.flattened,
    ),
    Fault(
        "padding",
        "the ids were made without the attention mask of the call, or for padding on another side",
        "make ids, mask and tokens with one padding side, and pass `attention_mask` to "
        "`padded_position_ids(...)` too",
        recipes.padding,
        shifts=True,
    ),
    Fault(
        "stale",
        "ids of an earlier call were used again: the model keeps `rope_deltas` of the last call "
        "with grids and adds them when it gets embeddings only, or the caller kept `position_ids`",
        f"for every batch anew, {_PASS_IDS}; or set the model's `rope_deltas` to None between "
        "batches; for a step behind a cache, pass one more than the largest id before it",
        recipes.stale,
        shifts=True,
    ),
    Fault(
        "constant_time",
        "the temporal row stands still over a clip, so all its frames share one time, as "
        "`get_vision_position_ids` of transformers 5.3 had it",
        f"use a transformers that advances it, or {_PASS_IDS}",
        recipes.constant_time,
    ),
    Fault(
        "transposed",
        "the ids belong to grids with height and width exchanged, or their own rows are",
        "keep grids and rows of ids in the order time, height, width, and cut tokens row by row",
        recipes.transposed,
    ),
    Fault(
        "swapped_time",
        "the ids belong to grids with time and another side exchanged, or their own rows are",
        "keep grids and rows of ids in the order time, height, width",
        recipes.swapped_time,
    ),
    Fault(
        "other_scheme",
        "the ids follow another scheme than the model was trained with",
        "name one scheme for training and use, and pass it as `scheme` to "
        "`padded_position_ids(...)`; if the model is of the other one, pass it to `watch(...)`",
        recipes.other_scheme,
    ),
    Fault(
        "misfit",
        "token ids, token types and grids of the call do not fit each other, so no ids are right "
        "for it",
        "pass token types and grids of this very batch, grids in the order time, height, width, "
        "one a placeholder run",
    ),
    Fault(
        "shifted",
        "all ids of a row are off by the same",
        "nothing needs mending, unless a position is compared with others than those of its row",
    ),
    Fault(
        "unexplained",
        "no known fault gives these ids",
        _PASS_IDS,
    ),
)
_NAMED = {fault.name: fault for fault in FAULTS}


def judge(call: Call, earlier: Sequence[Call] = ()) -> Verdict:
    """Which rows of a call got other positions than its scheme gives, and how they came about.

    Args:
        earlier: calls of the same model before it, the last one last.
    """
    verdict = _judged(call, earlier)
    return replace(verdict, remarks=(call.premise,)) if call.premise else verdict


def _judged(call: Call, earlier: Sequence[Call]) -> Verdict:
    num_rows = call.seen.shape[1]
    if call.why_unjudged:
        return Verdict((), num_rows, call.why_unjudged)
    if call.contradictions:
        found = [Finding(row, "misfit", False, told) for row, told in call.contradictions]
        return Verdict(tuple(found), num_rows)
    if call.right_rows.all():
        return Verdict((), num_rows)
    rows = call.rows()
    found = [_finding(number, row, earlier) for number, row in enumerate(rows)]
    misfits = [finding for finding in found if finding is not None and finding.fault == "misfit"]
    findings = [finding for finding in found if finding is not None and finding not in misfits]
    # a row whose ids are explained without its grids needs no other explanation
    if misfits or (call.expected is None and not any(row.expected is None for row in rows)):
        untold = _untold_grids(call) or _foreign_grids(call)
        if untold is None:
            findings.append(Finding(None, "misfit", False, call.misfit))
        elif not any(not finding.harmless for finding in findings):
            return Verdict((), num_rows, untold)
    return Verdict(tuple(findings), num_rows)


def _finding(number: int, row: Call, earlier: Sequence[Call]) -> Finding | None:
    real = row.real[0]
    seen = row.seen[:, 0, real]  # [3, tokens]
    if row.right_rows.all() or not real.any():
        return None
    harmless, rest = False, "misfit"
    where = f"row {number}: the right ids are not known ({row.misfit})"
    if row.expected is not None:
        difference = seen - row.expected[:, 0, real]
        # behind a cache there are other keys to compare with
        harmless = row.past is None and bool((difference == difference[:, :1]).all())
        rest = "shifted" if harmless else "unexplained"
        place = int(difference.any(0).nonzero()[0])
        token = int(real.nonzero()[place])
        kind = KINDS.get(int(row.types[0, token]), "text")
        where = (
            f"row {number}, token {token} ({kind}{_behind(row)}): expected "
            f"{_triple(row.expected[:, 0, token])}, seen {_triple(row.seen[:, 0, token])}"
        )
    for fault in FAULTS:
        if fault.recipe is None or (harmless and not fault.shifts):
            continue
        for ids, what in fault.recipe(row, earlier):
            if (ids[:, real] == seen).all():
                evidence = f"{where}; the ids seen are {what}"
                return Finding(number, fault.name, harmless, evidence)
    return Finding(number, rest, harmless, where)


def _untold_grids(call: Call) -> str | None:
    """That the call has placeholders of images or clips but no grids for any, if so."""
    for kind, grid_thw in ((IMAGE, call.image_grid_thw), (VIDEO, call.video_grid_thw)):
        name = f"{KINDS[kind]}_grid_thw"
        if (call.types == kind).any() and grid_thw is None:
            return (
                f"the call does not tell its {name}, and its ids are not one-dimensional: "
                f"pass {name} to watch(...)"
            )
    return None


def _foreign_grids(call: Call) -> str | None:
    """That the grids given to the guard are not those of the call, if so."""
    if call.is_told:
        return f"the grids given to watch(...) do not fit it: {call.misfit}"
    return None


def _behind(row: Call) -> str:
    return "" if row.past is None else f", behind {row.past.length} tokens in the cache"


def _triple(ids: Tensor) -> str:
    return f"({', '.join(f'{value:g}' for value in ids.tolist())})"
