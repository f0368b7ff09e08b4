"""Evaluation: embedding tables, retrieval, zero-shot classification, probes, and a report page."""

from mmcontrast.evaluation.bridge import Bridge
from mmcontrast.evaluation.embed import EmbeddingTable, embed_dataset, embed_texts
from mmcontrast.evaluation.evaluate import evaluate, open_splits
from mmcontrast.evaluation.options import EvaluationOptions, ZeroShotOptions
from mmcontrast.evaluation.results import Evaluation, Results, results_table
from mmcontrast.evaluation.table_shards import TableSlice

__all__ = [
    "Bridge",
    "EmbeddingTable",
    "Evaluation",
    "EvaluationOptions",
    "Results",
    "TableSlice",
    "ZeroShotOptions",
    "embed_dataset",
    "embed_texts",
    "evaluate",
    "open_splits",
    "results_table",
]
