"""The options of training: `train`, `data` and `model` of a config."""

from collections import Counter
from itertools import combinations
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, field_validator, model_validator

from mmcontrast.data.negatives import UnknownIds
from mmcontrast.data.opening import Templates
from mmcontrast.models.options import StartOptions
from mmcontrast.options import Component, Keys, Options, Patterns, Positive
from mmcontrast.score.ranks import Communication

T = TypeVar("T")


class SourceOptions(Options):
    """One of several sources of training samples.

    Attributes:
        shards: its shards: tars, also by URL, folders, tables.
        files: of tables whose columns name files, the folder in which these are; default: the table's own.
        weight: how often its samples are seen, in proportion to the others'; default: as many as it has.
        templates: of text fields that hold names of classes here, the prompts made of them: {text: ["a photo of a {}."]}.
            Samples of one class are no negatives of each other.
        keys, modalities: of its fields that differ from `fields`: {text: [caption]}, {image: {augment: []}}.
        own_ids: its sample_id and group_id mean nothing to the other sources, where the same numbers may occur.
        select: its own selection, in place of `data.select`.
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
        count: so many are drawn of each sample's row, by (seed, epoch, sample id); where it has fewer, the others are absent.
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
        type: says that it is this.
        table: a Parquet file with the columns `sample_id` and `candidate_ids`, a list, the nearest first, as `mmcontrast data
            mine` writes it; or a folder of such files. Default: what `train.mine_every` mines; until then samples are drawn
            at random.
        nearest: so many of a sample's candidates are looked at, the first ones.
        count: so many of them are put beside it, at most; default: half of `nearest`.
        share: of these, the share that are the nearest; the others are random ones of `nearest`.
        unknown_ids: as of `data.negatives`.
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
        """The neighbours beside a sample."""
        return self.count or max(1, self.nearest // 2)


class DataOptions(Options):
    """Where training samples come from, and in which order. See `mmcontrast.data.order` and `.mixture`.

    Attributes:
        train: shards (tars, also by URL, folders, tables); or several sources by name.
        held_out: this share of the samples is never trained on; it is the split `held_out` of the evaluation (of several
            sources, one of the name of each), if no splits are named, and else where one is: {val: held_out}. Which samples
            they are: `mmcontrast.data.held_out`.
        select: the folder that `mmcontrast data filter` and the like wrote, or a Parquet or CSV file with a column `sample_id`
            or `key` and perhaps `keep`: what is trained on, and held out, are the samples that it keeps, of every source that
            has no `select` of its own.
        batches: of several sources: "mixed", or "single", a step's samples all of one; or, of any data, samples and their
            nearest neighbours: {type: neighbours, table: mined.parquet}.
        clusters: a Parquet or CSV file with the columns `cluster` and `key` or `sample_id`: a step's samples are all of one
            cluster, each other's hard negatives.
        negatives: mined negatives of each sample, of one table or several.
        bucket_by: a field by whose length (in bytes) samples are brought together, so that little is padded.
        sequential: read tars from their beginning to their end, for what cannot be indexed. Not the exact order: see
            `mmcontrast.data.stream`.
        num_workers: decoding processes of each rank; 0: decode in the training process.
        prefetch: samples that they have ready, a batch each at least; default: four batches each, or what fills half of the
            free memory. `mmcontrast doctor` says how many that are.
        lanes: a multiple of every number of ranks the run may ever have; default: the largest power of two up to 64
            that divides the batch.
        max_bad_share: samples that cannot be decoded are replaced by others and listed in bad_samples.jsonl; more than this
            share of those seen (of a thousand, at the start) stop the run.
        record_samples: write the sample ids of every step, in their order, to samples.jsonl.
        block, window: samples that stay together until they are shuffled, and that are shuffled together, in a lane.
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
    def _name_alone(cls, batches: Any) -> Any:
        if isinstance(batches, str) and batches not in ("mixed", "single", "neighbours"):
            raise ValueError("it is mixed, single, or neighbours with options: {type: neighbours, table: mined.parquet}")
        return {"type": "neighbours"} if batches == "neighbours" else batches

    @property
    def tables_of_negatives(self) -> list[NegativesOptions]:
        return self.negatives if isinstance(self.negatives, list) else [self.negatives]

    @property
    def mined(self) -> dict[str, NegativesOptions]:
        """The names under which a batch has each mined negative, and of which table it is."""
        found: dict[str, NegativesOptions] = {}
        numbers: Counter[str] = Counter()
        for given in self.tables_of_negatives:
            for _ in range(given.count):
                found[f"{given.field}.negative.{numbers[given.field]}"] = given
                numbers[given.field] += 1
        return found


