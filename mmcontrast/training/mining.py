"""Mine hard negatives during a run, every `train.mine_every` steps, with its current weights.

A round embeds the training data on all ranks, which then mine `mined/step-000200.parquet` in the run's folder together. Which
samples and negatives the steps after it show is a function of that table, whose digest is part of the order's state, and of the
step; a checkpoint says which table is in use.
"""

import math
import shutil
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from accelerate.utils import gather_object
from rich.progress import Progress

from mmcontrast.components import suggestion
from mmcontrast.data import MixtureDataset, NeighbourOrder, ShardDataset, StreamDataset, StreamOrder, TrainingOrder
from mmcontrast.errors import UserError
from mmcontrast.evaluation import embed_dataset
from mmcontrast.evaluation.embed import MANIFEST, PART_ROWS
from mmcontrast.models import ContrastiveModel
from mmcontrast.share import Share
from mmcontrast.training import checkpoint
from mmcontrast.training.context import RunContext
from mmcontrast.training.data import use_mined
from mmcontrast.training.data_options import DataOptions, NeighboursOptions
from mmcontrast.training.options import MineOptions, TrainOptions
from mmcontrast.training.step import Learner
from mmcontrast.whole_files import write_json

Miner = Callable[[Path, Path, int, str, Share], dict[str, Any]]  # (table, new Parquet file, seed, device, share) → counts
FOLDER, TABLE = "mined", "embeddings"  # in a run's folder; in it the embedding table, while it is mined
COUNT = 5  # default number of candidates of a sample


