"""A text decoder is given eyes: which of its parts should train, in one command.

    python benchmarks/story_mrope.py [--quick] [--seeds 0 1 2] [--threads 2] [--out FOLDER]
    python benchmarks/story_mrope.py --make FOLDER

A small decoder learns text alone, with positions in one dimension: what moves where, told in words.
M-RoPE and a vision tower with random weights are grafted onto it, and it learns to describe clips
of moving shapes (`story_clips.py`), over and over from the same start for a seed:

- *frozen*: the decoder stays as it is; tower and merger train;
- *lora*: the same, with adapters on the decoder;
- *full*: all trains from the first step;
- *thaw*: as frozen; then the upper half of the decoder and its head, then all. Each of the two
  stages gives half the rate to the topmost layer that it opens and 0.8 of the one above to each
  below it, so the lower half begins at a higher rate than the upper half ends on;
- *flattened*: as full, but clips get the positions of text, 1, 2, 3 in all three rows, as happens
  where grids are not handed over: the scheme of the model's collator is replaced, nothing else.

All learn from the same number of answer tokens. Each arm has the learning rate of a grid that gave
the lowest loss on the validation split, with a seed that is not counted. Kept of each run: loss and
token accuracy every few steps, and at the end, over clips of pairs of movers that neither training
nor the choice of a rate has seen: loss, accuracy of tokens and of the words of direction alone, and
the share of descriptions without a mistake; the same over clips of those pairs that are wider than
any in training, where a place and the one below it lie further apart in the row of tokens.

Writes `benchmarks/results/story_mrope.json` and `docs/stories/mrope.png`. `--quick` does three arms
at one rate in two minutes, and writes into the folder of `--out` alone. The results are written
after every run, and what stands there of the same commit is not run again, so that an hour's work
can be done in parts. `--make` writes clips and the grafted model of seed 0 alone, for the recipe
`recipes/story-mrope.yaml`.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import matplotlib.pyplot as plt
import torch
from demo import commit, machine
from story_clips import pairs_of, write_clips
from story_graft import Outcome, grafted, outcome_of, positions_seen, write_decoder, write_tower

from colfolio.data.conversations import ConversationDataset, load_conversations
from colfolio.models.generator import Generator
from colfolio.mrope import Qwen2VL, Span
from colfolio.training import GenerationReport, TrainSettings, start_training, train

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "story_mrope.json"
PICTURE = ROOT / "docs" / "stories" / "mrope.png"
Name = Literal["frozen", "lora", "full", "thaw", "flattened"]
NAMES: tuple[Name, ...] = ("frozen", "lora", "full", "thaw", "flattened")
DECODER = ("embedding", "layers", "norm", "projection")
RATES = (5e-4, 1e-3, 2e-3)
QUICK_RATE = 1e-3
TUNING_SEED = 100  # of no counted run
HELD_OUT = {"validation": 96, "test": 96}  # pairs of movers; a split has two clips of each
WIDER = (5,)  # sides of clips, in places, that no other split has
POINTS = 50  # of a curve
# nats a token if all is known but the direction of both movers; an answer has twelve tokens
GUESSED = 2 * math.log(4) / 12
COLOURS = {
    "frozen": "#2471a3",
    "lora": "#e08e0b",
    "full": "#1e8449",
    "thaw": "#7d3c98",
    "flattened": "#c0392b",
}


@dataclass(frozen=True, slots=True)
class Size:
    """How much is done; the same for all runs.

    Args:
        text_steps: of the decoder, before the graft.
        layers: of the decoder.
        clips: in the training split.
    """

    text_steps: int = 400
    layers: int = 3
    clips: int = 8064
    steps: int = 800
    rows: int = 16


@dataclass(frozen=True, slots=True)
class Arm:
    """What trains, and how fast."""

    name: Name
    rate: float


@dataclass(frozen=True, slots=True)
class Point:
    """Means over a stretch of steps that ends with `step`."""

    step: int
    loss: float
    accuracy: float


@dataclass(frozen=True, slots=True)
class Run:
    """An arm with a seed, and what came of it.

    Args:
        split: on which it was measured; the choice of a rate sees `validation` alone.
        wider: over clips wider than any in training; None where a rate was chosen.
        positions: what the guard says of them, before the first step.
        opened: the step of each stage.
    """

    arm: Arm
    seed: int
    split: str
    outcome: Outcome
    wider: Outcome | None
    positions: str
    answer_tokens: int
    opened: list[int]
    seconds: float
    curve: list[Point]


@dataclass(frozen=True)
class Flattened(Qwen2VL):
    """Tokens of a clip lie as those of a text do."""

    def spans(
        self, kind: int, frames: int, height: int, width: int, seconds: float | None
    ) -> tuple[Span, ...]:
        (span,) = super().spans(kind, frames, height, width, seconds)
        return (Span(torch.arange(span.size).expand(3, -1), span.size),)


class Start:
    """Clips, and decoder and tower for each seed, made in a folder when they are first needed."""

    def __init__(self, folder: Path, size: Size, threads: int) -> None:
        self.size, self.threads, self._folder = size, threads, folder
        self._pairs = pairs_of(HELD_OUT)
        for number, split in enumerate(("train", *HELD_OUT)):
            count = size.clips if split == "train" else 2 * HELD_OUT[split]
            write_clips(folder / "clips", split, self._pairs[split], count, number)
        count, seed = 2 * HELD_OUT["test"], 1 + len(HELD_OUT)
        write_clips(folder / "clips", "wider", self._pairs["test"], count, seed, WIDER)

    def clips(self, split: str) -> ConversationDataset:
        return load_conversations(self._folder / "clips", split)

    def model(self, seed: int) -> Generator:
        """Decoder and tower of a seed as one, before it has seen a clip."""
        decoder, tower = (self._folder / f"{part}-{seed}" for part in ("decoder", "tower"))
        if not tower.exists():
            begin = time.perf_counter()
            size, pairs = self.size, self._pairs["train"]
            loss = write_decoder(decoder, pairs, size.text_steps, size.layers, seed)
            write_tower(tower, decoder, seed)
            seconds = time.perf_counter() - begin
            print(f"seed {seed}: text learnt to a loss of {loss:.3f}, {seconds:.0f} s", flush=True)
        return grafted(decoder, tower, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--make", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.make:
        Start(options.make, Size(), options.threads).model(0).save_pretrained(options.make / "base")
        return
    results, picture = RESULTS, PICTURE
    if options.out or options.quick:
        folder = options.out or Path(tempfile.mkdtemp(prefix="story-mrope-"))
        results, picture = folder / RESULTS.name, folder / PICTURE.name
    for path in (results, picture):
        path.parent.mkdir(parents=True, exist_ok=True)
    seeds = options.seeds or ([0] if options.quick else [0, 1, 2])
    size = Size(text_steps=200, clips=4032, steps=350) if options.quick else Size()
    with tempfile.TemporaryDirectory() as scratch:
        start = Start(Path(scratch), size, options.threads)
        runs = known_runs(results, size)
        todo = quick_runs if options.quick else all_runs
        for run in todo(start, seeds, runs):
            runs.append(run)
            write(runs, size, results)
    counted = sorted(
        (run for run in runs if run.split == "test"),
        key=lambda run: (NAMES.index(run.arm.name), run.seed),
    )
    draw(counted, picture)
    print(table(counted))
    print(f"\n{results}\n{picture}")


def known_runs(path: Path, size: Size) -> list[Run]:
    """Runs that an earlier call left, if they are of this commit and size."""
    if not path.exists():
        return []
    record = json.loads(path.read_text(encoding="utf-8"))
    if record["commit"] != commit() or record["size"] != asdict(size):
        return []
    return [_run_of(values) for values in record["runs"]]


def _run_of(values: dict[str, Any]) -> Run:
    nested = {
        "arm": Arm(**values["arm"]),
        "outcome": Outcome(**values["outcome"]),
        "wider": Outcome(**values["wider"]) if values["wider"] else None,
        "curve": [Point(**each) for each in values["curve"]],
    }
    return Run(**(values | nested))


def write(runs: list[Run], size: Size, path: Path) -> None:
    record = {
        "machine": machine(),
        "commit": commit(),
        "size": asdict(size),
        "runs": [asdict(run) for run in runs],
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def quick_runs(start: Start, seeds: list[int], known: list[Run]) -> Iterator[Run]:
    """What shows the direction within two minutes."""
    arms = [Arm(name, QUICK_RATE) for name in ("full", "frozen", "flattened")]
    wanted = [(arm, seed, "test") for seed in seeds for arm in arms]
    yield from new_runs(start, wanted, known)


def all_runs(start: Start, seeds: list[int], known: list[Run]) -> Iterator[Run]:
    """The choice of each arm's rate, then the arms that count."""
    tried = [(Arm(name, rate), TUNING_SEED, "validation") for rate in RATES for name in NAMES]
    later = len(NAMES) * len(seeds)
    tuned = [run for run in known if run.split == "validation"]
    for run in new_runs(start, tried, known, later):
        tuned.append(run)
        yield run
    best = [
        min((run for run in tuned if run.arm.name == name), key=lambda run: run.outcome.loss).arm
        for name in NAMES
    ]
    print("rates: " + ", ".join(f"{arm.name} {arm.rate:g}" for arm in best), flush=True)
    yield from new_runs(start, [(arm, seed, "test") for seed in seeds for arm in best], known)


