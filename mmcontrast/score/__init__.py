"""Exact reductions of score matrices, computed by interchangeable backends, over any number of ranks."""

from mmcontrast.score.links import Link, Lorentz
from mmcontrast.score.own import own_statistics
from mmcontrast.score.reductions import CrossSum, LogSumExp, Maximum, Reduction, SoftplusSum, Sum, log1pexp
from mmcontrast.score.statistics import Direction, row_dots, score_statistics
from mmcontrast.score.teachers import Limits, Teacher

__all__ = [
    "CrossSum",
    "Direction",
    "Limits",
    "Link",
    "LogSumExp",
    "Lorentz",
    "Maximum",
    "Reduction",
    "SoftplusSum",
    "Sum",
    "Teacher",
    "log1pexp",
    "own_statistics",
    "row_dots",
    "score_statistics",
]
