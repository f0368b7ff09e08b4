"""The training loop: the only one. Read it from top to bottom."""

import copy
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

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
from mmcontrast.training.sample_log import SampleLog, warnings
from mmcontrast.training.state import restore, state_of
from mmcontrast.training.step import Learner, training_step
from mmcontrast.training.trace import tracing
from mmcontrast.training.watchdog import Watchdog
from mmcontrast.types import Batch

STOPPED = "stopped.json"  # the step that was not finite, and its samples


def train(job: RunContext, resume: bool = False, preemption: Preemption | None = None, miner: Miner | None = None) -> Results:
    """Trains, evaluates, and writes the run's folder; returns the last results. A run that has all of its steps, or has ended
    early, is evaluated, if it was not.

    Args:
        preemption: of a caller that handles a scheduler's signals from its own beginning.
        miner: of a run with `train.mine_every`.

    Raises:
        TrainingStopped: if the loss or the gradients cease to be finite.
        Preempted: after SIGTERM or SIGUSR1, when the step is saved.
        UserError: for data that cannot be decoded, a checkpoint that does not fit, a full disk.
    """
    options, total, checkpoints = job.options, job.options.total_steps, job.folder / "checkpoints"
    if options.threads:
        torch.set_num_threads(options.threads)
    accelerator = make_accelerator(options, job.name, job.folder, yaml.safe_load(job.config))
    if options.precision == "tf32" or (options.precision != "fp32" and accelerator.device.type == "cuda"):
        torch.set_float32_matmul_precision("high")
    if options.channels_last:
        job.model.to(memory_format=torch.channels_last)
    objective, queue = job.objective.to(accelerator.device), make_queue(job, accelerator.device)
    check_schedules(job.model, options)
    locked_until = freeze(job.model, options.freeze)
    averaged = copy.deepcopy(job.model).requires_grad_(False) if options.ema_decay else None
    most = peak_samples(job.model, options.precision, accelerator.device) if accelerator.is_main_process else None
    copies = [one for one in (averaged, queue and queue.encoder) if one]
    model = distribute(job.model, copies, options, accelerator)
    optimizer = accelerator.prepare_optimizer(make_optimizer(job.model, options))
    for teacher in job.teachers:
        teacher.to(accelerator.device)
    learner = Learner(
        model, objective, job.pairing, optimizer, accelerator, options, job.negative_of, queue, averaged, locked_until,
        job.teachers, job.own, job.score,
    )  # fmt: skip

    start, mining = 0, make_mining(job, learner, miner)
    if resume:
        start = restore(checkpoint.find(checkpoints, "last"), job, learner, mining)
        if accelerator.is_main_process:  # nothing refused it
            replace_text(job.folder / checkpoint.CONFIG, job.config)
    log = StepLog(job.folder / LOG, start, accelerator.num_processes, most) if accelerator.is_main_process else None
    saver = make_saver(checkpoints, options, accelerator)
    evaluations = Evaluations(job, start, learner, saver)
    sample_log, anomalies = SampleLog(job, start, accelerator), Anomalies(job.model.max_logit_scale)
    results: Results = {}
    rank, world_size = accelerator.process_index, accelerator.num_processes
    with (
        nullcontext(preemption) if preemption else preemptible() as preemption,
        Watchdog(options.stall_seconds, job.folder, rank, world_size, options.pause_stall_seconds) as watchdog,
        make_progress(accelerator.is_main_process) as progress,
        reporting_lost_ranks(),
        saver or nullcontext(),
        tracing(options.profile_steps, job.folder, rank) as trace,
    ):
        for warning in warnings(job) if log else ():
            progress.console.print(f"warning: {warning}", highlight=False, markup=False)
        bar = progress.add_task(job.name, total=total, completed=start, note="")
        evaluate_now = is_due(start, options.evaluate_every, total) if start else options.evaluate_first
        if evaluate_now and start not in evaluations.steps:
            with watchdog.away("evaluating"):
                results = evaluations.run(start, progress)
        elif log and (start == total or evaluations.exhausted):
            why = "train.patience is at its end" if evaluations.exhausted else f"all {total} steps are done"
            progress.console.print(f"{job.name} is complete: {why}", highlight=False, markup=False)
        elif log and start and options.evaluate_first and 0 not in evaluations.steps:
            progress.console.print("warning: train.evaluate_first: step 0 was not evaluated when the run began; it is past")
        if mining:
            mining.begin()
            if mining.is_due(start) and not evaluations.exhausted:
                with watchdog.away("mining"):
                    mining.run(start, progress)
        batches = batches_from(start, job, accelerator, mining)
        for step in range(start, total):
            if evaluations.exhausted:
                break
            trace(step + 1)
            if log:
                log.waiting()
            watchdog.move(step, "waiting for a batch")
            batch = next(batches)
            if log:
                log.arrived(options.batch_size)
            done, logging = step + 1, is_due(step + 1, options.log_every, total)
            watchdog.move(step, "training")
            try:
                values = training_step(step, batch, learner, logging and options.signals, preemption.is_asked)
            except TrainingStopped as error:
                if accelerator.is_main_process:
                    about = {"step": done, "error": str(error), "ids": list(error.sample_ids)}
                    (job.folder / STOPPED).write_text(json.dumps(about))
                raise
            stopping = values.pop("asked")
            for warning in anomalies.see(done, values["loss"], values["logit_scale"]) if log else ():
                progress.console.print(f"warning: {warning}", highlight=False, markup=False)
            values |= sample_log.step(done, batch, values["bad_samples"], progress)

            if log and logging:
                seen = {"step": done, "samples_seen": done * options.batch_size}
                line = log.write(seen | values, accelerator.device)
                accelerator.log({k: v for k, v in line.items() if k != "step"}, step=done)
                note = log.note(line)
                progress.update(bar, note=note)
                if not progress.console.is_terminal:  # a log file shows no bar
                    left = progress.tasks[bar].time_remaining
                    eta = f"  eta {timedelta(seconds=round(left))}" if left is not None else ""
                    progress.console.print(f"step {done}/{total}  {note}{eta}", highlight=False, soft_wrap=True)
            progress.update(bar, completed=done)
            evaluating = is_due(done, options.evaluate_every, total) and (done == total or not stopping)
            renewing = mining is not None and mining.is_due(done) and not stopping
            if mining and renewing:
                with log.paused() if log else nullcontext(), watchdog.away("mining"):
                    mining.run(done, progress)
                batches = batches_from(done, job, accelerator, mining)
            if is_due(done, options.checkpoint_every, total) or evaluating or stopping or renewing:
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


