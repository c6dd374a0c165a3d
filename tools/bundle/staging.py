"""Examines all PDFs in processes and keeps the answers, so that a rerun examines what is new."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from itertools import repeat
from pathlib import Path
from typing import Any

from tools.bundle.candidate import Candidate, Source, candidate_from_json
from tools.bundle.examine import examine
from tools.bundle.sources import find_sources

# What makes a staged extract: answers of other versions of these modules are not used again.
_SHAPING = ("candidate", "distil", "examine", "extract", "outline", "resources", "sources", "text")
_SAVED_EVERY = 200


def stage_candidates(packages: Path, staging: Path, workers: int) -> list[Candidate]:
    """The candidates of all PDFs below the folder of packages.

    Args:
        packages: unpacked packages.
        staging: made if missing; extracts and answers stay here.
        workers: processes.
    """
    staging.mkdir(parents=True, exist_ok=True)
    store = staging / "answers.json"
    version = code_version()
    known: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    known = known if known.get("version") == version else {"version": version}
    sources = list(find_sources(packages))
    fresh = [(path, source) for path, source in sources if str(path) not in known]
    for number, (path, answer) in enumerate(_examined(fresh, staging, workers), start=1):
        known[str(path)] = asdict(answer) if answer else None
        if number % _SAVED_EVERY == 0:
            print(f"examined {number} of {len(fresh)}", flush=True)
            store.write_text(json.dumps(known))
    store.write_text(json.dumps(known))
    found = [(source, known[str(path)]) for path, source in sources]
    return [_newly_named(candidate_from_json(answer), source) for source, answer in found if answer]


def code_version() -> str:
    """A hash of the code that makes the staged extracts."""
    folder = Path(__file__).parent
    codes = [(folder / f"{name}.py").read_bytes() for name in _SHAPING]
    return hashlib.sha256(b"".join(codes)).hexdigest()


def _examined(
    jobs: Sequence[tuple[Path, Source]], staging: Path, workers: int
) -> Iterator[tuple[Path, Candidate | None]]:
    paths, sources = [path for path, _ in jobs], [source for _, source in jobs]
    with ProcessPoolExecutor(workers) as pool:
        yield from zip(
            paths, pool.map(examine, paths, sources, repeat(staging), chunksize=4), strict=True
        )


def _newly_named(candidate: Candidate, source: Source) -> Candidate:
    """A candidate with its source as it is told today, holders found in the text kept."""
    holders = source.holders or candidate.source.holders
    return replace(candidate, source=replace(source, holders=holders))
