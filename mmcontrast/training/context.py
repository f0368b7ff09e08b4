"""The object that holds all parts of a run."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mmcontrast.data import ShardDataset, TrainingDataset, TrainingOrder
from mmcontrast.evaluation import EvaluationOptions
from mmcontrast.models import ContrastiveModel
from mmcontrast.objectives import Hyperbolic, Objective, Pairing
from mmcontrast.training.data_options import DataOptions
from mmcontrast.training.options import TrainOptions
from mmcontrast.training.teachers import Teacher


@dataclass
class RunContext:
    """All parts of a run.

    Attributes:
        config: the resolved config as YAML, saved with every checkpoint.
        negative_of: the fields that only provide negatives, and for which field.
        own_negatives: those of them that are candidates of their own sample's anchors alone.
        score: None where it is the cosine.
        mined: the step whose mined table the data have, None before the first.
    """

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
    own_negatives: frozenset[str] = frozenset()
    score: Hyperbolic | None = None
    mined: int | None = None
