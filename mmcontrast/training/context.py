"""All that a run is made of."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmcontrast.data import ShardDataset, TrainingDataset, TrainingOrder
from mmcontrast.evaluation import EvaluationOptions
from mmcontrast.models import ContrastiveModel
from mmcontrast.objectives import Hyperbolic, Objective, Pairing
from mmcontrast.training.options import DataOptions, TrainOptions
from mmcontrast.training.teachers import Teacher


@dataclass
class RunContext:
    """`config` is the resolved config as YAML, saved with every checkpoint; `negative_of` names the fields that only provide
    negatives, and for which field; `own` those whose negatives are of their own sample's anchors alone; `score` is None where
    it is the cosine; `mined` is the step whose mined table the data have, None before the first."""

    name: str
    folder: Path
    config: str
    model: ContrastiveModel
    objective: Objective
    pairing: Pairing
    dataset: TrainingDataset
    order: TrainingOrder
    data: DataOptions
    eval_datasets: Mapping[str, ShardDataset]
    evaluation: EvaluationOptions
    options: TrainOptions
    negative_of: Mapping[str, str]
    teachers: list[Teacher] = field(default_factory=list)
    own: frozenset[str] = frozenset()
    score: Hyperbolic | None = None
    mined: int | None = None
