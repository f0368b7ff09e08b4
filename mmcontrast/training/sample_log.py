"""Record the samples of a run in samples.jsonl and bad_samples.jsonl, and warn of options with surprising effects."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from rich.progress import Progress

from mmcontrast.data import MixtureDataset, MixtureOrder, SampleOrder, ShardDataset, ShardIndex
from mmcontrast.data.files import is_remote
from mmcontrast.data.range_cache import range_cache
from mmcontrast.errors import EveryRankError
from mmcontrast.training.context import RunContext
from mmcontrast.training.grad_cache import batch_norms
from mmcontrast.training.log import StepLines
from mmcontrast.training.options import TrainOptions
from mmcontrast.types import Batch

SAMPLES, BAD_SAMPLES = "samples.jsonl", "bad_samples.jsonl"
STOPPED = "stopped.json"  # the step that was not finite, and its samples


class SampleLog:
    """Writes samples.jsonl (with `data.record_samples`) and bad_samples.jsonl, and continues them on resume."""

    def __init__(self, job: RunContext, start: int, accelerator: Accelerator) -> None:
        self.job, self.accelerator, main = job, accelerator, accelerator.is_main_process
        self.samples = StepLines(job.folder / SAMPLES, start) if job.data.record_samples and main else None
        self.bad_samples = StepLines(job.folder / BAD_SAMPLES, start) if main else None
        lines = (job.folder / BAD_SAMPLES).read_text().splitlines() if main else []
        sources = [json.loads(line).get("source", "") for line in lines]
        self.bad: Counter[str] = broadcast_object_list([Counter(sources)])[0]

    def step(self, done: int, batch: Batch, bad: int, progress: Progress) -> dict[str, int]:
        """Record a step, and return the number of bad samples since the run began, in total and by source.

        Raises:
            EveryRankError: if there are too many.
        """
        if self.job.data.record_samples:
            ids = self.accelerator.gather(batch.sample_ids.to(self.accelerator.device))
            if self.samples:
                self.samples.add({"step": done, "ids": ids.tolist()})
        if bad:
            replaced = gather_object(batch.replaced)
            for sample in replaced:
                if self.bad_samples:
                    self.bad_samples.add({"step": done} | sample)
                    progress.console.print(f"replaced: {sample['error']}", highlight=False, markup=False)
            self.bad.update(sample.get("source", "") for sample in replaced)
            seen = max(1000, done * self.job.options.batch_size)
            if self.bad.total() > self.job.data.max_bad_share * seen:
                raise EveryRankError(
                    f"{self.bad.total()} samples of {done * self.job.options.batch_size} could not be decoded, more than"
                    f" data.max_bad_share={self.job.data.max_bad_share}; the last: {replaced[-1]['error']}. All are in"
                    f" {self.job.folder / BAD_SAMPLES}; `mmcontrast data verify` finds what else is wrong"
                )
        by_source = {f"bad_samples/{source}": count for source, count in self.bad.items() if source}
        return {"bad_samples": self.bad.total()} | by_source


def first_steps(options: TrainOptions) -> Iterator[tuple[str, int]]:
    """Yield options that count from a step on, with it."""
    if options.mine_every and options.mine and not options.mine.first:
        yield "train.mine_every", options.mine_every
    if options.bridge:
        yield "train.bridge.start", options.bridge.start
    if options.profile_steps:
        yield "train.profile_steps", options.profile_steps[0] - 1
    for pattern, until in options.freeze.items():
        if until is not None:
            yield f"train.freeze, to train {pattern}", until
    for name, stages in (("resolution", options.resolution), ("patch_dropout", options.patch_dropout)):
        for of, values in stages.items():
            yield from ((f"train.{name}.{of}", step) for step in values)


def warnings(job: RunContext) -> Iterator[str]:
    """Yield warnings of options whose effect a user may not expect."""
    options, names = job.options, batch_norms(job.model)
    if options.micro_batch_size and options.micro_batch_size < options.batch_size and names:
        yield (
            f"train.micro_batch_size={options.micro_batch_size}: batch norms ({names[0]}, … {len(names)} of them)"
            " take their statistics from micro-batches, so the result is not that of the undivided batch; layer or group"
            " norms have no such trouble"
        )
    if options.warmup_steps >= options.total_steps and options.warmup_steps:
        yield (
            f"train.warmup_steps={options.warmup_steps}: the run has {options.total_steps} steps, so the learning rate rises to"
            " its end; set it to a tenth of them or so"
        )
    for option, step in first_steps(options):
        if step >= options.total_steps:
            yield f"{option}: it counts after step {step}, and the run has {options.total_steps} steps: it has no effect"
    if job.data.sequential:
        yield (
            "data.sequential: shards are drawn with replacement; no epoch shows each sample once, batches depend on the numbers"
            " of ranks and workers, and a resumed run goes on with other samples"
        )
    sources = job.dataset.sources.values() if isinstance(job.dataset, MixtureDataset) else [job.dataset]
    remote = [
        shard for source in sources if isinstance(source, ShardDataset) for shard in source.shards if is_remote(shard.name)
    ]
    limit, needed = range_cache().limit, working_set(remote, job)
    if 0 < limit < needed:
        yield (
            f"the remote samples that this machine shuffles together are about {needed / 2**30:.1f} GiB, the cache holds"
            f" {limit / 2**30:.1f}: the same bytes will be fetched many times; raise MMCONTRAST_CACHE_GIB, lower data.window,"
            " or set MMCONTRAST_CACHE_GIB=0 to fetch single samples"
        )


def working_set(remote: Sequence[ShardIndex], job: RunContext) -> float:
    """Return the bytes of remote shards that a machine's lanes draw from at a time."""
    if not remote:
        return 0.0
    total = float(sum(shard.sizes_of(extension).clip(0).sum() for shard in remote for extension in shard.extensions))
    if not isinstance(job.order, SampleOrder | MixtureOrder):
        return total  # samples are drawn from all shards
    share = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) / int(os.environ.get("WORLD_SIZE", "1"))
    return min(total, total / sum(map(len, remote)) * job.data.window * job.order.lanes * share)
