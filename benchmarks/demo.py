"""Runs the demo once for each seed and keeps what came of it: `python benchmarks/demo.py`.

Writes `benchmarks/results/demo.json` with the machine and the commit, and prints the table that
stands in `docs/benchmarks.md`.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results" / "demo.json"
COLUMNS = {
    "ndcg@5": "nDCG@5",
    "recall@1": "recall@1",
    "unseen_ndcg@5": "nDCG@5, unseen titles",
    "baseline_ndcg@5": "blind baseline",
    "chance_ndcg@5": "chance",
    "page_ndcg@5": "pages, best line",
    "page_union_ndcg@5": "pages, union",
    "page_chance_ndcg@5": "pages, chance",
}
TIMES = ("prepare_seconds", "train_seconds", "total_seconds")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("colfolio-demo-seeds"))
    arguments = parser.parse_args()
    runs = [run(seed, arguments.out / f"seed-{seed}") for seed in arguments.seeds]
    record = {"machine": machine(), "commit": commit(), "runs": runs}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=2) + "\n")
    print(table(runs))


def run(seed: int, out: Path) -> dict[str, float]:
    command = [sys.executable, "-m", "colfolio.cli", "demo", "--seed", str(seed), "--out", str(out)]
    subprocess.run(command, check=True)
    return json.loads((out / "results.json").read_text())


def table(runs: list[dict[str, float]]) -> str:
    lines = [
        "| seed | " + " | ".join(COLUMNS.values()) + " | prepare, s | train, s | total, s |",
        "|---" * (len(COLUMNS) + len(TIMES) + 1) + "|",
    ]
    for result in runs:
        numbers = [f"{result[name]:.4f}".rstrip("0") for name in COLUMNS]
        times = [f"{result[name]:.0f}" for name in TIMES]
        lines.append(f"| {result['seed']} | " + " | ".join(numbers + times) + " |")
    first = runs[0]
    lines.append("")
    lines.append(
        f"{first['queries']} titles over {first['candidates']} headings; "
        f"{first['page_queries']} titles over {first['page_candidates']} pages."
    )
    return "\n".join(lines)


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
    return (
        f"{names[0].split(': ')[1]}, {len(names)} cores, torch {torch.__version__}"
        if names
        else (platform.processor())
    )


def commit() -> str:
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return told.stdout.strip() or "unknown"


def package() -> str:
    """The hash of the package's files as they are committed; benchmarks and docs are no part."""
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD:colfolio"],
        capture_output=True,
        text=True,
        check=False,
    )
    return told.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
