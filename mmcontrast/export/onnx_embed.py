"""Embed pictures, texts, sounds and vectors by the ONNX files of this folder: numpy, Pillow, onnxruntime, tokenizers.

python embed.py image a.jpg b.png            # a field, and files; of texts: python embed.py text "a caption"
"""

import io
import json
import string
import sys
from pathlib import Path
from typing import Any

import numpy as np

FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4, "hamming": 5}  # Pillow's numbers


class Embedder:
    """The fields of an exported model.

    Attributes:
        about: preprocess.json: per field its file, its kind, and how its values are prepared.
        scale, bias: of the logits, scale · cosine + bias; None where each pair of fields has its own.
    """

    def __init__(self, folder: Any = None) -> None:
        import onnxruntime

        self.folder = Path(folder or Path(__file__).parent)
        self.about = json.loads((self.folder / "preprocess.json").read_text(encoding="utf-8"))
        self.scale, self.bias = self.about["logit_scale"], self.about["logit_bias"]
        files = {name: str(self.folder / one["file"]) for name, one in self.about["fields"].items()}
        options = onnxruntime.SessionOptions()
        if self.about["precision"] == "fp16":  # with all of its optimizations onnxruntime 1.32 crashes on a CPU
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        self.sessions = {name: onnxruntime.InferenceSession(file, options) for name, file in files.items()}

    def embed(self, field: str, values: list[Any]) -> np.ndarray:
        """Return unit rows float32 [N, D].

        Args:
            values: pictures: paths, encoded bytes or PIL images; texts; sounds and vectors: paths, bytes, or arrays of numbers
                (a sound at the field's sample rate).
        """
        return self.sessions[field].run(["embeddings"], self.prepare(field, values))[0]

    def prepare(self, field: str, values: list[Any]) -> dict[str, np.ndarray]:
        """Return the inputs of a field's ONNX file."""
        about = self.about["fields"][field]
        if about["kind"] == "image":
            return {"pixel_values": np.stack([picture(value, about) for value in values])}
        if about["kind"] == "text":
            return self._tokens(about, values)
        if about["kind"] == "vector":
            return {"vector": np.stack([array(value) for value in values])}
        sounds = [sound(value, about["sample_rate"]) for value in values]
        if "extractor" in about:
            return {"input_features": np.concatenate([self._features(about, one) for one in sounds])}
        return {"waveform": np.stack([fitted(one, about["samples"]) for one in sounds])}

    def _tokens(self, about: dict[str, Any], values: list[str]) -> dict[str, np.ndarray]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / about["tokenizer"] / "tokenizer.json"))
        tokenizer.enable_truncation(about["length"])
        tokenizer.no_padding()
        rows = [tokenizer.encode(cleaned(text, about["clean"])).ids for text in values]
        width = about["pad_to"] or max(map(len, rows))
        ids = np.full((len(rows), width), about["pad_id"], dtype=np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            place = slice(width - len(row), None) if about["pad_left"] else slice(len(row))
            ids[number, place], mask[number, place] = row, 1
        return {"input_ids": ids} | ({"attention_mask": mask} if about["mask"] else {})

    def _features(self, about: dict[str, Any], samples: np.ndarray) -> np.ndarray:
        """Return what a feature extractor of transformers makes of one sound; it cuts long ones at random: always alike."""
        from transformers import AutoFeatureExtractor

        extractor = AutoFeatureExtractor.from_pretrained(self.folder / about["extractor"])
        np.random.seed(0)  # noqa: NPY002
        return extractor(samples, sampling_rate=about["sample_rate"], return_tensors="np")["input_features"].astype(np.float32)


def picture(value: Any, about: dict[str, Any]) -> np.ndarray:
    """Return normalised pixels float32 [channels, height, width]."""
    from PIL import Image

    opened = value if isinstance(value, Image.Image) else Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    if about["background"] and opened.has_transparency_data:
        solid = opened.convert("RGBA")
        opened = Image.new("RGB", solid.size, tuple(about["background"]))
        opened.paste(solid, mask=solid)
    opened = opened.convert("L" if about["channels"] == 1 else "RGB")
    resize, (width, height) = about["resize"], opened.size
    if isinstance(resize, int):  # the shorter side
        size = (resize, int(resize * height / width)) if width <= height else (int(resize * width / height), resize)
    else:
        size = (resize[1], resize[0])
    if size != opened.size:
        opened = opened.resize(size, FILTERS[about["interpolation"]])
    if about["crop"]:
        high, wide = about["crop"]
        left, top = round((opened.width - wide) / 2), round((opened.height - high) / 2)
        opened = opened.crop((left, top, left + wide, top + high))
    pixels = np.asarray(opened, dtype=np.float32).reshape(opened.height, opened.width, -1) / 255
    normal = (pixels - np.array(about["mean"], dtype=np.float32)) / np.array(about["std"], dtype=np.float32)
    return normal.transpose(2, 0, 1)


def cleaned(text: str, how: str) -> str:
    """Return a text as the tokenizer takes it."""
    if how == "canonicalize":
        text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation)).lower()
    return " ".join(text.split()) if how else text


def sound(value: Any, rate: int) -> np.ndarray:
    """Return samples float32 of one channel."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float32)
    import soundfile

    samples, its_rate = soundfile.read(
        io.BytesIO(value) if isinstance(value, bytes) else value, dtype="float32", always_2d=True
    )
    mono = samples.mean(1) if samples.shape[1] > 1 else samples[:, 0]
    if its_rate != rate:
        import soxr

        mono = soxr.resample(mono, its_rate, rate)
    return mono


def fitted(samples: np.ndarray, length: int) -> np.ndarray:
    """Return the middle of a sound, or the sound and silence."""
    start = max(0, len(samples) - length) // 2
    part = samples[start : start + length]
    return np.pad(part, (0, length - len(part)))


def array(value: Any) -> np.ndarray:
    """Return a vector, of an .npy file or of numbers."""
    given = (
        np.load(io.BytesIO(value) if isinstance(value, bytes) else value) if isinstance(value, bytes | str | Path) else value
    )
    return np.asarray(given, dtype=np.float32)


if __name__ == "__main__":
    print(json.dumps(Embedder().embed(sys.argv[1], sys.argv[2:]).tolist()))
