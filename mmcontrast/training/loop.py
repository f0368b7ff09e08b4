"""The training loop, `train`, with the functions that set it up and report on it."""

import copy
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from rich.progress import Progress, TaskID

from mmcontrast.components import suggestion
from mmcontrast.data import training_batches
from mmcontrast.errors import Preempted, TrainingStopped, UserError
from mmcontrast.evaluation import Results
from mmcontrast.evaluation.report import LOG
from mmcontrast.training import checkpoint
from mmcontrast.training.anomalies import Anomalies
from mmcontrast.training.context import RunContext
from mmcontrast.training.cost import peak_samples
from mmcontrast.training.distributed import COLLECTIVE_TIMEOUT, join_processes, reporting_lost_ranks
from mmcontrast.training.evaluations import Evaluations
from mmcontrast.training.log import StepLog, make_progress
from mmcontrast.training.mining import Miner, Mining, make_mining
from mmcontrast.training.optim import freeze, make_optimizer
from mmcontrast.training.options import TrainOptions
from mmcontrast.training.parallel import distribute, is_sharded
from mmcontrast.training.preemption import Preemption, preemptible
from mmcontrast.training.progressive import check_schedules
from mmcontrast.training.queue import MomentumQueue
from mmcontrast.training.sample_log import STOPPED, SampleLog, warnings
from mmcontrast.training.saver import Saver
from mmcontrast.training.state import restore, state_of, tables_of
from mmcontrast.training.step import Learner, training_step
from mmcontrast.training.trace import tracing
from mmcontrast.training.watchdog import Watchdog
from mmcontrast.types import Batch
from mmcontrast.whole_files import write_text
from mmcontrast.yaml_files import parse_yaml

CHECKPOINTS = "checkpoints"  # the folder of a run's checkpoints


def train(job: RunContext, resume: bool = False, preemption: Preemption | None = None, miner: Miner | None = None) -> Results:
    """Train, evaluate, write the run's folder, and return the last results. A run that has all of its steps, or has ended
    early, is only evaluated, if it was not.

    Args:
        preemption: the handler of a caller that handles a scheduler's signals from its own beginning.
        miner: mines for a run with `train.mine_every`.

    Raises:
        TrainingStopped: if the loss or the gradients cease to be finite.
        Preempted: after SIGTERM or SIGUSR1, when the step is saved.
        UserError: for data that cannot be decoded, a checkpoint that does not fit, a full disk.
    """
    options, total = job.options, job.options.total_steps
    accelerator = make_accelerator(options, job.name, job.folder, parse_yaml(job.config))
    main, rank, world_size = accelerator.is_main_process, accelerator.process_index, accelerator.num_processes
    if options.channels_last:
        job.model.to(memory_format=torch.channels_last)
    queue = make_queue(job, accelerator.device)
    check_schedules(job.model, options)
    locked_until = freeze(job.model, options.freeze)
    max_rate = peak_samples(job.model, options.precision, accelerator.device) if main else None
    learner = make_learner(job, accelerator, queue, locked_until)
    mining = make_mining(job, learner, miner)
    start = resume_from_last(job, learner, mining) if resume else 0
    log = StepLog(job.folder / LOG, start, world_size, max_rate) if main else None
    saver = make_saver(job, accelerator)
    evaluations = Evaluations(job, start, learner, saver)
    sample_log, anomalies = SampleLog(job, start, accelerator), Anomalies(job.model.max_logit_scale)
    with (
        nullcontext(preemption) if preemption else preemptible() as preemption,
        Watchdog(options.stall_seconds, job.folder, rank, world_size, options.pause_stall_seconds) as watchdog,
        make_progress(main) as progress,
        reporting_lost_ranks(),
        saver or nullcontext(),
        tracing(options.profile_steps, job.folder, rank) as trace,
    ):
        print_warnings(warnings(job) if main else (), progress)
        bar = progress.add_task(job.name, total=total, completed=start, note="")
        results = evaluate_start(start, job, evaluations, watchdog, progress)
        if mining:
            mining.begin()
            if mining.is_due(start) and not evaluations.exhausted:
                with watchdog.away("mining"):
                    mining.run(start, progress)
        batches = batches_from(start, job, accelerator, mining)
        for step in range(start, total):
            if evaluations.exhausted:
                break
            done, logging = step + 1, is_due(step + 1, options.log_every, total)
            trace(done)
            watchdog.move(step, "waiting for a batch")
            with log.waiting(options.batch_size) if log else nullcontext():
                batch = next(batches)
            watchdog.move(step, "training")
            with recording_stop(job.folder, done, main):
                values = training_step(step, batch, learner, logging and options.signals, preemption.is_asked)
            stopping = values.pop("asked_to_end")
            print_warnings(anomalies.see(done, values["loss"], values["logit_scale"]) if main else (), progress)
            values |= sample_log.step(done, batch, values["bad_samples"], progress)
            if log and logging:
                report_step(done, values, job, log, accelerator, progress, bar)
            progress.update(bar, completed=done)

            evaluating = is_due(done, options.evaluate_every, total) and (done == total or not stopping)
            mining_now = mining is not None and mining.is_due(done) and not stopping
            if mining and mining_now:
                with log.paused() if log else nullcontext(), watchdog.away("mining"):
                    mining.run(done, progress)
                batches = batches_from(done, job, accelerator, mining)
            keeping = any(is_due(done, every, total) for every in (options.checkpoint_every, options.keep_every))
            if keeping or evaluating or stopping or mining_now:
                with log.paused() if log else nullcontext(), watchdog.away("saving"):
                    if saver:
                        saver.save(done, state_of(done, job, learner))
                    if evaluating:
                        watchdog.move(step, "evaluating")
                        results = evaluations.run(done, progress)
                        watchdog.move(step, "waiting for the others, or the checkpoint")
                    if saver and (stopping or done == total or evaluations.exhausted):
                        saver.wait()
                    accelerator.wait_for_everyone()
            if stopping and done < total:
                raise Preempted(f"{job.name}: asked to end; step {done} is saved: continue with --resume")
    accelerator.end_training()
    return results