def new_runs(
    start: Start, wanted: list[tuple[Arm, int, str]], known: list[Run], later: int = 0
) -> Iterator[Run]:
    """Those of some runs that are not done yet; says how long they will take.

    Args:
        later: runs that come behind these, for the estimate.
    """
    done = {(run.arm, run.seed, run.split) for run in known}
    todo = [each for each in wanted if each not in done]
    if todo:
        each = seconds_of_a_run(start, todo[0][1])
        minutes = each * (len(todo) + later) / 60
        print(f"{len(todo) + later} runs of about {each:.0f} s, {minutes:.0f} min", flush=True)
    for arm, seed, split in todo:
        run = run_arm(start, arm, seed, split)
        found = run.outcome
        print(
            f"seed {seed}, {arm.name} at {arm.rate:g}: {split} loss {found.loss:.3f}, tokens "
            f"{found.accuracy:.3f}, directions {found.direction:.3f}, whole descriptions "
            f"{found.exact:.3f}; positions {run.positions}; {run.seconds:.0f} s",
            flush=True,
        )
        yield run


def seconds_of_a_run(start: Start, seed: int) -> float:
    """By a few steps of the arm in which all trains, which are thrown away."""
    state = start_training(start.model(seed), settings_of(Arm("full", RATES[0]), seed, start))
    seconds = [report.seconds for report in islice(train(state, start.clips("train")), 12)]
    return start.size.steps * sum(seconds[2:]) / len(seconds[2:])


