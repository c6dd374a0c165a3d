"""The loss that stays at 0.69: what holds it there, and what does not, in one command.

    python benchmarks/story_069.py [--quick] [--seeds 0 1 2] [--threads 2] [--out FOLDER]

Trains the demo's model on the demo's data, from the same random weights for a seed, over and over:

- *batch*: pairwise softplus and InfoNCE with 3, 16, 64 and 256 rows, 600 steps each;
- *rate*: pairwise with 3 and 64 rows, at a half and a seventh of the rate;
- *patience*: both with 3 rows, 4,000 steps;
- *scale*: both with 64 rows and half the initial spread of all weights;
- *temperature*: both with 64 rows, scores divided by 0.2 (0.02 on a mean over ten query tokens) and
  by 10 (such a mean with temperature 1).

Kept of each run: loss, chance level, floor, margin, spread of scores and share of first ranks every
few steps, and nDCG@5 over the validation headings at the end. Writes
`benchmarks/results/story_069.json` and `docs/stories/loss_069.png`. `--quick` does it with coloured
shapes and a few runs in two minutes, and writes into the folder of `--out` alone. The results are
written after every run, and what stands there of the same package is not run again, so that an
hour's work can be done in parts.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
from demo import commit, machine, package
from story_shapes import SHAPE, write_shapes

from colfolio.commands.prepare import prepare_command
from colfolio.config import load_settings
from colfolio.data.dataset import RetrievalDataset, load_dataset
from colfolio.demo.plan import bundled
from colfolio.evaluation import chance, mean_metrics, model_scores, ranks, relevance_of
from colfolio.models import Retriever, Shape, base_from_shape, train_tokenizer
from colfolio.training import StepReport, TrainSettings, start_training, train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "story_069.json"
PICTURE = ROOT / "docs" / "stories" / "loss_069.png"
Kind = Literal["pairwise", "info_nce"]
KINDS: tuple[Kind, Kind] = ("pairwise", "info_nce")
METRIC = "ndcg@5"
RATE = 2e-3  # the demo's
POINTS = 60  # of a curve
COLOURS = {3: "#c0392b", 16: "#e08e0b", 64: "#2471a3", 256: "#1e8449"}


@dataclass(frozen=True, slots=True)
class Arm:
    """One setting of the experiment."""

    group: str
    kind: Kind
    rows: int
    steps: int
    scale: float = 1.0
    temperature: float = 1.0
    rate: float = RATE


@dataclass(frozen=True, slots=True)
class Point:
    """Means over a stretch of steps that ends with `step`."""

    step: int
    loss: float
    chance: float
    floor: float
    margin: float
    spread: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Run:
    """An arm with a seed, and what came of it."""

    arm: Arm
    seed: int
    ndcg: float
    seconds: float
    curve: list[Point]


@dataclass(frozen=True, slots=True)
class Setting:
    """What all runs share."""

    shape: Shape
    train: RetrievalDataset
    validation: RetrievalDataset
    threads: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    results, picture = RESULTS, PICTURE
    if options.out or options.quick:
        folder = options.out or Path(tempfile.mkdtemp(prefix="story-069-"))
        results, picture = folder / RESULTS.name, folder / PICTURE.name
    for path in (results, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    arms = quick_arms() if options.quick else all_arms()
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    with tempfile.TemporaryDirectory() as scratch:
        make = quick_setting if options.quick else demo_setting
        setting = make(Path(scratch), options.threads)
        by_chance = chance_ndcg(setting.validation)
        runs = [run for run in known_runs(results) if run.arm in arms and run.seed in seeds]
        for run in new_runs(setting, arms, seeds, runs):
            runs.append(run)
            write(runs, by_chance, setting, results)
    runs.sort(key=lambda run: (arms.index(run.arm), run.seed))
    draw(runs, by_chance, picture)
    print(table(runs, by_chance))
    print(f"\n{results}\n{picture}")


def known_runs(path: Path) -> list[Run]:
    """Runs that an earlier call left, if they are of this package."""
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["package"] != package():
        return []
    return [
        Run(
            Arm(**run["arm"]),
            run["seed"],
            run["ndcg"],
            run["seconds"],
            [Point(**each) for each in run["curve"]],
        )
        for run in record["runs"]
    ]


def write(runs: list[Run], by_chance: float, setting: Setting, path: Path) -> None:
    record = {
        "machine": machine(),
        "commit": commit(),
        "package": package(),
        "chance_ndcg": by_chance,
        "candidates": len(setting.validation.corpus.ids),
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def all_arms() -> list[Arm]:
    """The whole experiment; small batches first, so that a mistake shows soon."""
    batch = [Arm("batch", kind, rows, 600) for rows in (3, 16, 64, 256) for kind in KINDS]
    patience = [Arm("patience", kind, 3, 4000) for kind in KINDS]
    scale = [Arm("scale", kind, 64, 600, scale=0.5) for kind in KINDS]
    temperature = [
        Arm("temperature", kind, 64, 600, temperature=number)
        for number in (0.2, 10.0)
        for kind in KINDS
    ]
    rate = [
        Arm("rate", "pairwise", rows, 600, rate=number)
        for number in (1e-3, 3e-4)
        for rows in (3, 64)
    ]
    return batch + scale + temperature + rate + patience


def quick_arms() -> list[Arm]:
    """What shows the direction within two minutes."""
    return [Arm("batch", kind, rows, 150) for rows in (3, 64) for kind in KINDS]


def demo_setting(scratch: Path, threads: int) -> Setting:
    """The demo's data and model."""
    prepare_command(bundled("documents"), scratch / "strips", "strip", ["train", "validation"])
    shape = load_settings(bundled("shape.yaml"), Shape)
    return _setting(scratch / "strips", shape, threads)


