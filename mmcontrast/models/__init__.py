"""Models: one adapter for each library; composed of a config's towers, or opened by name. A backbone family is a file here."""

from mmcontrast.models.base import Origin, Tower
from mmcontrast.models.compose import TOWERS, changed_modality, make_modalities, make_model, open_start
from mmcontrast.models.contrastive import ContrastiveModel, Embeddings, assembled, evaluating
from mmcontrast.models.linear import LinearTower
from mmcontrast.models.lora import merge_lora
from mmcontrast.models.names import library_of, open_model, resolved, weights_digest
from mmcontrast.models.open_clip import OpenClipTextTower, OpenClipTower
from mmcontrast.models.options import FieldOptions, ModelOptions, ScoreOptions, StartOptions
from mmcontrast.models.timm import TimmTower
from mmcontrast.models.transformers import TransformersTower

__all__ = [
    "TOWERS",
    "ContrastiveModel",
    "Embeddings",
    "FieldOptions",
    "LinearTower",
    "ModelOptions",
    "OpenClipTextTower",
    "OpenClipTower",
    "Origin",
    "ScoreOptions",
    "StartOptions",
    "TimmTower",
    "Tower",
    "TransformersTower",
    "assembled",
    "changed_modality",
    "evaluating",
    "library_of",
    "make_modalities",
    "make_model",
    "merge_lora",
    "open_model",
    "open_start",
    "resolved",
    "weights_digest",
]