def _from_the_start(points: dict[int, T]) -> dict[int, T]:
    if 0 not in points:
        raise ValueError("the first step of a stage must be 0")
    return points


def _rising(steps: tuple[int, int]) -> tuple[int, int]:
    if steps[0] > steps[1]:
        raise ValueError("the first step comes after the last")
    return steps


MatryoshkaWidths = Annotated[
    list[Positive] | dict[Positive, Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)
]
Stages = Annotated[dict[Annotated[int, Field(ge=0)], T], AfterValidator(_from_the_start)]  # from a step on, a value


class TeacherOptions(Options):
    """A model to learn from.

    Attributes:
        model, pretrained, checkpoint, pooling: as in `model.start`: whatever `mmcontrast.load` opens.
        scale: its logit scale; default: what it has learnt.
        fields: which of its fields sees each of the model's, where names differ: {picture: image, caption: text}.
    """

    model: str
    pretrained: str | None = None
    checkpoint: str = "last"
    pooling: Literal["mean", "first", "last"] | None = None
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    fields: dict[str, str] = {}

    @property
    def start(self) -> StartOptions:
        return StartOptions(**self.model_dump(include={"model", "pretrained", "checkpoint", "pooling"}))


class StoredTeacherOptions(Options):
    """A model to learn from whose embeddings of the samples are in the shards.

    Attributes:
        stored: of each field, the member with its embeddings, an array [E], or [A, E] of A augmentations or captions:
            {image: teacher.image.npy, text: teacher.text.npy}.
        scale: its logit scale.
    """

    stored: Annotated[dict[str, str], Field(min_length=1)]
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0


AnyTeacherOptions = str | TeacherOptions | StoredTeacherOptions


class MineOptions(Options):
    """What `train.mine_every` mines: the options of `mmcontrast data mine`, by the same names (docs/mining.md).

    Attributes:
        query, candidate: fields; they may be the same. `data.negatives` of the field `candidate` are mined.
        count: candidates of each sample, at most; default: 5, or `nearest` of `data.batches`, if that is more.
        range_min, range_max, max_score, min_score, absolute_margin, relative_margin, sampling, search, recall: as there.
        first: mine before the first step too: for a model that knows something already.
    """

    query: str
    candidate: str
    count: Positive | None = None
    range_min: Annotated[int, Field(ge=0)] = 0
    range_max: Positive | None = None
    max_score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    min_score: Annotated[float, Field(allow_inf_nan=False)] | None = None
    absolute_margin: Annotated[float, Field(allow_inf_nan=False)] | None = None
    relative_margin: Annotated[float, Field(allow_inf_nan=False)] | None = None
    sampling: Literal["top", "random"] = "top"
    search: Literal["exact", "ivf"] = "exact"
    recall: Annotated[float, Field(gt=0, le=1)] = 0.95
    first: bool = False


class BridgeLossOptions(Options):
    """A further term of the loss: pairs of fields learn what the batch's rows of a third field say of both, as a teacher; see
    `mmcontrast.training.bridging`. The two fields need not occur in one sample.

    Attributes:
        through: the field whose rows are the bank: on each rank those of its own share of the batch.
        pairs: of fields; default: all without `through`.
        weight: of the term.
        start: the step from which on it counts: before, the bank says little.
        scale: κ of the softmax over the bank, and of the targets; default: the logit scale as it is then.
    """

    through: str
    pairs: Annotated[list[tuple[str, str]], Field(min_length=1)] | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    start: Annotated[int, Field(ge=0)] = 0
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def pairs_of(self, fields: list[str]) -> list[tuple[str, str]]:
        return self.pairs or list(combinations([field for field in fields if field != self.through], 2))


def _pattern(name: Any) -> Any:
    """Return the weights of a tower that is named alone; anything else is a pattern."""
    alone = isinstance(name, str) and not {".", "*"} & {*name} and name not in ("log_logit_scale", "logit_bias")
    return f"towers.{name}.*" if alone else name


