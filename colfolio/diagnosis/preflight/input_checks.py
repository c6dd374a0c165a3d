"""Whether rows enter the model as its contract says: positions, strings, and numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from colfolio.diagnosis.preflight.check import Check
from colfolio.diagnosis.signals.data_facts import truncated_share
from colfolio.diagnosis.signals.model_facts import can_reload, unlike
from colfolio.diagnosis.signals.probe_batch import ProbeBatch
from colfolio.diagnosis.signals.template_faults import template_faults
from colfolio.models.encoding import evaluating
from colfolio.models.retriever import Retriever
from colfolio.models.weights import listed
from colfolio.mrope import Verdict, watch

WEIGHTS, POSITIONS, TEMPLATES, TOKENS = (
    "weights are those of the files",
    "positions",
    "templates",
    "tokens of a row",
)


def weights_of_files(model: Retriever, base: str) -> Check:
    """A second load gives the weights that the model has, so that none was drawn at random.

    Args:
        base: folder or hub id that it was loaded from.
    """
    size = sum(tensor.nbytes for tensor in model.weights().values())
    if not can_reload(model):
        told = f"{size / 2**30:.1f} GiB, read strictly; too large or too far spread to read twice"
        return Check(WEIGHTS, True, told)
    other = unlike(model, Retriever.from_pretrained(base, device="cpu").weights())
    if not other:
        return Check(WEIGHTS, True, f"{len(model.weights())} tensors, twice alike")
    told = (
        f"{len(other)} of {len(model.weights())} tensors are others at a second load: "
        f"{listed(other)}; they are drawn anew each time, and what is learnt above them fits no "
        "other load. Draw them once and save them: colfolio init"
    )
    return Check(WEIGHTS, False, told, "fresh_tensors")


def positions(model: Retriever, rows: ProbeBatch) -> Check:
    """The positions that reach the text tower as the model runs are those of its scheme."""
    sides = rows.documents, rows.queries
    with evaluating(model), torch.no_grad(), watch(model) as seen:
        for packed in sides:
            model(packed.to(model.device))
        verdicts = seen.verdicts
    wrong = next((verdict for verdict in verdicts if not verdict.is_right), None)
    if wrong is not None:
        return Check(POSITIONS, False, str(wrong), cause_of(wrong))
    told = f"right for {rows.num_tokens} tokens of {_counted(rows)}"
    return Check(POSITIONS, True, told)


def cause_of(verdict: Verdict) -> str:
    """The name of the cause that a verdict points to."""
    harmful = [finding.fault for finding in verdict.findings if not finding.harmless]
    return f"positions_{harmful[0]}" if harmful else ""


def templates(model: Retriever, rows: ProbeBatch) -> Check:
    """Queries and documents have the tokens of the contract's strings."""
    faults = template_faults(model, rows)
    if faults:
        told = f"{' '.join(faults)} Use the tokenizer and templates that the model was trained with"
        return Check(TEMPLATES, False, told, "wrong_template")
    strings = model.contract.templates
    around = f"{strings.query} + {strings.num_query_suffix} x {strings.query_suffix}"
    told = f"{_counted(rows)} have the tokens of {around!r} and {strings.document!r}"
    return Check(TEMPLATES, True, told)


def token_counts(model: Retriever, rows: ProbeBatch) -> Check:
    """Each image has all tokens of its grid, and each token of a row a vector."""
    short = truncated_share(rows, model.collator)
    if short:
        told = (
            f"{short:.0%} of {len(rows.documents)} documents have fewer image tokens than their "
            "grids, so that the end of an image is never seen; let whole rows through, or lower "
            "max_pixels in the contract"
        )
        return Check(TOKENS, False, told, "truncated_images")
    sides = rows.documents, rows.queries
    with evaluating(model), torch.no_grad():
        made = [model(packed.to(model.device)).lengths for packed in sides]
    if not all(map(torch.equal, made, (packed.lengths for packed in sides))):
        told = f"the model gives {int(made[0].sum())} vectors for {int(sides[0].lengths.sum())}"
        return Check(TOKENS, False, f"{told} tokens of documents; one for each is needed")
    documents, queries = (_span(packed.lengths.tolist()) for packed in sides)
    told = f"documents {documents}, queries {queries}; no image is cut, each token has its vector"
    return Check(TOKENS, True, told)


def _counted(rows: ProbeBatch) -> str:
    return f"{len(rows.queries)} queries and {len(rows.documents)} documents"


def _span(counts: Sequence[int]) -> str:
    least, most = min(counts), max(counts)
    return f"{least} tokens" if least == most else f"{least} to {most} tokens"
