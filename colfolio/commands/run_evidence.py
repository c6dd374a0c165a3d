"""What a run notes of itself for a diagnosis: facts when it begins, a probe at times, a fault.

Nothing of it changes the run: neither weights nor generators nor batches. Numbers stand in the
log, and the probe's first vectors beside it, for a run that goes on later.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import load, save
from torch import Tensor

from colfolio.commands.run_folder import RunFolder, TrainRecipe
from colfolio.commands.splits import Splits
from colfolio.data.conversations import ConversationDataset
from colfolio.data.dataset import RetrievalDataset
from colfolio.data.picks import Picker
from colfolio.data.teacher import TeacherScores
from colfolio.diagnosis.evidence import Fault
from colfolio.diagnosis.run_evidence import settled_of
from colfolio.diagnosis.signals import FirstVectors, Probe, draw_probe, measure_data, measure_model
from colfolio.diagnosis.signals.data_facts import SAMPLED
from colfolio.diagnosis.signals.finite import find_fault
from colfolio.diagnosis.signals.model_facts import can_reload, open_and_frozen, text_positions
from colfolio.diagnosis.signals.trial_steps import drawn_batches
from colfolio.errors import ColfolioError
from colfolio.models.retriever import Retriever
from colfolio.training import AnyReport, TrainingState, newest_checkpoint
from colfolio.training.checkpoint import MODEL_FOLDER
from colfolio.training.retrieval_objective import batch_backward, teacher_of
from colfolio.training.text_objective import text_backward, text_source

PROBE_FILE = "probe.safetensors"
_SHARE = 0.01  # of the time of all steps, that the probe may take
_LEAST_EVERY = 15
_OF_STEP = 3  # a forward with its backward costs as much as so many forwards


class RunEvidence:
    """Measures a run while it goes on, and writes what was found into its log.

    All ranks make one; the main one writes. A model that is spread over ranks is measured by all.

    Args:
        state: of the run, before its next step.
    """

    def __init__(
        self, run: RunFolder, recipe: TrainRecipe, state: TrainingState, splits: Splits
    ) -> None:
        self._run, self._recipe, self._state, self._splits = run, recipe, state, splits
        self._position = state.position
        self._picker: Picker | None = None
        self._teacher: TeacherScores | None = None
        self._probe: Probe | None = None
        self._every = _LEAST_EVERY

    def begin(self) -> None:
        """Note the facts, if they are news, and measure the probe before the first step."""
        state = self._state
        if state.step >= self._recipe.train.steps:
            return
        dataset = self._splits.train
        if isinstance(dataset, RetrievalDataset) and self._takes_part:
            self._prepare(dataset)
        facts = self._facts(dataset)
        if state.world.is_main:
            last = self._run.last("facts") or {}
            if any(last.get(name) != value for name, value in facts.items()):
                self._run.append("facts", {"step": state.step} | facts)
        if self._probe is not None:
            self._measure_first(self._probe)

    def step(self, report: AnyReport) -> None:
        """Measure the probe after a step, where it is due."""
        self._position = self._state.position
        is_last = report.step == self._recipe.train.steps
        if self._probe is not None and (is_last or report.step % self._every == 0):
            self._measure(self._probe)

    @contextmanager
    def fault_told(self) -> Iterator[None]:
        """Note where numbers that are not finite came from, and say so in the error.

        Raises:
            FloatingPointError: the same, with the name of the module.
        """
        try:
            yield
        except FloatingPointError as error:
            fault = self._fault()
            if self._state.world.is_main:
                self._run.append("fault", asdict(fault))
            raise FloatingPointError(f"{error}{_told(fault)}") from error

    @property
    def _takes_part(self) -> bool:
        """Whether this rank measures: all do where each holds a part of the model."""
        return self._state.world.is_main or self._state.is_sharded

    def _prepare(self, dataset: RetrievalDataset) -> None:
        settings = self._state.settings
        self._teacher = teacher_of(dataset, settings)
        self._picker = Picker(dataset, settings.batch, settings.seed, self._teacher)
        collator, relations = self._state.retriever.collator, self._picker.relations
        batch = draw_probe(dataset, collator, settings.batch, relations, self._teacher)
        if batch is not None:
            self._probe = Probe(batch, settings.memory.chunk_tokens)
            rows = settings.batch.rows * settings.accumulation / self._state.world.size
            is_whole = all(each.requires_grad for each in self._state.model.parameters())
            self._every = steps_between(len(batch.queries), rows, is_whole=is_whole)

    def _facts(self, dataset: RetrievalDataset | ConversationDataset) -> dict[str, Any]:
        """The facts as they stand in the log."""
        state = self._state
        settled = asdict(settled_of(state.settings, state.world.size))
        if not isinstance(dataset, RetrievalDataset):
            trains, frozen = open_and_frozen(state.model)
            positions, told = text_positions(state.generator, dataset)
            model = {"positions": positions, "positions_told": told}
            model |= {"trains": trains, "frozen": frozen}
            return _as_logged({"settled": settled, "model": model})
        if not self._takes_part:
            return {}
        assert self._picker is not None
        validation = self._splits.validation and self._splits.validation.dataset
        data = measure_data(
            dataset,
            state.retriever.collator,
            state.settings.batch,
            self._picker,
            self._probe and self._probe.batch,
            validation if isinstance(validation, RetrievalDataset) else None,
        )
        model = measure_model(
            state.retriever,
            self._probe,
            state.settings.precision,
            has_loaded_adapter=state.settings.lora is None or state.step > 0,
            has_trained=state.step > 0,
            read_again=self._read_again(),
        )
        facts = {"settled": settled, "data": asdict(data), "model": asdict(model)}
        return _as_logged(facts | {"sampled": SAMPLED})

    def _read_again(self) -> Callable[[], Mapping[str, Tensor]] | None:
        """Reads what the state was read from: the base, or the checkpoint of a run that goes on.

        Before the first step that checkpoint holds the state itself, and is equal whatever the load
        of the base does.
        """
        if not can_reload(self._state.retriever):
            return None
        files: Path | str = self._recipe.model
        if self._state.step > 0 or self._run.last("facts") is not None:
            newest = newest_checkpoint(self._run.checkpoints)
            if newest is None:
                return None
            files = newest / MODEL_FOLDER
        return lambda: Retriever.from_pretrained(files, device="cpu").weights()

    def _measure_first(self, probe: Probe) -> None:
        """Measure what the run begins with; a run that goes on reads what was measured then."""
        path, is_main = self._run.path / PROBE_FILE, self._state.world.is_main
        is_known = path.is_file() and self._run.last("probe") is not None
        if self._state.is_sharded:  # as the main rank sees it, which alone may see the folder
            is_known = self._state.world.gather_objects(is_known)[0]
        if is_known and is_main:
            probe.first = FirstVectors(**load(path.read_bytes()))
        elif not is_known and self._state.step == 0:
            self._measure(probe)
            if is_main and probe.first is not None:
                _write(path, asdict(probe.first))

    def _measure(self, probe: Probe) -> None:
        state = self._state
        settings = state.settings
        signals = probe.measure(state.retriever, state.step, settings.loss, settings.precision)
        if state.world.is_main:
            self._run.append("probe", asdict(signals))

    def _fault(self) -> Fault:
        """What the failed step's own batches say when they are run again."""
        state = self._state
        try:
            what, module = find_fault(state.model, self._run_again)
        except (ColfolioError, RuntimeError):  # memory, a lost rank: the first error is the news
            what, module = "loss", ""
        found = [each for each in state.world.gather_objects((what, module)) if each[1]]
        what, module = found[0] if found else (what, "")
        return Fault(state.step - 1, what, module)  # which counts the failed step already

    def _run_again(self) -> None:
        """Forward and backward of the batches behind the last step that was done."""
        state, dataset = self._state, self._splits.train
        count = state.settings.accumulation
        if isinstance(dataset, ConversationDataset):
            drawn = islice(text_source(state, dataset).batches(self._position), count)
            text_backward(state, [each.batch for each in drawn])
            return
        batches = drawn_batches(state, dataset, self._position, count)
        for number, batch in enumerate(batches):
            batch_backward(state, batch, state.step - 1, number, 1 / count)


def steps_between(probe_rows: int, rows: float, *, is_whole: bool) -> int:
    """Steps from one measurement to the next, so many that the probe costs its share at most.

    Rows stand for tokens, as they are of the same data. Where something is frozen a step may cost
    no more than a forward, or less where the output of frozen layers is kept.

    Args:
        rows: of a step, of the rank that measures.
        is_whole: all of the model trains.

    >>> steps_between(32, 128.0, is_whole=True), steps_between(32, 8.0, is_whole=True)
    (15, 134)
    """
    steps = probe_rows / (rows * (_OF_STEP if is_whole else 1)) / _SHARE
    return max(_LEAST_EVERY, math.ceil(steps))


def _as_logged(values: dict[str, Any]) -> dict[str, Any]:
    """Values as they are read from a log again, to be compared with it."""
    return json.loads(json.dumps(values))


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    aside = path.with_name(f".{path.name}")
    aside.write_bytes(save(tensors))
    aside.replace(path)


def _told(fault: Fault) -> str:
    if not fault.module:
        return ""
    if fault.what == "gradient":
        return f"; the gradient of {fault.module} is not finite, of those nearest to the loss"
    return f"; the first output that is not finite is that of {fault.module}"