def run_arm(start: Start, arm: Arm, seed: int, split: str) -> Run:
    model, clips, held_out = start.model(seed), start.clips("train"), start.clips(split)
    if arm.name == "flattened":
        model.collator.scheme = Flattened()
    positions = positions_seen(model, held_out)
    begin = time.perf_counter()
    state = start_training(model, settings_of(arm, seed, start))
    reports = [each for each in train(state, clips) if isinstance(each, GenerationReport)]
    seconds = time.perf_counter() - begin
    outcome, wider = outcome_of(state.generator, held_out), None
    if split == "test":
        wider = outcome_of(state.generator, start.clips("wider"))
    curve = list(points(reports, -(-start.size.steps // POINTS)))
    answer_tokens = round(sum(report.answer_tokens for report in reports))
    return Run(
        arm, seed, split, outcome, wider, positions, answer_tokens, state.opened, seconds, curve
    )


def settings_of(arm: Arm, seed: int, start: Start) -> TrainSettings:
    steps = start.size.steps
    warmup = steps // 20
    shared = {
        "objective": "generation",
        "steps": steps,
        "seed": seed,
        "batch": {"rows": start.size.rows},
        "optimiser": {"lr": arm.rate, "warmup_steps": warmup},
        "precision": "fp32",
        "threads": start.threads,
    }
    return TrainSettings.model_validate(shared | policy(arm, steps, warmup))


def policy(arm: Arm, steps: int, warmup: int) -> dict[str, Any]:
    """What trains from when, in the words of a recipe."""
    if arm.name == "frozen":
        return {"frozen": DECODER}
    if arm.name == "lora":
        # adapters stand alone at first, so the tower joins them by a stage
        tower = {"step": 0, "open": ["vision", "merger"], "lr": arm.rate, "warmup": warmup}
        lora = {"rank": 8, "alpha": 16.0, "dropout": 0.0, "projection": "frozen"}
        return {"lora": lora, "thaw": [tower]}
    if arm.name == "thaw":
        later = {"lr": arm.rate / 2, "warmup": warmup, "depth_decay": 0.8}
        upper = later | {"step": steps // 5, "open": ["layers[top 50%]", "norm", "projection"]}
        rest = later | {"step": 2 * steps // 5, "open": ["all"]}
        return {"frozen": DECODER, "thaw": [upper, rest]}
    return {}


def points(reports: list[GenerationReport], stretch: int) -> Iterator[Point]:
    for begin in range(0, len(reports), stretch):
        some = reports[begin : begin + stretch]
        loss, accuracy = (
            sum(getattr(report, name) for report in some) / len(some)
            for name in ("loss", "accuracy")
        )
        yield Point(some[-1].step, loss, accuracy)


def by_arm(runs: list[Run]) -> dict[Arm, list[Run]]:
    found: dict[Arm, list[Run]] = {}
    for run in runs:
        found.setdefault(run.arm, []).append(run)
    return found


def table(runs: list[Run]) -> str:
    lines = [
        "| arm | rate | learnt at step | loss | tokens | directions | whole descriptions "
        "| directions, wider clips | answer tokens |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, of_arm in by_arm(runs).items():
        cells = [arm.name, f"{arm.rate:g}", " / ".join(map(learnt_at, of_arm))]
        for name in ("loss", "accuracy", "direction", "exact"):
            cells.append(" / ".join(f"{getattr(run.outcome, name):.3f}" for run in of_arm))
        wider = [run.wider.direction for run in of_arm if run.wider]
        cells.append(" / ".join(f"{share:.3f}" for share in wider))
        cells.append(" / ".join(f"{tokens:,}" for tokens in {run.answer_tokens for run in of_arm}))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", "Directions by chance: 0.25."])


def learnt_at(run: Run) -> str:
    """The step from which the training loss is under half of what guessed directions cost."""
    above = [point.step for point in run.curve if point.loss >= GUESSED / 2]
    later = [point.step for point in run.curve if not above or point.step > above[-1]]
    return f"{later[0]}" if later else "never"


def draw(runs: list[Run], path: Path) -> None:
    """Loss over steps, and how every run ended."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained")
    for place, (arm, of_arm) in enumerate(by_arm(runs).items()):
        colour = COLOURS[arm.name]
        for number, run in enumerate(of_arm):
            label = f"{arm.name}, {arm.rate:g}" if number == 0 else None
            steps, losses = [at.step for at in run.curve], [at.loss for at in run.curve]
            left.plot(steps, losses, color=colour, label=label, linewidth=1.4, alpha=0.8)
            for step in run.opened:
                if step:
                    left.axvline(step, color=colour, linestyle=":", linewidth=1)
        right.scatter(
            [run.outcome.direction for run in of_arm], [place] * len(of_arm), color=colour, s=26
        )
        right.scatter(
            [run.wider.direction for run in of_arm if run.wider],
            [place + 0.25] * len(of_arm),
            marker="x",
            color=colour,
            s=26,
        )
    guessed = {"color": "#888888", "linestyle": "--", "linewidth": 1}
    left.axhline(GUESSED, label="directions guessed", **guessed)
    left.set(title="Loss of descriptions", xlabel="step", ylabel="nats a token", yscale="log")
    left.legend(frameon=False)
    right.axvline(0.25, **guessed)
    right.set_yticks(range(len(by_arm(runs))), [arm.name for arm in by_arm(runs)])
    right.set(
        title="Words of direction, unseen pairs (x: wider clips)", xlabel="accuracy", xlim=(0, 1.02)
    )
    right.invert_yaxis()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