def make_learner(
    job: RunContext, accelerator: Accelerator, queue: MomentumQueue | None, locked_until: dict[str, int]
) -> Learner:
    """Return what a step trains, on its device: the model, distributed over the ranks, its average, and the optimizer."""
    options = job.options
    objective = job.objective.to(accelerator.device)
    for _, table in tables_of(objective):
        table.divide(accelerator.process_index, accelerator.num_processes)
    averaged = copy.deepcopy(job.model).requires_grad_(False) if options.ema_decay else None
    copies = [model for model in (averaged, queue and queue.encoder) if model]
    model = distribute(job.model, copies, options, accelerator)
    optimizer = accelerator.prepare_optimizer(make_optimizer(job.model, options))
    for teacher in job.teachers:
        teacher.to(accelerator.device)
    return Learner(
        model, objective, job.pairing, optimizer, accelerator, options, job.negative_of, queue, averaged, locked_until,
        job.teachers, job.own_negatives, job.score,
    )  # fmt: skip


def resume_from_last(job: RunContext, learner: Learner, mining: Mining | None) -> int:
    """Load the last checkpoint, replace the run's config by the job's, and return the number of steps done."""
    start = restore(checkpoint.find(job.folder / CHECKPOINTS, "last"), job, learner, mining)
    if learner.accelerator.is_main_process:  # only now: the checkpoint fits
        write_text(job.folder / checkpoint.CONFIG, job.config)
    return start


def evaluate_start(start: int, job: RunContext, evaluations: Evaluations, watchdog: Watchdog, progress: Progress) -> Results:
    """Evaluate the model as it starts, if that is due and was not done; otherwise print why nothing remains to be done."""
    options, total = job.options, job.options.total_steps
    due = is_due(start, options.evaluate_every, total) if start else options.evaluate_first
    if due and start not in evaluations.steps:
        with watchdog.away("evaluating"):
            return evaluations.run(start, progress)
    if evaluations.main and (start == total or evaluations.exhausted):
        why = "train.patience is at its end" if evaluations.exhausted else f"all {total} steps are done"
        progress.console.print(f"{job.name} is complete: {why}", highlight=False, markup=False)
    elif evaluations.main and start and options.evaluate_first and 0 not in evaluations.steps:
        progress.console.print("warning: train.evaluate_first: step 0 was not evaluated when the run began; it is past")
    return {}


