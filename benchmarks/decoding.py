"""Compares the decoding of a start, the library's and ours: CPU milliseconds, pixels and embedding of a picture.

    python benchmarks/decoding.py --pictures 'data/stamps/*.tar'

The pictures of shards become JPEGs of 512×384 (white around them), then go from bytes to normalised tensors of 224×224, one by
one, in one thread, by either way in turn. Weights are random: how far embeddings of two pictures are apart says what a
difference means.
"""

import argparse
import glob
import io
import statistics
import tarfile
import time
from collections.abc import Iterator

import torch
from PIL import Image, ImageOps
from torch import Tensor

from mmcontrast.modalities import ImageModality
from mmcontrast.models import ContrastiveModel, StartOptions, open_start
from mmcontrast.models.decoding import set_decoding

MODELS = ("ViT-B-32", "ViT-B-16-SigLIP", "timm:vit_base_patch16_224")
SIZE, WARM, COMPARED = (512, 384), 20, 50


def jpegs(shards: str, count: int) -> Iterator[bytes]:
    for shard in sorted(glob.glob(shards)):
        with tarfile.open(shard) as tar:
            for member in tar:
                if member.name.endswith(".png") and count > 0:
                    picture = Image.open(tar.extractfile(member)).convert("RGBA")
                    ground = Image.new("RGBA", picture.size, "white")
                    ground.alpha_composite(picture)
                    target, count = io.BytesIO(), count - 1
                    ImageOps.pad(ground.convert("RGB"), SIZE, color="white").save(target, "JPEG", quality=90)
                    yield target.getvalue()


def prepare(images: ImageModality, data: bytes, training: bool) -> tuple[Tensor, float]:
    """Return a normalised tensor [3, 224, 224], and the milliseconds of CPU time that it took."""
    start = time.thread_time()
    pixels = images(images.collate([images.transform(images.decode(data), training)]))[0]
    return pixels, 1000 * (time.thread_time() - start)


def compare(name: str, model: ContrastiveModel, pictures: list[bytes]) -> str:
    library = model.modality("image").eval()
    assert isinstance(library, ImageModality)
    ways, times = {"library": library, "ours": library.for_training()}, {}
    for training in (True, False):
        milliseconds: dict[str, list[float]] = {way: [] for way in ways}
        for data in pictures:
            for way, images in ways.items():
                milliseconds[way].append(prepare(images, data, training)[1])
        times[training] = [statistics.median(milliseconds[way][WARM:]) for way in ways]
    compared = pictures[:: max(1, len(pictures) // COMPARED)]
    library_pixels, our_pixels = (
        torch.stack([prepare(images, data, False)[0] for data in compared]) for images in ways.values()
    )
    deviation = 255 * torch.tensor(ways["ours"].std).view(-1, 1, 1)
    levels = ((library_pixels - our_pixels) * deviation).abs()
    with torch.no_grad():
        library_rows, our_rows = (
            torch.cat([model.encode("image", part) for part in pixels.split(32)]) for pixels in (library_pixels, our_pixels)
        )
    cosines, of_pairs = (
        (library_rows * our_rows).sum(1),
        (library_rows @ library_rows.T)[~torch.eye(len(library_rows), dtype=torch.bool)],
    )
    rates = "; ".join(
        f"{'training' if training else 'evaluation'} {a:.2f} ms and {b:.2f} ms, {a / b:.2f} times as fast"
        for training, (a, b) in times.items()
    )
    return (
        f"{name}: {rates}; of {len(compared)}, pixels {levels.mean():.2f} of 255 levels apart (largest {levels.max():.0f});"
        f" 1 − cosine: median {1 - cosines.median():.1e}, largest {1 - cosines.min():.1e},"
        f" of two pictures {1 - of_pairs.median():.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", required=True, help="shards that have .png members")
    parser.add_argument("--count", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = list(jpegs(options.pictures, options.count))
    print(f"{len(pictures)} JPEGs, {sum(map(len, pictures)) / len(pictures) / 1000:.0f} kB each")
    for name in MODELS:
        start = StartOptions(model=name, pretrained=False, decoding="fast")
        print(compare(name, set_decoding(open_start(start), start), pictures), flush=True)


if __name__ == "__main__":
    main()
