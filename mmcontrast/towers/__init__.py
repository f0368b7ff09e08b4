"""Towers by the name a config gives them. A new backbone family is a file here and a line below."""

from mmcontrast.towers.base import BLOCK, Tower, blocks_of
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
    "TOWERS",
    "LinearTower",
    "OpenClipTextTower",
    "OpenClipTower",
    "TimmTower",
    "Tower",
    "TransformersTower",
    "blocks_of",
]