@contextmanager
def recording_stop(folder: Path, done: int, main: bool) -> Iterator[None]:
    """Write the step and its samples to the run's folder if training stops within it."""
    try:
        yield
    except TrainingStopped as error:
        if main:
            (folder / STOPPED).write_text(json.dumps({"step": done, "error": str(error), "ids": list(error.sample_ids)}))
        raise


def report_step(
    done: int, values: dict[str, Any], job: RunContext, log: StepLog, accelerator: Accelerator, progress: Progress, bar: TaskID
) -> None:
    """Write a step's values to metrics.jsonl, the trackers and the console."""
    counts = {"step": done, "samples_seen": done * job.options.batch_size}
    line = log.write(counts | values, accelerator.device)
    accelerator.log({name: value for name, value in line.items() if name != "step"}, step=done)
    note = log.note(line)
    progress.update(bar, note=note)
    if not progress.console.is_terminal:  # a log file shows no bar
        seconds = progress.tasks[bar].time_remaining
        eta = f"  eta {timedelta(seconds=round(seconds))}" if seconds is not None else ""
        progress.console.print(f"step {done}/{job.options.total_steps}  {note}{eta}", highlight=False, soft_wrap=True)


def print_warnings(texts: Iterable[str], progress: Progress) -> None:
    for text in texts:
        progress.console.print(f"warning: {text}", highlight=False, markup=False)


def make_accelerator(options: TrainOptions, name: str, folder: Path, config: Mapping[str, Any]) -> Accelerator:
    """Set torch's threads and matmul precision, and return an accelerator with the run's device, precision and trackers, which
    get the config.

    Raises:
        UserError: for a tracker that does not exist, or whose package is not installed.
    """
    if options.threads:
        torch.set_num_threads(options.threads)
    join_processes()
    trackers: list[Any] = []
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "tf32": "no"}.get(options.precision, options.precision),
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder)),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # batch norms': see `same_statistics`
    )
    if options.precision == "tf32" or (options.precision != "fp32" and accelerator.device.type == "cuda"):
        torch.set_float32_matmul_precision("high")
    for kind, init_kwargs in options.trackers.items():
        if kind not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"train.trackers: no {kind!r}; {suggestion(kind, map(str, LOGGER_TYPE_TO_CLASS))}")
        accelerator.log_with = filter_trackers([kind], folder)
        if not accelerator.log_with:
            raise UserError(f"train.trackers: {kind} is not installed: pip install {kind}")
        if kind == "tensorboard":  # it takes no nested config
            accelerator.init_trackers(kind, init_kwargs={kind: init_kwargs})
        else:
            accelerator.init_trackers(name, config=dict(config), init_kwargs={kind: init_kwargs})
        trackers += accelerator.trackers
    accelerator.trackers = trackers
    return accelerator


def batches_from(step: int, job: RunContext, accelerator: Accelerator, mining: Mining | None) -> Iterator[Batch]:
    """Return this rank's batches from a step on, until the next round of mining."""
    end = job.options.total_steps if mining is None else min(job.options.total_steps, mining.next_after(step))
    return training_batches(
        job.dataset,
        job.order,
        range(step, end),
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=job.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        prefetch=job.data.prefetch,
    )


def is_due(done: int, every: int | None, total: int) -> bool:
    """Return whether something that happens every so many steps, and after the last, happens after `done` steps."""
    return done == total or (every is not None and every > 0 and done % every == 0)


def make_saver(job: RunContext, accelerator: Accelerator) -> Saver | None:
    """Return a saver on the first rank; where weights or tables are in shards, on every rank, with a group of its own."""
    rank, options, folder = accelerator.process_index, job.options, job.folder / CHECKPOINTS
    group: Any = None
    if is_sharded(options) or any(table.world_size > 1 for _, table in tables_of(job.objective)):
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    elif rank:
        return None
    if not rank:
        checkpoint.clean(folder)
    return Saver(folder, options.keep_checkpoints, options.keep_every, options.async_checkpoints, rank, group)


def make_queue(job: RunContext, device: torch.device) -> MomentumQueue | None:
    """Return the queue that the options ask for, of a model that is neither frozen nor distributed yet."""
    if not job.options.queue_size:
        return None
    fields = [field for field in job.model.modalities if field not in job.negative_of]
    return MomentumQueue(job.model, fields, job.options.queue_size, job.options.queue_momentum).to(device)
