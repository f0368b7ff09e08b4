"""Evaluate during a run: record the results, mark the best checkpoint, and end the run early by `train.patience`."""

import math
import shutil
from typing import Any

from accelerate.utils import broadcast_object_list
from rich.progress import Progress

from mmcontrast.errors import UserError
from mmcontrast.evaluation import Evaluation, Results, evaluate, results_table
from mmcontrast.evaluation.before import BEFORE, EVALUATIONS, keep_before, read_evaluations
from mmcontrast.evaluation.compare import lower_is_better
from mmcontrast.evaluation.report import write_results
from mmcontrast.training.context import RunContext
from mmcontrast.training.log import StepLines
from mmcontrast.training.saver import Saver
from mmcontrast.training.step import Learner


class Evaluations:
    """Evaluates the current weights, or their moving average; all ranks embed, the first has the results. It adds them to
    evaluations.jsonl, marks the best checkpoint, and at the end of the run writes the results and the page.

    Args:
        start: the step that the run begins or resumes at; later lines of evaluations.jsonl are cut off.
        saver: of checkpoints; the first rank has one.

    Attributes:
        exhausted: `train.patience` evaluations have not improved on the best one before them: the run has ended. The same on
            all ranks; a resumed run computes it from evaluations.jsonl.
        steps: the steps that were evaluated.
    """

    def __init__(self, job: RunContext, start: int, learner: Learner, saver: Saver | None) -> None:
        self.job, self.learner, self.saver = job, learner, saver
        self.main = learner.accelerator.is_main_process
        self.history: dict[int, Results] = {}  # by step, on the first rank
        if self.main:
            self.lines = StepLines(job.folder / EVALUATIONS, start)
            if not start:
                shutil.rmtree(job.folder / BEFORE, ignore_errors=True)
            for line in read_evaluations(job.folder):
                self.history[int(line.pop("step"))] = line
        self.steps: set[int]
        self.steps, self.exhausted = broadcast_object_list([set(self.history), self._is_exhausted()])

    def run(self, done: int, progress: Progress) -> Results:
        """Evaluate after a number of steps, and return the results.

        Raises:
            UserError: if `evaluation.best` is no result.
        """
        job, learner, group = self.job, self.learner, self.learner.group
        model, device = learner.averaged or job.model, learner.accelerator.device
        last = done == job.options.total_steps
        may_end = last or (job.options.patience is not None and self._stale() + 1 >= job.options.patience)
        options = job.evaluation
        if not may_end:  # only results.json has confidence intervals
            options = options.model_copy(update={"resamples": 0})
        evaluation = evaluate(model, job.eval_datasets, options, device, progress, group)
        self.steps.add(done)
        if self.main and evaluation.values:
            self._record(done, evaluation, last, progress)
        if job.options.patience:
            (self.exhausted,) = broadcast_object_list([self.exhausted])
        return evaluation.values

    def _record(self, done: int, evaluation: Evaluation, last: bool, progress: Progress) -> None:
        """Write the results of an evaluation, and mark the checkpoint if it is the best."""
        job, results = self.job, evaluation.values
        self.history[done] = results
        self.exhausted = self._is_exhausted()
        if last or self.exhausted:  # before anything that may be refused: the results are kept
            evaluation.notes += self._notes(done, last)
            metadata = {"model": {"model": str(job.folder), "checkpoint": str(done)}, "training": self._summary(done)}
            model = self.learner.averaged or job.model
            write_results(job.folder, job.name, evaluation, model, job.eval_datasets, job.evaluation, metadata)
            progress.console.print(results_table(evaluation))
        elif not done:
            keep_before(job.folder, evaluation, job.eval_datasets, job.evaluation)
        self.lines.add({"step": done} | results)
        self.learner.accelerator.log(results, step=done)
        key = self._key()
        if key is None and job.options.patience:
            raise UserError(f"train.patience: evaluation.best must name a result; there is: {', '.join(results)}")
        if key is not None and key not in results:
            raise UserError(f"evaluation.best={key!r} is no result; there is: {', '.join(results)}")
        if self.saver:
            self.saver.mark_best(self._values())

    def _key(self) -> str | None:
        """Return the result by which the best checkpoint is chosen: the mean recall of the first task unless one is named."""
        names = (name for results in self.history.values() for name in results if "/mean_recall_at_" in name)
        return self.job.evaluation.best or next(names, None)

    def _values(self) -> dict[int, float]:
        """Return the value of that result by step, negated where lower is better, −∞ where it is not a number."""
        key = self._key() or ""
        values = {step: results.get(key, math.nan) for step, results in sorted(self.history.items())}
        sign = -1.0 if lower_is_better(key) else 1.0
        return {step: -math.inf if math.isnan(value) else sign * value for step, value in values.items()}

    def _best(self) -> int | None:
        """Return the step of the best evaluation, the first of equal ones."""
        values = self._values()
        return max(values, key=lambda step: values[step]) if values and max(values.values()) > -math.inf else None

    def _stale(self) -> int:
        """Return the number of evaluations since the best one."""
        best = self._best()
        return sum(best is None or step > best for step in self.history)

    def _is_exhausted(self) -> bool:
        """Return whether `train.patience` evaluations have brought no improvement."""
        return self.job.options.patience is not None and self._stale() >= self.job.options.patience

    def _summary(self, done: int) -> dict[str, Any]:
        """Return what results.json says of the training."""
        summary: dict[str, Any] = {"step": done, "steps": self.job.options.total_steps, "stopped_early": self.exhausted}
        best, key = self._best(), self._key()
        if best is not None and key:
            summary["best"] = {"step": best, "result": key, "value": self.history[best][key]}
        return summary

    def _notes(self, done: int, last: bool) -> list[str]:
        """Return notes for a reader of the results: that the run has ended early, and that another step was better."""
        notes, best, key = [], self._best(), self._key()
        if not last:
            notes = [
                f"stopped early, after {done} of {self.job.options.total_steps} steps: {self.job.options.patience} evaluations"
                f" in turn have not improved {key} (train.patience)"
            ]
        if best not in (None, done) and key:
            value = f"{key} was {self.history[best][key]:.3f} there, {self.history[done][key]:.3f} here"
            remedy = f"`mmcontrast evaluate {self.job.folder} --checkpoint best`" if best else "that is the model as it started"
            notes.append(f"the best evaluation was that of step {best}: {value}; {remedy}")
        return notes
