"""The options of a model: `fields` and `model` of a config."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from mmcontrast.models.sizes import Sizes
from mmcontrast.options import Component, Keys, Options, Positive

Projection = Literal["linear", "mlp", "none"]


class FieldOptions(Options):
    """One field of a sample.

    Attributes:
        modality: how its bytes are decoded: image, text, audio, vector, with options; default: that of `model.start`.
        tower: the name of the tower that encodes it, under `towers`; default: that of `model.start`.
        keys: extensions of its member in a shard, tried in order; default: the modality's own. "json:caption" is an entry of
            the json; from {"json:caption": 0.7, "txt": 0.3} training draws one with these weights.
        negative_of: another field, for which this one only provides further negatives: a mined caption that nearly fits.
        own: with `negative_of`: a negative of its own sample's anchors alone, not of all. Several such fields of one field are
            several candidates: {keys: ["json:negatives.0"]}, {keys: ["json:negatives.1"]}, ….
    """

    modality: Component | None = None
    tower: str | None = None
    keys: Keys = []
    negative_of: str | None = None
    own: bool = False


class StartOptions(Options):
    """An existing model to start from, whole or one half.

    Attributes:
        model: whatever `mmcontrast.load` opens: "ViT-B-32/laion2b_s34b_b79k", a name of transformers or timm, a folder, a run.
        pretrained: of an architecture, an open_clip tag or a checkpoint's file; false: random weights.
        checkpoint: of a run: last, best, or a step's number.
        pooling: of a plain transformers encoder: mean, first or last.
        fields: the fields to take; default: all.
        image_size: the side of its square pictures in pixels; default: its own. Position embeddings are resized as its library
            does (open_clip's force_image_size, timm's img_size, transformers' interpolate_pos_encoding).
        context_length: tokens of its texts; default: its own. open_clip resizes position embeddings (force_context_length);
            transformers can only cut texts earlier.
        new_tokens: words that its transformers tokenizer must not cut into pieces; their embeddings are new.
        decoding: how pictures are read: "library": by its own pipeline; "fast": in training by ours (simplejpeg, uint8), with
            the library's size, mean, std, interpolation and augmentation; "fast_everywhere": in evaluation and by `load` too.
    """

    model: str
    pretrained: str | Literal[False] | None = None
    checkpoint: str = "last"
    pooling: Literal["mean", "first", "last"] | None = None
    fields: list[str] = []
    image_size: Positive | None = None
    context_length: Positive | None = None
    new_tokens: list[str] = []
    decoding: Literal["library", "fast", "fast_everywhere"] = "library"

    @property
    def sizes(self) -> Sizes:
        """Return the sizes at which the model is opened."""
        return Sizes(self.image_size, self.context_length, tuple(self.new_tokens) or None)


class LoraOptions(Options):
    """Low-rank updates of a start's weights (arXiv:2106.09685), which are frozen themselves.

    Attributes:
        rank: of each update.
        alpha: its scale is alpha / rank; default: rank, a scale of 1.
        dropout: of the updates' inputs in training, as in peft; updates of fused attention have none.
        targets: the weights of "all" linear layers of blocks and attention pools, or of "attention" alone.
        towers: those to adapt; the start's other towers are locked; default: all of the start.
    """

    rank: Positive
    alpha: Annotated[float, Field(gt=0)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    targets: Literal["all", "attention"] = "all"
    towers: list[str] = []


class ScoreOptions(Options):
    """Hyperbolic distances instead of cosines (MERU, arXiv:2304.09172). Embeddings are then tangent vectors at the origin,
    of any length. See `mmcontrast.objectives.Hyperbolic`.

    Attributes:
        type: "lorentz", the only one.
        curvature: the initial c; ignored for a start that has learnt one.
        learn_curvature: learn it, within a factor of 10 of `curvature`; false: it is fixed.
        general: the field whose samples are more general than those of the others, usually text: the angles by which these lie
            outside its cones are added to the loss; default: none.
        entailment: the weight of that term.
    """

    type: Literal["lorentz"]
    curvature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    learn_curvature: bool = True
    general: str | None = None
    entailment: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.2

    @model_validator(mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return {"type": value} if isinstance(value, str) else value


class ModelOptions(Options):
    """The options of the model beside `fields` and `towers`. See `mmcontrast.models.ContrastiveModel`.

    Attributes:
        start: a model to start from, by its name or with options; or several halves, each with its own fields. Its fields,
            modalities, towers, projections, logit scale and bias become this model's; further `fields` have their own towers.
        lora: train low-rank updates instead of the start's weights.
        update_batch_norms: let the running statistics of a start's batch norms follow the data; default: they stay fixed, and
            batches are normalized by them. Those of random weights follow in any case.
        embed_dim: numbers of an embedding; default: the start's, or 512.
        projection: from a tower's features to an embedding: for all towers, or by tower.
        logit_scale: its initial value, 1 / temperature; default: the start's, or 1 / 0.07.
        logit_bias: added to every logit, learnt (SigLIP: -10 at the start); default: the start's, or none.
        max_logit_scale: the upper bound of the logit scale; default: 100, or a start's larger one.
        scale_per_pair: learn a logit scale for each pair of fields.
    """

    start: str | StartOptions | list[str | StartOptions] | None = None
    lora: LoraOptions | None = None
    update_batch_norms: bool = False
    embed_dim: Positive | None = None
    projection: Projection | dict[str, Projection] = "linear"
    logit_scale: Annotated[float, Field(gt=0)] | None = None
    logit_bias: float | None = None
    max_logit_scale: Annotated[float, Field(ge=1)] | None = None
    scale_per_pair: bool = False

    @property
    def starts(self) -> list[StartOptions]:
        """Return the options of all starts."""
        if self.start is None:
            return []
        starts = self.start if isinstance(self.start, list) else [self.start]
        return [StartOptions(model=start) if isinstance(start, str) else start for start in starts]
