"""Evaluation: embedding tables, retrieval, zero-shot classification, and a page to look at."""

from mmcontrast.evaluation.embed import EmbeddingTable, embed_dataset, embed_texts
from mmcontrast.evaluation.evaluate import Results, evaluate, results_table, retrieve
from mmcontrast.evaluation.options import EvaluationOptions, ZeroShotOptions
from mmcontrast.evaluation.slices import TableSlice

__all__ = [
    "EmbeddingTable",
    "EvaluationOptions",
    "Results",
    "TableSlice",
    "ZeroShotOptions",
    "embed_dataset",
    "embed_texts",
    "evaluate",
    "results_table",
    "retrieve",
]