def make_accelerator(options: TrainOptions, name: str, folder: Path, config: Mapping[str, Any]) -> Accelerator:
    """accelerate's device, precision, data parallelism and trackers, which are told the config.

    Raises:
        UserError: for a tracker that there is not, or whose package is not installed.
    """
    join_processes()
    trackers: list[Any] = []
    accelerator = Accelerator(
        mixed_precision={"fp32": "no", "tf32": "no"}.get(options.precision, options.precision),
        project_config=ProjectConfiguration(str(folder), logging_dir=str(folder)),
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],  # batch norms': see `same_statistics`
    )
    for kind, given in options.trackers.items():
        if kind not in LOGGER_TYPE_TO_CLASS:
            raise UserError(f"train.trackers: no {kind!r}; {suggestion(kind, map(str, LOGGER_TYPE_TO_CLASS))}")
        accelerator.log_with = filter_trackers([kind], folder)
        if not accelerator.log_with:
            raise UserError(f"train.trackers: {kind} is not installed: pip install {kind}")
        if kind == "tensorboard":  # it takes no nested config
            accelerator.init_trackers(kind, init_kwargs={kind: given})
        else:
            accelerator.init_trackers(name, config=dict(config), init_kwargs={kind: given})
        trackers += accelerator.trackers
    accelerator.trackers = trackers
    return accelerator


def batches_from(step: int, job: RunContext, accelerator: Accelerator, mining: Mining | None) -> Iterator[Batch]:
    """This rank's batches from a step on, until something is mined anew."""
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
    return done == total or (every is not None and every > 0 and done % every == 0)


def make_saver(folder: Path, options: TrainOptions, accelerator: Accelerator) -> checkpoint.Saver | None:
    """On the first rank; where weights are in shards on all of them, with a process group of its own."""
    sharded, rank = is_sharded(options), accelerator.process_index
    group: Any = None
    if sharded:
        group = dist.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    elif rank:
        return None
    if not rank:
        checkpoint.clean(folder)
    return checkpoint.Saver(folder, options.keep_checkpoints, options.keep_every, options.async_checkpoints, rank, group)


def make_queue(job: RunContext, device: torch.device) -> MomentumQueue | None:
    """The queue that the options ask for; on a model that accelerate has not prepared yet."""
    if not job.options.queue_size:
        return None
    fields = [field for field in job.model.modalities if field not in job.negative_of]
    return MomentumQueue(job.model, fields, job.options.queue_size, job.options.queue_momentum).to(device)


def replace_text(file: Path, text: str) -> None:
    """At once: the file is never half."""
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, file)