class Mining:
    """Mines candidates from a run's training data, and lets the data use them.

    Args:
        miner: mines an embedding table together with the other ranks; the first one gets the counts.
    """

    def __init__(self, job: RunContext, learner: Learner, miner: Miner) -> None:
        assert job.options.mine and job.options.mine_every
        self.job, self.learner, self.miner = job, learner, miner
        self.options, self.every = job.options.mine, job.options.mine_every
        self.folder, self.accelerator = job.folder / FOLDER, learner.accelerator
        self.sample_ids = self.dataset.sample_ids()

    @property
    def dataset(self) -> ShardDataset | MixtureDataset:
        """Return the run's training data."""
        assert not isinstance(self.job.dataset, StreamDataset)
        return self.job.dataset

    def file(self, step: int) -> Path:
        """Return the file of the table that is mined at a step."""
        return self.folder / f"step-{step:06d}.parquet"

    def is_due(self, done: int) -> bool:
        """Return whether a round is to be mined after `done` steps, and was not."""
        scheduled = done % self.every == 0 if done else self.options.first
        return scheduled and done < self.job.options.total_steps and self.job.mined != done

    def next_after(self, step: int) -> int:
        """Return the step of the next round."""
        return step + self.every - step % self.every

    def open(self, step: int) -> None:
        """Let the run's data use the table that was mined at a step.

        Raises:
            UserError: for a table that is gone, or belongs to other samples.
        """
        assert not isinstance(self.job.order, StreamOrder)
        if not self.file(step).is_file():
            raise UserError(
                f"{self.job.folder}: {self.file(step)} is gone, with which its last checkpoint was trained: give it back, or"
                " remove that checkpoint, and the one before it is the last"
            )
        self.job.order = use_mined(self.file(step), self.job.data, self.dataset, self.job.order, self.sample_ids)
        self.job.mined = step

    def begin(self) -> None:
        """Remove the tables that a killed run mined after the checkpoint that this one resumes from: they are mined again."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / TABLE, ignore_errors=True)
            self._remove_partial()
            for step in self._steps():
                if self.job.mined is None or step > self.job.mined:
                    self._remove(step)

    def run(self, done: int, progress: Progress) -> None:
        """Embed the training data, mine, and let the data use the new table.

        Raises:
            UserError: for samples that cannot be read, embeddings that are not finite, a full disk; if no candidate is left.
        """
        accelerator, table = self.accelerator, self.folder / TABLE
        if accelerator.is_main_process:
            shutil.rmtree(table, ignore_errors=True)
            table.mkdir(parents=True)
            self._remove_partial()
            self._remove(done)
        accelerator.wait_for_everyone()
        parts = gather_object(list(self._embed(table, progress)))
        if accelerator.is_main_process:
            source = {"model": str(self.job.folder), "checkpoint": str(done), "data": self.dataset.digest}
            rows, files = sum(part["rows"] for part in parts), [file for part in parts for file in part["parts"]]
            write_json(table / MANIFEST, parts[0] | {"rows": rows, "parts": files} | source)
        accelerator.wait_for_everyone()
        share = Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
        counts = self.miner(table, self.file(done), self.job.options.seed + done, str(accelerator.device), share)
        if accelerator.is_main_process:
            shutil.rmtree(table)
            self._report(done, counts, progress)
        accelerator.wait_for_everyone()
        before = self.job.mined
        self.open(done)
        if accelerator.is_main_process:
            self._prune({done, before})

    def _embed(self, folder: Path, progress: Progress) -> Iterator[dict[str, Any]]:
        """Write this rank's share of the embedding table, in whole batches, and yield a manifest of each part.

        The batches are the same for any number of ranks. All ranks compute the same number of batches, as sharded weights need:
        a rank that has fewer also computes one of the next rank's.
        """
        job, rank, world_size = self.job, self.accelerator.process_index, self.accelerator.num_processes
        fields = dict.fromkeys((self.options.query, self.options.candidate))
        dataset = self.dataset.evaluated({field: job.model.modality(field) for field in fields})
        size, total = job.evaluation.batch_size, len(dataset)
        batches = math.ceil(total / size)
        first = min(batches * rank // world_size * size, total)
        last = min(batches * (rank + 1) // world_size * size, total)
        rows = range(first, min(first + math.ceil(batches / world_size) * size, total))
        chunk_size = max(1, PART_ROWS // size) * size
        chunks = math.ceil(math.ceil(batches / world_size) * size / chunk_size)
        for number, start in enumerate(range(0, len(rows), chunk_size)):
            chunk = rows[start : start + chunk_size]
            embedded = embed_dataset(
                self.learner.averaged or job.model, dataset, rows=chunk, batch_size=size, num_workers=job.data.num_workers,
                device=self.accelerator.device, progress=progress, label="embedding the training data", name="data.train",
            )  # fmt: skip
            embedded = embedded.first(max(0, min(chunk.stop, last) - chunk.start))
            if len(embedded):
                yield embedded.write_parts(folder, (rank * chunks + number) * math.ceil(chunk_size / PART_ROWS))

    def _report(self, done: int, counts: dict[str, Any], progress: Progress) -> None:
        """Write a round's counts to the console and the trackers."""
        queries, short, empty = counts["queries"], counts["short_queries"], counts["empty_queries"]
        progress.console.print(
            f"mined at step {done}: {counts['negatives']:,} candidates of {queries:,} samples, of which {short:,} have fewer"
            f" than {counts['options']['count']} and {empty:,} none: {self.file(done)}",
            highlight=False, markup=False, soft_wrap=True,
        )  # fmt: skip
        names = ("negatives", "short_queries", "empty_queries", "mean_positive_score", "mean_negative_score")
        values = {f"mining/{name}": counts[name] for name in names if counts[name] is not None}
        self.accelerator.log(values, step=done)

    def _steps(self) -> list[int]:
        """Return the steps that have a table, a summary or a page, ascending."""
        names = {path.name.removeprefix("step-").partition(".")[0] for path in self.folder.glob("step-*")}
        return sorted(int(name) for name in names if name.isdigit())

    def _remove(self, step: int) -> None:
        """Remove the files of a step."""
        for path in self.folder.glob(f"{self.file(step).stem}.*"):
            path.unlink()

    def _remove_partial(self) -> None:
        """Remove the partial files of a killed miner: they come from other embeddings."""
        for partial in self.folder.glob(".step-*"):
            if partial.is_dir():
                shutil.rmtree(partial)
            else:
                partial.unlink()

    def _prune(self, kept: set[int | None]) -> None:
        """Remove the tables that no checkpoint needs; their summaries and pages stay."""
        mined = [step for step in self._steps() if self.file(step).exists()]
        for folder in checkpoint.complete(self.job.folder / "checkpoints"):
            done = int(folder.name.removeprefix("step-"))
            kept |= {*[step for step in mined if step <= done][-2:]}  # a run that is asked to end saves before it mines
        for step in mined:
            if step not in kept:
                self.file(step).unlink()


