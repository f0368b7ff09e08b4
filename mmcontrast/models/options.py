"""The options of a model: `fields` and `model` of a config."""

from typing import Annotated, Literal

from pydantic import Field

from mmcontrast.options import Component, Keys, Options, Positive

Projection = Literal["linear", "mlp", "none"]


class FieldOptions(Options):
    """One field of a sample.

    Attributes:
        modality: how its bytes are decoded: image, text, audio, vector, with options.
        tower: the name of the tower that encodes it, under `towers`.
        keys: extensions of its member in a shard, tried in turn; default: the modality's own. "json:caption" is an entry of the
            json; of {"json:caption": 0.7, "txt": 0.3} training draws one, with these weights.
        negative_of: another field, for which this one only provides further negatives: a mined caption that nearly fits.
    """

    modality: Component
    tower: str
    keys: Keys = []
    negative_of: str | None = None


class ModelOptions(Options):
    """What follows the towers. See `mmcontrast.models.ContrastiveModel`."""

    embed_dim: Positive = 512
    projection: Projection | dict[str, Projection] = "linear"
    logit_scale: Annotated[float, Field(gt=0)] = 1 / 0.07
    logit_bias: float | None = None
    max_logit_scale: Annotated[float, Field(ge=1)] = 100.0
    scale_per_pair: bool = False
