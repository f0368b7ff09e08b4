"""Data in CLIP_benchmark's layout: pictures of classes, and pictures with captions."""

import numpy as np
from PIL import Image

from mmcontrast.data import write_shard

NAMES = ["queen", "king", "small house", "river"]
TEMPLATES = ["a photo of a {c}.", "{c}, drawn by hand"]


def pictures(number):
    noise = np.random.default_rng(np.random.randint(2**31))  # noqa: NPY002 - seeded by the test
    for size in noise.integers(33, 70, (number, 2)):
        yield Image.fromarray(noise.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
            tuple(size.tolist()), Image.Resampling.BICUBIC
        )


def write(folder, split, samples, shards):
    (folder / split).mkdir(parents=True)
    for number in range(shards):
        write_shard(folder / split / f"{number}.tar", samples[number::shards])
    (folder / split / "nshards.txt").write_text(f"{shards}\n")


def classification(folder):
    samples = [{"__key__": f"s{k:04d}", "png": picture, "cls": k % 3} for k, picture in enumerate(pictures(42))]
    write(folder, "test", samples, 11)  # in the order of the names, 10 would come before 2
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return folder


def retrieval(folder):
    words = ["queen", "king", "small", "village", "board", "two", "colours", "sea", "white", "bishop"]
    noise, samples = np.random.default_rng(np.random.randint(2**31)), []  # noqa: NPY002 - seeded by the test
    for k, picture in enumerate(pictures(24)):
        captions = [f"{k} " + " ".join(noise.choice(words, 5)) for _ in range(2 + k % 4)]
        samples.append({"__key__": f"s{k:04d}", "png": picture, "txt": "\n".join(captions)})
    write(folder, "test", samples, 2)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder
