"""Towers by the name a config gives them. A new backbone family is a file here and a line below."""

from mmcontrast.towers.base import BLOCK, PADDING, TextIds, Tower, blocks_of, library_errors, refused
from mmcontrast.towers.open_clip import OpenClipTextTower, OpenClipTower
from mmcontrast.towers.timm import TimmTower
from mmcontrast.towers.transformers import TransformersTower
from mmcontrast.towers.vector import LinearTower

TOWERS = {
    "timm": TimmTower,
    "transformers": TransformersTower,
    "open_clip": OpenClipTower,
    "open_clip_text": OpenClipTextTower,
    "linear": LinearTower,
}

__all__ = [
    "BLOCK",
    "PADDING",
    "TOWERS",
    "LinearTower",
    "OpenClipTextTower",
    "OpenClipTower",
    "TextIds",
    "TimmTower",
    "Tower",
    "TransformersTower",
    "blocks_of",
    "library_errors",
    "refused",
]
