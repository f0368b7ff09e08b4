"""A small model of texts alone, with which labels in tables can be classified in milliseconds."""

from pathlib import Path

import torch

from mmcontrast.embedder import Embedder
from mmcontrast.evaluation import Evaluation, EvaluationOptions, evaluate, open_splits
from mmcontrast.modalities import TextModality
from mmcontrast.models import TOWERS, ContrastiveModel

WORDS = ["red", "green", "blue", "queen", "king", "river"]


def text_model(*fields: str) -> Embedder:
    """Return a model whose weights are so random that words differ, with the field `text` or those that are named."""
    bert = {"vocab_size": 49408, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    names = fields or ("text",)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = TOWERS["transformers"](model="bert", config=bert)
        modalities = {name: TextModality(context_length=16) for name in names}
        model = ContrastiveModel(modalities, {"text": tower}, dict.fromkeys(names, "text"), 8)
        for weights in model.parameters():
            weights.data += 0.3 * torch.randn_like(weights)
    return Embedder(model, "words", "cpu")


def zero_shot(embedder: Embedder, table: Path, classes: object, **options: object) -> Evaluation:
    """Classify the texts of a table, whose column `label` is their class."""
    task = {"label": "label", "field": "text", "prompt_field": "text", "classes": classes}
    tree = {"splits": {"val": str(table)}, "zero_shot": {"task": task}, "resamples": 0, "geometry": False, "pairs": False}
    opened, datasets = open_splits(EvaluationOptions.model_validate(tree | options), embedder.model, embedder.dataset)
    return evaluate(embedder.model, datasets, opened, "cpu")
