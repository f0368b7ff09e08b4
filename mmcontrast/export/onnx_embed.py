"""Embed pictures, texts, sounds and vectors by the ONNX files of this folder: numpy, Pillow, onnxruntime, tokenizers, ftfy.

python embed.py image a.jpg b.png            # a field, and files; of texts: python embed.py text "a caption"
"""

import html
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
        files = {name: str(self.folder / entry["file"]) for name, entry in self.about["fields"].items()}
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
        config = self.about["fields"][field]
        if config["kind"] == "image":
            return {"pixel_values": np.stack([picture(value, config) for value in values])}
        if config["kind"] == "text":
            return self._tokens(config, values)
        if config["kind"] == "vector":
            return {"vector": np.stack([array(value) for value in values])}
        sounds = [sound(value, config["sample_rate"]) for value in values]
        if "extractor" in config:
            return {"input_features": np.concatenate([self._features(config, samples) for samples in sounds])}
        return {"waveform": np.stack([fitted(samples, config["samples"]) for samples in sounds])}

    def _tokens(self, config: dict[str, Any], values: list[str]) -> dict[str, np.ndarray]:
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_file(str(self.folder / config["tokenizer"] / "tokenizer.json"))
        tokenizer.enable_truncation(config["length"])
        tokenizer.no_padding()
        tokenizer.encode_special_tokens = config["literal"]
        rows = [tokenizer.encode(cleaned(text, config["clean"], config["repair"])).ids for text in values]
        width = config["pad_to"] or max(map(len, rows))
        ids = np.full((len(rows), width), config["pad_id"], dtype=np.int64)
        mask = np.zeros_like(ids)
        for number, row in enumerate(rows):
            columns = slice(width - len(row), None) if config["pad_left"] else slice(len(row))
            ids[number, columns], mask[number, columns] = row, 1
        return {"input_ids": ids} | ({"attention_mask": mask} if config["mask"] else {})

    def _features(self, config: dict[str, Any], samples: np.ndarray) -> np.ndarray:
        """Return the features of one sound by transformers' extractor, seeded, as it cuts long ones at random."""
        from transformers import AutoFeatureExtractor

        extractor = AutoFeatureExtractor.from_pretrained(self.folder / config["extractor"])
        np.random.seed(0)  # noqa: NPY002
        return extractor(samples, sampling_rate=config["sample_rate"], return_tensors="np")["input_features"].astype(np.float32)


def picture(value: Any, config: dict[str, Any]) -> np.ndarray:
    """Return normalised pixels float32 [channels, height, width]."""
    from PIL import Image

    image = value if isinstance(value, Image.Image) else Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    if config["deep"] and image.mode.startswith("I"):  # 16 bits, which Pillow would clip
        values = np.asarray(image).clip(0, 65535)
        grey, transparent = Image.fromarray((values / 257).round().astype(np.uint8)), image.info.get("transparency")
        if transparent is not None:
            alpha = Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
            grey = Image.merge("LA", (grey, alpha))
        image = grey
    if config["background"] and image.has_transparency_data:
        opaque = image.convert("RGBA")
        image = Image.new("RGB", opaque.size, tuple(config["background"]))
        image.paste(opaque, mask=opaque)
    image = image.convert("L" if config["channels"] == 1 else "RGB")
    resize, (width, height) = config["resize"], image.size
    if isinstance(resize, int):  # the shorter side
        size = (resize, int(resize * height / width)) if width <= height else (int(resize * width / height), resize)
    else:
        size = (resize[1], resize[0])
    if size != image.size:
        image = image.resize(size, FILTERS[config["interpolation"]])
    if config["crop"]:
        crop_height, crop_width = config["crop"]
        left, top = round((image.width - crop_width) / 2), round((image.height - crop_height) / 2)
        image = image.crop((left, top, left + crop_width, top + crop_height))
    pixels = np.asarray(image, dtype=np.float32).reshape(image.height, image.width, -1) / 255
    normalised = (pixels - np.array(config["mean"], dtype=np.float32)) / np.array(config["std"], dtype=np.float32)
    return normalised.transpose(2, 0, 1)


def cleaned(text: str, how: str, repair: bool) -> str:
    """Return a text cleaned for the tokenizer; `repair`: broken UTF-8, quotes, ligatures and HTML entities, as open_clip."""
    if repair:
        import ftfy

        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    if how == "canonicalize":
        text = text.replace("_", " ").translate(str.maketrans("", "", string.punctuation)).lower()
    return " ".join(text.split()) if how else text


def sound(value: Any, rate: int) -> np.ndarray:
    """Return samples float32 of one channel."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "iu":  # as in a file of as many bits
            half = 2.0 ** (8 * value.itemsize - 1)
            value = value / half - (value.dtype.kind == "u")
        return value.astype(np.float32)
    import soundfile

    samples, file_rate = soundfile.read(
        io.BytesIO(value) if isinstance(value, bytes) else value, dtype="float32", always_2d=True
    )
    mono = samples.mean(1) if samples.shape[1] > 1 else samples[:, 0]
    if file_rate != rate:
        import soxr

        mono = soxr.resample(mono, file_rate, rate)
    return mono


def fitted(samples: np.ndarray, length: int) -> np.ndarray:
    """Crop a sound to its middle, or pad it with silence."""
    start = max(0, len(samples) - length) // 2
    part = samples[start : start + length]
    return np.pad(part, (0, length - len(part)))


def array(value: Any) -> np.ndarray:
    """Return a vector from an .npy file or from numbers."""
    values = (
        np.load(io.BytesIO(value) if isinstance(value, bytes) else value) if isinstance(value, bytes | str | Path) else value
    )
    return np.asarray(values, dtype=np.float32)


if __name__ == "__main__":
    print(json.dumps(Embedder().embed(sys.argv[1], sys.argv[2:]).tolist()))
