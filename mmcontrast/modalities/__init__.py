"""The modalities by the names that configs use. A new one is a file here and a line below."""

from mmcontrast.modalities.audio import AudioModality
from mmcontrast.modalities.base import DecodeError, Modality
from mmcontrast.modalities.image import ImageModality
from mmcontrast.modalities.text import PADDING, TextIds, TextModality
from mmcontrast.modalities.vector import VectorModality

MODALITIES = {"image": ImageModality, "text": TextModality, "audio": AudioModality, "vector": VectorModality}

__all__ = [
    "MODALITIES",
    "PADDING",
    "AudioModality",
    "DecodeError",
    "ImageModality",
    "Modality",
    "TextIds",
    "TextModality",
    "VectorModality",
]
