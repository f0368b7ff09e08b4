"""The options of training: `train` of a config."""

from itertools import combinations
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, Field, model_validator

from mmcontrast.models.options import StartOptions
from mmcontrast.options import Component, Options, Positive
from mmcontrast.score.ranks import Communication

T = TypeVar("T")


def _check_first_step(points: dict[int, T]) -> dict[int, T]:
    if 0 not in points:
        raise ValueError("the first step of a stage must be 0")
    return points


def _check_order(steps: tuple[int, int]) -> tuple[int, int]:
    if steps[0] > steps[1]:
        raise ValueError("the first step comes after the last")
    return steps


MatryoshkaWidths = Annotated[
    list[Positive] | dict[Positive, Annotated[float, Field(gt=0, allow_inf_nan=False)]], Field(min_length=1)
]
Beta = Annotated[float, Field(ge=0, lt=1)]
Stages = Annotated[dict[Annotated[int, Field(ge=0)], T], AfterValidator(_check_first_step)]  # values by their first step


class TeacherOptions(Options):
    """A model to learn from.

    Attributes:
        model, pretrained, checkpoint, pooling: as in `model.start`: whatever `mmcontrast.load` opens.
        scale: its logit scale; default: the one that it has learnt.
        fields: the teacher's field for each of the model's whose name differs: {picture: image, caption: text}.
    """

    model: str
    pretrained: str | None = None
    checkpoint: str = "last"
    pooling: Literal["mean", "first", "last"] | None = None
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    fields: dict[str, str] = {}

    @property
    def start(self) -> StartOptions:
        """Return the options that open the model."""
        return StartOptions(**self.model_dump(include={"model", "pretrained", "checkpoint", "pooling"}))


class StoredTeacherOptions(Options):
    """A model to learn from whose embeddings of the samples are stored in the shards.

    Attributes:
        stored: for each field, the member with its embeddings, an array [E], or [A, E] of A augmentations or captions:
            {image: teacher.image.npy, text: teacher.text.npy}.
        scale: its logit scale.
    """

    stored: Annotated[dict[str, str], Field(min_length=1)]
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 100.0


AnyTeacherOptions = str | TeacherOptions | StoredTeacherOptions


class MineOptions(Options):
    """The options of `train.mine_every`, named as those of `mmcontrast data mine` (docs/mining.md).

    Attributes:
        query, candidate: fields; they may be the same. `data.negatives` of the field `candidate` are mined.
        count: the most candidates of a sample; default: 5, or `nearest` of `data.batches` if that is more.
        range_min: so many of the best candidates that pass the rules are skipped.
        range_max: so many of the best candidates that are not of the sample's group are considered; default: range_min + count,
            or ten times the count where a rule may remove some of them.
        max_score, min_score: of a negative.
        absolute_margin: a negative's score is at most the positive's minus this.
        relative_margin: a negative's score is at most p − |p| · this, p being the positive's.
        sampling: the best ("top"), or a random choice of those that remain.
        search: all pairs ("exact"), or faiss's IVF with at least `recall` of the exact windows.
        recall: of search "ivf".
        first: mine before the first step too, for a pretrained model.
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
    """A further term of the loss, in which pairs of fields learn from the batch's rows of a third field as a teacher; see
    `mmcontrast.training.bridging`. The two fields need not occur in one sample.

    Attributes:
        through: the field whose rows are the bank: on each rank those of its own share of the batch.
        pairs: the pairs of fields; default: all without `through`.
        weight: of the term.
        start: the first step of the term; before it, the bank is not informative.
        scale: κ of the softmax over the bank, and of the targets; default: the current logit scale.
    """

    through: str
    pairs: Annotated[list[tuple[str, str]], Field(min_length=1)] | None = None
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    start: Annotated[int, Field(ge=0)] = 0
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None

    def pairs_of(self, fields: list[str]) -> list[tuple[str, str]]:
        """Return the pairs of fields that learn through the third one."""
        return self.pairs or list(combinations([field for field in fields if field != self.through], 2))


def _pattern(name: Any) -> Any:
    """Return the pattern of a tower's weights for its name; anything else is a pattern already."""
    is_tower = isinstance(name, str) and not {".", "*"} & {*name} and name not in ("log_logit_scale", "logit_bias")
    return f"towers.{name}.*" if is_tower else name


