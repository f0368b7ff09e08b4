"""Pure tensors: reductions of scores, computed by interchangeable backends, over a ring of ranks."""

from mmcontrast.score.reductions import LogSumExp, Maximum, Reduction, SoftplusSum, Sum, log1pexp
from mmcontrast.score.statistics import Direction, score_statistics

__all__ = [
    "Direction",
    "LogSumExp",
    "Maximum",
    "Reduction",
    "SoftplusSum",
    "Sum",
    "log1pexp",
    "score_statistics",
]