def quick_setting(scratch: Path, threads: int) -> Setting:
    """Coloured shapes, and a model that learns them in seconds."""
    write_shapes(scratch / "shapes", {"train": 512, "validation": 128})
    return _setting(scratch / "shapes", Shape.model_validate(SHAPE), threads)


def _setting(folder: Path, shape: Shape, threads: int) -> Setting:
    splits = load_dataset(folder, "train"), load_dataset(folder, "validation")
    return Setting(shape, *splits, threads)


def new_runs(
    setting: Setting, arms: list[Arm], seeds: list[int], known: list[Run]
) -> Iterator[Run]:
    done = {(run.arm, run.seed) for run in known}
    for seed in seeds:
        for arm in arms:
            if (arm, seed) in done:
                continue
            run = run_arm(setting, arm, seed)
            last = run.curve[-1]
            print(
                f"seed {seed}, {arm.kind}, {arm.rows} rows, {told(arm)}: loss {last.loss:.3f} "
                f"(chance {last.chance:.3f}), nDCG@5 {run.ndcg:.3f}, {run.seconds:.0f} s",
                flush=True,
            )
            yield run


def run_arm(setting: Setting, arm: Arm, seed: int) -> Run:
    begin = time.perf_counter()
    settings = TrainSettings.model_validate(
        {
            "steps": arm.steps,
            "seed": seed,
            "batch": {"rows": arm.rows, "ignore": "page"},
            "memory": {"chunk_tokens": 4096},
            "loss": {"kind": arm.kind, "temperature": arm.temperature},
            "optimiser": {
                "lr": arm.rate,
                "betas": (0.9, 0.98),
                "weight_decay": 0.01,
                "warmup_steps": min(60, arm.steps // 10),
            },
            "threads": setting.threads,
        }
    )
    retriever = base(setting, arm.scale, seed)
    reports = train(start_training(retriever, settings), setting.train)
    curve = list(points(reports, -(-arm.steps // POINTS)))
    scores = model_scores(retriever, setting.validation)
    ndcg = mean_metrics(scores, relevance_of(setting.validation), [METRIC])[METRIC]
    return Run(arm, seed, ndcg, time.perf_counter() - begin, curve)


def chance_ndcg(dataset: RetrievalDataset) -> float:
    """Of a random order of the documents."""
    relevance = relevance_of(dataset)
    return float(chance(ranks(torch.zeros(relevance.shape), relevance), METRIC).mean())


def base(setting: Setting, scale: float, seed: int) -> Retriever:
    """The model at its start, its weights drawn `scale` times as wide as its shape says."""
    backbone = setting.shape.backbone
    towers = {
        name: backbone[name] | {"initializer_range": scale * backbone[name]["initializer_range"]}
        for name in ("text_config", "vision_config")
    }
    shape = setting.shape.model_copy(update={"backbone": backbone | towers})
    texts = (query.text for query in setting.train.queries)
    return base_from_shape(shape, train_tokenizer(texts, shape.tokenizer), seed)


def points(reports: Iterator[StepReport], stretch: int) -> Iterator[Point]:
    gathered: list[StepReport] = []
    for report in reports:
        gathered.append(report)
        if len(gathered) == stretch:
            yield point(gathered)
            gathered = []
    if gathered:
        yield point(gathered)


def point(reports: list[StepReport]) -> Point:
    names = ("loss", "chance", "floor", "margin", "spread", "accuracy")
    means = [sum(getattr(report, name) for report in reports) / len(reports) for name in names]
    return Point(reports[-1].step, *means)


def by_arm(runs: list[Run]) -> dict[Arm, list[Run]]:
    found: dict[Arm, list[Run]] = {}
    for run in runs:
        found.setdefault(run.arm, []).append(run)
    return found


def table(runs: list[Run], by_chance: float) -> str:
    lines = [
        "| what | loss | rows | steps | loss at the end | chance | margin | spread | nDCG@5 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, of_arm in by_arm(runs).items():
        last = [run.curve[-1] for run in of_arm]
        cells = [
            told(arm),
            arm.kind,
            f"{arm.rows}",
            f"{arm.steps:,}",
            " / ".join(f"{each.loss:.3f}" for each in last),
            f"{last[0].chance:.3f}",
            " / ".join(f"{each.margin:+.2f}" for each in last),
            " / ".join(f"{each.spread:.2f}" for each in last),
            " / ".join(f"{run.ndcg:.3f}" for run in of_arm),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"nDCG@5 by chance: {by_chance:.4f}."])


def told(arm: Arm) -> str:
    """What an arm has otherwise than the plain ones."""
    if arm.scale != 1:
        return f"initial weights x {arm.scale:g}"
    if arm.temperature != 1:
        return f"temperature {arm.temperature:g}"
    if arm.rate != RATE:
        return f"rate {arm.rate:g}"
    return f"{arm.steps:,} steps" if arm.group == "patience" else "plain"


def draw(runs: list[Run], by_chance: float, path: Path) -> None:
    """Loss over steps by batch, for both losses; and where every arm ended."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.6), layout="constrained")
    for axes, kind, title in (
        (left, "pairwise", "Pairwise softplus"),
        (middle, "info_nce", "InfoNCE"),
    ):
        for run in runs:
            if run.arm.kind == kind and run.arm.group == "batch":
                _curve(axes, run)
        axes.axhline(1, color="#888888", linestyle="--", linewidth=1)
        axes.annotate("chance level", (0.98, 1.01), xycoords=("axes fraction", "data"), ha="right")
        axes.set(title=title, xlabel="step", ylabel="loss / chance level", ylim=(0, 1.2))
        axes.legend(frameon=False, loc="lower left")
    _ends(right, runs, by_chance)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _curve(axes: Any, run: Run) -> None:
    steps = [each.step for each in run.curve]
    ratio = [each.loss / each.chance for each in run.curve]
    label = f"{run.arm.rows} rows" if run.seed == 0 else None
    axes.plot(steps, ratio, color=COLOURS[run.arm.rows], label=label, linewidth=1.4, alpha=0.8)


def _ends(axes: Any, runs: list[Run], by_chance: float) -> None:
    arms = list(by_arm(runs).items())
    for place, (arm, of_arm) in enumerate(reversed(arms)):
        values = [run.ndcg for run in of_arm]
        axes.scatter(values, [place] * len(values), color=COLOURS[arm.rows], s=22)
    axes.axvline(by_chance, color="#888888", linestyle="--", linewidth=1)
    names = [f"{arm.kind}, {arm.rows} rows, {told(arm)}" for arm, _ in reversed(arms)]
    axes.set_yticks(range(len(names)), [name.removesuffix(", plain") for name in names], fontsize=8)
    axes.set(title="Held-out headings found", xlabel="nDCG@5", xlim=(-0.02, 1))


def is_at_chance(run: Run) -> bool:
    """Whether a run ended within 3 % of its chance level."""
    last = run.curve[-1]
    return math.isclose(last.loss, last.chance, rel_tol=0.03)


if __name__ == "__main__":
    main()
