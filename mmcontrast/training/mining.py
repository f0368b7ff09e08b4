"""Hard negatives that are mined anew during a run, with the weights at hand: every `train.mine_every` steps.

A round embeds the training data on all ranks, and the first one mines `mined/step-000200.parquet` of the run's folder. Which
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
from mmcontrast.evaluation.embed import MANIFEST, PART_ROWS, write_json
from mmcontrast.models import ContrastiveModel
from mmcontrast.training import checkpoint
from mmcontrast.training.context import RunContext
from mmcontrast.training.data import use_mined
from mmcontrast.training.options import DataOptions, MineOptions, NeighboursOptions, TrainOptions
from mmcontrast.training.step import Learner

Miner = Callable[[Path, Path, int, str], dict[str, Any]]  # an embedding table, a new Parquet file, a seed, a device: the counts
FOLDER, TABLE = "mined", "embeddings"  # of a run; in it the embeddings, while they are mined
COUNT = 5  # candidates of a sample


class Mining:
    """Mines, and gives the job what was mined.

    Args:
        miner: does it, on the first rank.
    """

    def __init__(self, job: RunContext, learner: Learner, miner: Miner) -> None:
        assert job.options.mine and job.options.mine_every
        self.job, self.learner, self.miner = job, learner, miner
        self.options, self.every = job.options.mine, job.options.mine_every
        self.folder, self.accelerator = job.folder / FOLDER, learner.accelerator
        self.sample_ids = self.dataset.sample_ids()

    @property
    def dataset(self) -> ShardDataset | MixtureDataset:
        assert not isinstance(self.job.dataset, StreamDataset)
        return self.job.dataset

    def file(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}.parquet"

    def is_due(self, done: int) -> bool:
        """Whether a round is to be mined after so many steps, and was not."""
        wanted = done % self.every == 0 if done else self.options.first
        return wanted and done < self.job.options.total_steps and self.job.mined != done

    def next_after(self, step: int) -> int:
        """The step of the next round."""
        return step + self.every - step % self.every

    def open(self, step: int) -> None:
        """Give the job's data what was mined at a step.

        Raises:
            UserError: for a table that is gone, or of other samples.
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
        """Remove what a killed run has mined after the checkpoint with which this one begins: it will be mined again."""
        if self.accelerator.is_main_process:
            shutil.rmtree(self.folder / TABLE, ignore_errors=True)
            self._tidy()
            for step in self._steps():
                if self.job.mined is None or step > self.job.mined:
                    self._remove(step)

    def run(self, done: int, progress: Progress) -> None:
        """Embed, mine, and go on with it.

        Raises:
            UserError: for samples that cannot be had, embeddings that are not finite, a full disk; if no candidate is left.
        """
        accelerator, table = self.accelerator, self.folder / TABLE
        if accelerator.is_main_process:
            shutil.rmtree(table, ignore_errors=True)
            table.mkdir(parents=True)
            self._tidy()
            self._remove(done)
        accelerator.wait_for_everyone()
        parts = gather_object(list(self._embed(table, progress)))
        if accelerator.is_main_process:
            about = {"model": str(self.job.folder), "checkpoint": str(done), "data": self.dataset.digest}
            rows = sum(part["rows"] for part in parts)
            whole = {"rows": rows, "parts": [one for part in parts for one in part["parts"]]}
            write_json(table / MANIFEST, parts[0] | whole | about)
            counts = self.miner(table, self.file(done), self.job.options.seed + done, str(accelerator.device))
            shutil.rmtree(table)
            self._tell(done, counts, progress)
        accelerator.wait_for_everyone()
        before = self.job.mined
        self.open(done)
        if accelerator.is_main_process:
            self._prune({done, before})

    def _embed(self, folder: Path, progress: Progress) -> Iterator[dict[str, Any]]:
        """Write this rank's share of the table, whole batches of it, and yield a manifest of each part.

        The batches are the same for any number of ranks. All ranks compute as many, as sharded weights ask for: one that a rank
        has too few of is another's.
        """
        job, rank, world_size = self.job, self.accelerator.process_index, self.accelerator.num_processes
        fields = dict.fromkeys((self.options.query, self.options.candidate))
        dataset = self.dataset.evaluated({field: job.model.modality(field) for field in fields})
        size, total = job.evaluation.batch_size, len(dataset)
        batches = math.ceil(total / size)
        first, last = (min(batches * number // world_size * size, total) for number in (rank, rank + 1))
        rows = range(first, min(first + math.ceil(batches / world_size) * size, total))
        piece = max(1, PART_ROWS // size) * size
        pieces = math.ceil(math.ceil(batches / world_size) * size / piece)
        for number, start in enumerate(range(0, len(rows), piece)):
            some = rows[start : start + piece]
            embedded = embed_dataset(
                self.learner.averaged or job.model, dataset, rows=some, batch_size=size, num_workers=job.data.num_workers,
                device=self.accelerator.device, progress=progress, label="embedding the training data", name="data.train",
            )  # fmt: skip
            own = embedded.first(max(0, min(some.stop, last) - some.start))
            if len(own):
                yield own.write_parts(folder, (rank * pieces + number) * math.ceil(piece / PART_ROWS))

    def _tell(self, done: int, counts: dict[str, Any], progress: Progress) -> None:
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
        """The steps of which there is a table, a summary or a page, ascending."""
        names = {path.name.removeprefix("step-").partition(".")[0] for path in self.folder.glob("step-*")}
        return sorted(int(name) for name in names if name.isdigit())

    def _remove(self, step: int) -> None:
        for path in self.folder.glob(f"{self.file(step).stem}.*"):
            path.unlink()

    def _tidy(self) -> None:
        """Remove what a killed miner has left: it was of other embeddings."""
        for left in self.folder.glob(".step-*"):
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink()

    def _prune(self, kept: set[int | None]) -> None:
        """Remove the tables that no checkpoint needs; their summaries and pages stay."""
        there = [step for step in self._steps() if self.file(step).exists()]
        for one in checkpoint.complete(self.job.folder / "checkpoints"):
            done = int(one.name.removeprefix("step-"))
            kept |= {*[step for step in there if step <= done][-2:]}  # one that is asked to end saves before it mines
        for step in there:
            if step not in kept:
                self.file(step).unlink()


def make_mining(job: RunContext, learner: Learner, miner: Miner | None) -> Mining | None:
    """Return what mines in a run, if anything does.

    Raises:
        UserError: for a run that mines, without a miner.
    """
    if not job.options.mine_every:
        return None
    if miner is None:
        raise UserError("train.mine_every: train() needs a miner: mmcontrast.curation.mine.training_miner makes one")
    return Mining(job, learner, miner)


def mining_options(options: MineOptions, data: DataOptions) -> dict[str, Any]:
    """Return what is to be mined, as `mmcontrast.curation.mine.MiningOptions` takes it."""
    wanted = [COUNT, *(given.nearest for given in [data.batches] if isinstance(given, NeighboursOptions) and not given.table)]
    return options.model_dump(exclude={"first"}) | {"count": options.count or max(wanted)}


def check_mining(options: TrainOptions, data: DataOptions, fields: Collection[str], model: ContrastiveModel) -> None:
    """
    Args:
        fields: that have embeddings.

    Raises:
        UserError: for a table that is missing; for what is mined and not read, or of fields that there are not.
    """
    negatives = [given for given in data.tables_of_negatives if given.table is None]
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
    for given in negatives:
        if given.field != options.mine.candidate:
            raise UserError(
                f"data.negatives.field={given.field} has no table, and what is mined are candidates of"
                f" train.mine.candidate={options.mine.candidate}: make them the same, or name a table"
            )


def check_rounds(options: TrainOptions, data: DataOptions, order: TrainingOrder) -> None:
    """
    Raises:
        UserError: for new neighbours in the middle of an epoch, of which some samples would be seen twice and others not.
    """
    mined = isinstance(data.batches, NeighboursOptions) and data.batches.table is None
    if options.mine_every and mined and isinstance(order, NeighbourOrder) and options.mine_every % order.steps_per_epoch:
        steps = order.steps_per_epoch
        raise UserError(
            f"train.mine_every={options.mine_every}: batches of neighbours change between epochs alone, each of {steps} steps:"
            f" set it to a multiple of {steps}"
        )