def make_mining(job: RunContext, learner: Learner, miner: Miner | None) -> Mining | None:
    """Return the miner of a run, None if it does not mine.

    Raises:
        UserError: for a run that mines, without a miner.
    """
    if not job.options.mine_every:
        return None
    if miner is None:
        raise UserError("train.mine_every: train() needs a miner: mmcontrast.curation.mine.training_miner makes one")
    return Mining(job, learner, miner)


def mining_options(options: MineOptions, data: DataOptions) -> dict[str, Any]:
    """Return the options of mining, as `mmcontrast.curation.mine.MiningOptions` takes them."""
    batches = data.batches
    nearest = batches.nearest if isinstance(batches, NeighboursOptions) and not batches.table else 0
    return options.model_dump(exclude={"first"}) | {"count": options.count or max(COUNT, nearest)}


def check_mining(options: TrainOptions, data: DataOptions, fields: Collection[str], model: ContrastiveModel) -> None:
    """Check that what a run mines is what its data use.

    Args:
        fields: those that have embeddings.

    Raises:
        UserError: for a missing table; for candidates that are mined and not used, or of unknown fields.
    """
    negatives = [table for table in data.tables_of_negatives if table.table is None]
    neighbours = isinstance(data.batches, NeighboursOptions) and data.batches.table is None
    if options.mine is None:
        if negatives or neighbours:
            option = "data.negatives" if negatives else "data.batches"
            raise UserError(f"{option}.table is missing: name what `mmcontrast data mine` wrote, or set train.mine_every")
        return
    for name in ("query", "candidate"):
        if (field := getattr(options.mine, name)) not in fields:
            raise UserError(f"train.mine.{name}: no field {field!r} that is contrasted; {suggestion(field, fields)}")
    if data.sequential:
        raise UserError("train.mine_every: what is mined is read by its ids, from shards that are indexed: no data.sequential")
    if model.hyperbolic is not None:
        raise UserError("train.mine_every: what is mined is compared by cosines, and score is hyperbolic")
    if not negatives and not neighbours:
        raise UserError(
            "train.mine_every: nothing reads what is mined: data.negatives: {field: …} or data.batches: {type: neighbours},"
            " without a table of their own"
        )
    for table in negatives:
        if table.field != options.mine.candidate:
            raise UserError(
                f"data.negatives.field={table.field} has no table, and what is mined are candidates of"
                f" train.mine.candidate={options.mine.candidate}: make them the same, or name a table"
            )


def check_rounds(options: TrainOptions, data: DataOptions, order: TrainingOrder) -> None:
    """Check that new neighbours are mined between epochs.

    Raises:
        UserError: if they are mined within one, in which some samples would then be seen twice and others not.
    """
    mined = isinstance(data.batches, NeighboursOptions) and data.batches.table is None
    if options.mine_every and mined and isinstance(order, NeighbourOrder) and options.mine_every % order.steps_per_epoch:
        steps = order.steps_per_epoch
        raise UserError(
            f"train.mine_every={options.mine_every}: batches of neighbours change between epochs alone, each of {steps} steps:"
            f" set it to a multiple of {steps}"
        )
