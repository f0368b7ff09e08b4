"""The options of the training data: `data` of a config."""

from collections import Counter
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from mmcontrast.data.negatives import UnknownIds
from mmcontrast.data.opening import Templates
from mmcontrast.options import Keys, Options, Patterns, Positive


class SourceOptions(Options):
    """One of several sources of training samples.

    Attributes:
        shards: its shards: tars, also by URL, folders, tables.
        files: the folder of the files that a table's columns name; default: the table's own.
        weight: how often its samples are seen, relative to the other sources; default: its number of samples.
        templates: for text fields that hold names of classes, the prompts made from them: {text: ["a photo of a {}."]}.
            Samples of one class are no negatives of each other.
        keys: the columns or extensions of this source's own, by field: {text: [caption]}.
        modalities: options of modalities of this source's own, by field: {image: {augment: []}}.
        own_ids: its sample_id and group_id are unrelated to those of the other sources, which may have the same numbers.
        select: its own selection, instead of `data.select`.
    """

    shards: Patterns
    files: str | None = None
    weight: Annotated[float, Field(gt=0)] | None = None
    keys: dict[str, Keys] = {}
    templates: Templates = {}
    modalities: dict[str, dict[str, Any]] = {}
    own_ids: bool = False
    select: str | None = None


class NegativesOptions(Options):
    """Mined negatives: candidates of each sample alone, read from the training shards by their ids.

    Attributes:
        table: a Parquet file with the columns `sample_id` and `candidate_ids`, a list, as `mmcontrast data mine` writes it; or
            a folder of such files. Default: what `train.mine_every` mines; until then there are none.
        field: the field of the candidates: its tower encodes them, and anchors of all other fields see them.
        count: the number of candidates that are drawn from each sample's row, by (seed, epoch, sample id); if the row has
            fewer, the others are absent.
        unknown_ids: what to do with ids that the training data lack: "error", or "skip" where some samples are left out of the
            training on purpose (`held_out`).
    """

    table: str | None = None
    field: str
    count: Positive = 1
    unknown_ids: UnknownIds = "error"


class NeighboursOptions(Options):
    """Batches of samples and their nearest neighbours: see `mmcontrast.data.neighbours`.

    Attributes:
        type: "neighbours".
        table: a Parquet file with the columns `sample_id` and `candidate_ids`, a list, the nearest first, as `mmcontrast data
            mine` writes it; or a folder of such files. Default: what `train.mine_every` mines; until then samples are drawn
            at random.
        nearest: the number of a sample's first candidates that are used.
        count: the most of them that are put beside it; default: half of `nearest`.
        share: the share of these that are the nearest ones; the others are drawn from `nearest`.
        unknown_ids: as in `data.negatives`.
    """

    type: Literal["neighbours"]
    table: str | None = None
    nearest: Positive = 128
    count: Positive | None = None
    share: Annotated[float, Field(ge=0, le=1)] = 0.5
    unknown_ids: UnknownIds = "error"

    @model_validator(mode="after")
    def _check_count(self) -> "NeighboursOptions":
        if self.count is not None and self.count > self.nearest:
            raise ValueError(
                f"count={self.count} neighbours cannot be of nearest={self.nearest}: raise nearest, or lower count"
            )
        return self

    @property
    def beside(self) -> int:
        """Return the number of neighbours beside a sample."""
        return self.count or max(1, self.nearest // 2)


class DataOptions(Options):
    """The training samples, and their order. See `mmcontrast.data.order` and `.mixture`.

    Attributes:
        train: shards (tars, also by URL, folders, tables); or several sources by name.
        held_out: the share of the samples that is never trained on. It is the evaluation's split `held_out` (with several
            sources, one split named as each) if no splits are named, else the split that names it: {val: held_out}. Which
            samples they are: `mmcontrast.data.held_out`.
        select: the folder that `mmcontrast data filter` and the like wrote, or a Parquet or CSV file with a column `sample_id`
            or `key` and perhaps `keep`: only the samples that it keeps are trained on, and held out, in every source without
            its own `select`.
        batches: of several sources: "mixed", or "single": all samples of a step from one source; or, for any data, samples and
            their nearest neighbours: {type: neighbours, table: mined.parquet}.
        clusters: a Parquet or CSV file with the columns `cluster` and `key` or `sample_id`: all samples of a step are
            of one cluster, and so hard negatives of each other.
        negatives: mined negatives of each sample, from one table or several.
        bucket_by: a field by whose length (in bytes) samples are grouped, so that little is padded.
        sequential: read tars from beginning to end, for shards that cannot be indexed. The order is not exact: see
            `mmcontrast.data.stream`.
        num_workers: decoding processes of each rank; 0: decode in the training process.
        prefetch: samples that the workers have ready, at least a batch each; default: four batches each, or what fills half of
            the free memory. `mmcontrast doctor` prints the number.
        lanes: a multiple of every number of ranks the run may ever have; default: the largest power of two up to 64
            that divides the batch.
        max_bad_share: samples that cannot be decoded are replaced by others and listed in bad_samples.jsonl; the run stops if
            they are more than this share of the samples seen (of a thousand, at the start).
        record_samples: write the sample ids of every step, in their order, to samples.jsonl.
        block: the number of consecutive samples that stay together when blocks are shuffled.
        window: the number of samples of a lane that are shuffled together.
    """

    train: Patterns | dict[str, SourceOptions]
    held_out: Annotated[float, Field(gt=0, lt=1)] | None = None
    select: str | None = None
    batches: Literal["mixed", "single"] | NeighboursOptions = "mixed"
    clusters: str | None = None
    negatives: NegativesOptions | list[NegativesOptions] = []
    bucket_by: str | None = None
    sequential: bool = False
    num_workers: Annotated[int, Field(ge=0)] = 4
    prefetch: Positive | None = None
    lanes: Positive | None = None
    max_bad_share: Annotated[float, Field(ge=0, le=1)] = 0.01
    record_samples: bool = False
    block: Positive = 256
    window: Positive = 8192

    @field_validator("batches", mode="before")
    @classmethod
    def _expand_name(cls, batches: Any) -> Any:
        if isinstance(batches, str) and batches not in ("mixed", "single", "neighbours"):
            raise ValueError("it is mixed, single, or neighbours with options: {type: neighbours, table: mined.parquet}")
        return {"type": "neighbours"} if batches == "neighbours" else batches

    @property
    def tables_of_negatives(self) -> list[NegativesOptions]:
        """Return the options of all tables of negatives."""
        return self.negatives if isinstance(self.negatives, list) else [self.negatives]

    @property
    def mined(self) -> dict[str, NegativesOptions]:
        """Return the table of each mined negative by its name in a batch."""
        tables: dict[str, NegativesOptions] = {}
        numbers: Counter[str] = Counter()
        for table in self.tables_of_negatives:
            for _ in range(table.count):
                tables[f"{table.field}.negative.{numbers[table.field]}"] = table
                numbers[table.field] += 1
        return tables