class TrainOptions(Options):
    """The training loop.

    Attributes:
        steps, epochs: the length of the run: optimizer steps, or passes over the training data, also a fraction; exactly one of
            the two. An override of one of them replaces the other in the config's file.
        batch_size: samples per step, over all ranks.
        micro_batch_size: the most samples of a rank that have activations at a time, in parts of about equal size. The loss is
            exactly that of the whole batch; costs a second forward (gradient caching).
        accumulation_steps: cut a step's batch into so many parts, each contrasted only within itself; the same parts on any
            number of ranks. Fewer negatives, no second forward. For more negatives than fit, use micro_batch_size.
        queue_size: the number of past embeddings of each field, by a momentum encoder, that are further negatives (MoCo); 0:
            none.
        queue_momentum: of that encoder's weights.
        teacher: a model that objectives with a teacher learn from, by its name or with options; or one whose embeddings are
            stored in the shards; or several. It has no gradient, and reads the samples by its own preprocessing.
        matryoshka: widths of prefixes of the embeddings; the loss is the sum of the losses of these prefixes
            (arXiv:2205.13147): [64, 128, 512], or with weights {64: 0.5, 512: 1.0}. The whole width is one of them.
        bridge: a further term of the loss for pairs of fields that learn from a third field of the batch.
        seed: of weights, order and augmentation.
        mine_every: every so many steps, embed the training data with the current weights (or their average), and mine by the
            options of `mine`, for `data.negatives` and `data.batches` without a table.
        mine: the options of mining.
        optimizer: adamw, or the name of a timm optimizer, with its options: {type: lion, betas: [0.95, 0.98]}.
        lr, weight_decay, betas, eps: AdamW's (lr and weight_decay: of any). Vectors (biases, norms, layer scales), logit scale
            and bias, class tokens and the like, tables of positions, and a network's own `no_weight_decay()` do not decay.
        tower_lr: another lr for towers by name, with their projections: {text: 5e-4}.
        layer_decay: of towers by name: each layer has this times the lr of the one above: {image: 0.75}.
        freeze: towers by name, or weights by patterns of their names, that are not trained: [image, towers.text.blocks.0.*]; or
            a mapping of patterns to the step until which they are locked, null: for good.
        unfreeze_at: the step from which frozen towers are trained: {text: 500}.
        warmup_steps: steps of linear warm-up, before the schedule.
        schedule: cosine, linear, constant, or wsd (warm-up, stable, decay over the last decay_share of the steps).
        decay_share: for wsd: the share of the steps in which the lr decays.
        final_lr_share: the share of the lr that remains after the last step.
        ema_decay: decay of an exponential moving average of the weights, which is evaluated, and saved beside them; at step n
            at most (1 + n) / (10 + n), so that it forgets the initial weights.
        resolution: for fields of pictures, the side to which they are scaled from a step on: {image: {0: 112, 40000: 224}}.
        patch_dropout: for towers, the share of patches that they drop from a step on: {image: {0: 0.5, 40000: 0.0}} (FLIP,
            arXiv:2212.00794).
        clip_grad_norm: largest gradient norm; null: no clipping.
        precision: of the towers. Losses and statistics are always fp32, their products on a GPU tf32 with all but
            "fp32" (gradients' error 6e-4, with bf16 embeddings 2e-3, on an H200); "tf32": the towers' products too.
        parallel: how processes hold the model: "ddp": each holds all of it; "fsdp": each holds a part of its weights,
            gradients, averages and optimizer state, and gathers a block's weights when it computes it (FSDP2).
        shard_ranks: for fsdp: the number of consecutive ranks, as those of a node, that share a copy of the weights; these
            groups are data parallel (HSDP); default: all ranks share one.
        reduce_gradients: for fsdp with micro_batch_size or accumulation_steps: after every "micro_batch", each rank keeping
            only its part; or once per "step", for which each rank keeps the gradients of all weights, in fp32.
        communication: of the loss's columns between processes: ring, gather, hierarchical (a ring of nodes, whose ranks
            gather), or auto: the fastest by a model of their cost (docs/scale.md).
        reshard_after_forward: for fsdp: free a block's weights after its forward, and gather them again for its backward.
        recompute: towers whose blocks keep only their inputs, and recompute activations in the backward (activation
            checkpointing).
        compile: towers whose blocks are compiled by torch.compile.
        channels_last: the memory format of convolutions.
        threads: torch's threads in each process; null: torch's default.
        init_from: the weights to start from: of a run, a .safetensors file, or any model that `mmcontrast.load` opens; other
            names or shapes are refused.
        log_every, evaluate_every, checkpoint_every: steps; for the last two 0: only at the end; null: at the end of each epoch,
            the default of a run with `epochs`.
        evaluate_first: evaluate before the first step too, as step 0: the page shows what the training changed.
        patience: end the run when so many consecutive evaluations have not improved the result that `evaluation.best` names. A
            tie is no improvement; step 0 counts as an evaluation to improve on.
        async_checkpoints: write checkpoints while training goes on, from a copy in memory.
        keep_checkpoints: the number of last checkpoints to keep, beside the best.
        keep_every: save a checkpoint every so many steps, and keep it for good; 0: none.
        trackers: accelerate's by name, each with its options: {tensorboard: {}, wandb: {entity: my-team}}.
        profile_steps: the first and last step of a trace by torch's profiler, in profile/.
        stall_seconds: a step that takes longer, or waits longer for samples, is a stall: every rank's stack is written, and the
            run ends.
        pause_stall_seconds: the same for each pause between steps: saving, evaluating, mining.
        signals: at logged steps also log the signals of `contrastive_loss`: losses and alignment of pairs, accuracy in the
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
    betas: tuple[Beta, Beta] = (0.9, 0.98)
    eps: Annotated[float, Field(ge=0)] = 1e-6
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
    profile_steps: Annotated[tuple[Positive, Positive], AfterValidator(_check_order)] | None = None
    stall_seconds: Annotated[float, Field(gt=0)] = 1800.0
    pause_stall_seconds: Annotated[float, Field(gt=0)] = 6 * 3600.0
    signals: bool = True

    @model_validator(mode="before")
    @classmethod
    def _evaluate_each_epoch(cls, options: Any) -> Any:
        if isinstance(options, dict) and options.get("epochs") is not None:
            return {"evaluate_every": None, "checkpoint_every": None} | options
        return options

    @model_validator(mode="before")
    @classmethod
    def _merge_freeze(cls, options: Any) -> Any:
        """Return options with `freeze: [image]` and `unfreeze_at` as one mapping of patterns."""
        if not isinstance(options, dict) or not (isinstance(options.get("freeze"), list) or options.get("unfreeze_at")):
            return options
        frozen, until = options.get("freeze") or {}, options.get("unfreeze_at") or {}
        patterns = {_pattern(name): None for name in frozen} if isinstance(frozen, list) else dict(frozen)
        return options | {"freeze": patterns | {_pattern(name): step for name, step in until.items()}, "unfreeze_at": {}}

    @model_validator(mode="after")
    def _check_length(self) -> "TrainOptions":
        if self.steps is None and self.epochs is None:
            raise ValueError("neither steps nor epochs is given: set one of them, as steps: 1000 or epochs: 5")
        if self.steps is not None and self.epochs is not None:
            raise ValueError(f"both steps={self.steps} and epochs={self.epochs:g} are given: leave one out, or set it to null")
        if (self.mine_every is None) != (self.mine is None):
            missing = "mine: {query: image, candidate: text}" if self.mine is None else "mine_every: 2000"
            raise ValueError(f"mine_every and mine go together: when, and what is mined; {missing} is missing")
        if self.patience and self.evaluate_every == 0:
            raise ValueError(f"patience={self.patience} counts evaluations, and there is one alone: set evaluate_every")
        return self

    @property
    def teachers(self) -> list[TeacherOptions | StoredTeacherOptions]:
        """Return the options of all teachers."""
        if self.teacher is None:
            return []
        teachers = self.teacher if isinstance(self.teacher, list) else [self.teacher]
        return [TeacherOptions(model=teacher) if isinstance(teacher, str) else teacher for teacher in teachers]

    @property
    def total_steps(self) -> int:
        """Return the optimizer steps of the run; a run with `epochs` has them once its data are open (`epochs.in_steps`)."""
        assert self.steps is not None
        return self.steps