class TrainOptions(Options):
    """The training loop.

    Attributes:
        steps, epochs: how long: optimizer steps, or passes over the training data, which may be a fraction; exactly one of the
            two. An override of one of them takes the place of the other in the config's file.
        batch_size: samples a step, over all ranks.
        micro_batch_size: at most so many samples of a rank have activations at a time, in parts as equal as can be. The loss is
            still that of the whole batch, exactly; costs a second forward (gradient caching).
        accumulation_steps: another thing: a step's batch is cut into so many parts, each contrasted within itself alone; the
            same parts on any number of ranks. Fewer negatives, no second forward. For more negatives than fit, use
            micro_batch_size.
        queue_size: so many past embeddings of each field, of a momentum encoder, are further negatives (MoCo); 0: none.
        queue_momentum: of that encoder's weights.
        teacher: a model that objectives with a teacher learn from, by its name or with options; or one whose embeddings are in
            the shards; or several. It has no gradient, and reads the samples by its own preprocessing.
        matryoshka: the loss is the sum of those of the first so many numbers of each embedding (arXiv:2205.13147):
            [64, 128, 512], or with weights {64: 0.5, 512: 1.0}. The whole width is one of them.
        bridge: pairs of fields that also learn from what the batch's rows of a third field say of both.
        seed: of weights, order and augmentation.
        mine_every: every so many steps the training data are embedded with the weights at hand (averaged ones, if they are),
            and what `mine` says is mined anew, for `data.negatives` and `data.batches` that name no table.
        mine: what is mined.
        optimizer: adamw, or the name of one of timm's, with its options: {type: lion, betas: [0.95, 0.98]}.
        lr, weight_decay, betas, eps: AdamW's (lr and weight_decay: of any). What does not decay: vectors (biases, norms, layer
            scales), logit scale and bias, class tokens and the like, tables of positions, a network's own `no_weight_decay()`.
        tower_lr: lr of the towers that need another, by name, with their projection: {text: 5e-4}.
        layer_decay: of towers by name: each layer has this times the lr of the one above: {image: 0.75}.
        freeze: towers by name, or weights by patterns of their names, that do not learn: [image, towers.text.blocks.0.*]; or a
            mapping of patterns to the step until which they are locked, null: for good.
        unfreeze_at: of those, the step from which on they learn: {text: 500}.
        warmup_steps: of linear warm-up, before the schedule.
        schedule: cosine, linear, constant, or wsd (warm-up, stable, decay over the last decay_share of the steps).
        decay_share: of wsd: the share of the steps in which the lr decays.
        final_lr_share: what is left of the lr after the last step.
        ema_decay: of an exponential moving average of the weights, which is evaluated and saved beside them; at step n no more
            than (1 + n) / (10 + n), so that it forgets the start.
        resolution: of fields with pictures, the side to which they are scaled from a step on: {image: {0: 112, 40000: 224}}.
        patch_dropout: of towers, the share of patches that they drop from a step on: {image: {0: 0.5, 40000: 0.0}} (FLIP,
            arXiv:2212.00794).
        clip_grad_norm: largest gradient norm; null: no clipping.
        precision: of the towers. Losses and statistics are fp32 always, their products on a GPU tf32 with all but
            "fp32" (gradients' error 6e-4, with bf16 embeddings 2e-3, on an H200); "tf32": the towers' products too.
        parallel: what several processes share: "ddp": each holds the whole model; "fsdp": each holds a part of its weights,
            gradients, averages and optimizer state, and fetches a block's weights when it computes it (FSDP2).
        shard_ranks: of fsdp: so many ranks that follow each other, those of a node, share a copy of the weights, and these
            groups are data parallel (HSDP); default: all ranks share one.
        reduce_gradients: of fsdp with micro_batch_size or accumulation_steps: after every "micro_batch", each rank keeping its
            part alone; or once a "step", for which each rank keeps the gradients of all weights, in fp32.
        communication: of the loss's columns between processes: ring, gather, hierarchical (a ring of nodes, whose ranks
            gather), or auto: the one that a model of their cost says is the fastest (docs/scale.md).
        reshard_after_forward: of fsdp: let a block's weights go after its forward, and fetch them again for its backward.
        recompute: towers whose blocks keep their inputs alone, and compute the rest again in the backward: activation
            checkpointing.
        compile: towers whose blocks are compiled by torch.compile.
        channels_last: memory format of convolutions.
        threads: of torch in each process; null: torch's default.
        init_from: the weights to start from: of a run, a .safetensors file, or any model that `mmcontrast.load` opens; other
            names or shapes are refused.
        log_every, evaluate_every, checkpoint_every: steps; of the last two 0: at the end only; null: at the end of each epoch,
            the default of a run with `epochs`.
        evaluate_first: evaluate before the first step too, as step 0: the page shows what the training changed.
        patience: end the run when so many evaluations in turn have not improved the result that `evaluation.best` names. A tie
            is no improvement; step 0 counts as one to improve on.
        async_checkpoints: write them beside the training, from a copy in memory.
        keep_checkpoints: so many of the last are kept, beside the best.
        keep_every: those of every so many steps are kept for good; 0: none.
        trackers: accelerate's by name, each with the options of its start: {tensorboard: {}, wandb: {entity: my-team}}.
        profile_steps: first and last step of a trace of torch's profiler, in profile/.
        stall_seconds: a step that takes longer, or waits longer for samples, is a stall: every rank's stack is written down,
            and the run ends.
        pause_stall_seconds: the same for what is done between steps, each time: saving, evaluating, mining.
        signals: at logged steps also the numbers that `contrastive_loss` names: losses and alignment of pairs, accuracy in the
            batch and effective negatives of directions.
    """

    steps: Positive | None = None
    epochs: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    batch_size: Positive
    micro_batch_size: Positive | None = None
    accumulation_steps: Positive = 1
    queue_size: Annotated[int, Field(ge=0)] = 0
    queue_momentum: Annotated[float, Field(ge=0, le=1)] = 0.999
    teacher: AnyTeacherOptions | list[AnyTeacherOptions] | None = None
    matryoshka: MatryoshkaWidths | None = None
    bridge: BridgeLossOptions | None = None
    mine_every: Positive | None = None
    mine: MineOptions | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    optimizer: Component = "adamw"
    lr: Annotated[float, Field(ge=0)] = 1e-3
    tower_lr: dict[str, Annotated[float, Field(gt=0)]] = {}
    layer_decay: dict[str, Annotated[float, Field(gt=0, le=1)]] = {}
    freeze: dict[str, Positive | None] = {}
    unfreeze_at: dict[str, Positive] = {}
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["cosine", "linear", "constant", "wsd"] = "cosine"
    final_lr_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    decay_share: Annotated[float, Field(gt=0, le=1)] = 0.1
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    resolution: dict[str, Stages[Positive]] = {}
    patch_dropout: dict[str, Stages[Annotated[float, Field(ge=0, lt=1)]]] = {}
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    parallel: Literal["ddp", "fsdp"] = "ddp"
    shard_ranks: Positive | None = None
    reduce_gradients: Literal["micro_batch", "step"] = "micro_batch"
    communication: Communication = "auto"
    reshard_after_forward: bool = True
    recompute: list[str] = []
    compile: list[str] = []
    channels_last: bool = False
    threads: Positive | None = None
    init_from: str | None = None
    log_every: Positive = 10
    evaluate_every: Annotated[int, Field(ge=0)] | None = 0
    checkpoint_every: Annotated[int, Field(ge=0)] | None = 0
    evaluate_first: bool = False
    patience: Positive | None = None
    async_checkpoints: bool = True
    keep_checkpoints: Positive = 2
    keep_every: Annotated[int, Field(ge=0)] = 0
    trackers: dict[str, dict[str, Any]] = {"tensorboard": {}}
    profile_steps: Annotated[tuple[Positive, Positive], AfterValidator(_rising)] | None = None
    stall_seconds: Annotated[float, Field(gt=0)] = 1800.0
    pause_stall_seconds: Annotated[float, Field(gt=0)] = 6 * 3600.0
    signals: bool = True

    @model_validator(mode="before")
    @classmethod
    def _evaluate_each_epoch(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("epochs") is not None:
            return {"evaluate_every": None, "checkpoint_every": None} | given
        return given

    @model_validator(mode="before")
    @classmethod
    def _frozen_towers(cls, given: Any) -> Any:
        """Write `freeze: [image]` and `unfreeze_at` as one mapping of patterns."""
        if not isinstance(given, dict) or not (isinstance(given.get("freeze"), list) or given.get("unfreeze_at")):
            return given
        frozen, until = given.get("freeze") or {}, given.get("unfreeze_at") or {}
        patterns = {_pattern(name): None for name in frozen} if isinstance(frozen, list) else dict(frozen)
        return given | {"freeze": patterns | {_pattern(name): step for name, step in until.items()}, "unfreeze_at": {}}

    @model_validator(mode="after")
    def _check_length(self) -> "TrainOptions":
        if self.steps is None and self.epochs is None:
            raise ValueError("neither steps nor epochs is given: set one of them, as steps: 1000 or epochs: 5")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"both steps={self.steps} and epochs={self.epochs:g} are given: leave one out, or set it to null")
        if (self.mine_every is None) != (self.mine is None):
            lacking = "mine: {query: image, candidate: text}" if self.mine is None else "mine_every: 2000"
            raise ValueError(f"mine_every and mine go together: when, and what is mined; {lacking} is missing")
        if self.patience and self.evaluate_every == 0:
            raise ValueError(f"patience={self.patience} counts evaluations, and there is one alone: set evaluate_every")
        return self

    @property
    def teachers(self) -> list[TeacherOptions | StoredTeacherOptions]:
        """All teachers, in full."""
        given = self.teacher if isinstance(self.teacher, list) else [] if self.teacher is None else [self.teacher]
        return [TeacherOptions(model=one) if isinstance(one, str) else one for one in given]

    @property
    def total_steps(self) -> int:
        """The optimizer steps of the run; of a run with `epochs` known once its data are open (`epochs.in_steps`)."""
        assert self.steps is not None
        return self.steps
