"""Measures the peak memory of one step as the batch grows 16-fold: towers' activations kept, or gradient caching.

    python benchmarks/grad_cache_memory.py                         # ViT-S/16 and a 4-layer BERT, D = 512, fp32, CPU
    python benchmarks/grad_cache_memory.py --batches 64 128 --micro 16

Bytes above model, gradients and batch; each figure is a process of its own (Linux). Also the largest relative difference of
the two ways' gradients, in fp32, at the smallest batch.
"""

import argparse
import multiprocessing
from pathlib import Path

import torch
from losses import resident  # type: ignore[import-not-found]  # beside this file

from mmcontrast import contrastive_loss
from mmcontrast.modalities import ImageModality, TextModality
from mmcontrast.models import ContrastiveModel, Embeddings, TimmTower, TransformersTower
from mmcontrast.training.grad_cache import cached_backward
from mmcontrast.types import Batch

BERT = {"vocab_size": 49408, "hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}


def make_model() -> ContrastiveModel:
    torch.manual_seed(0)
    towers = {
        "image": TimmTower("vit_small_patch16_224", img_size=112, drop_path_rate=0.1),
        "text": TransformersTower("bert", config=BERT),
    }
    modalities = {"image": ImageModality(size=112), "text": TextModality(context_length=32)}
    return ContrastiveModel(modalities, towers, {"image": "image", "text": "text"}, 512)


def make_batch(n: int) -> Batch:
    images = torch.randint(256, (n, 3, 112, 112), dtype=torch.uint8)
    tokens = torch.randint(1, 49000, (n, 32))
    present = torch.ones(n, dtype=torch.bool)
    return Batch(
        {"image": images, "text": tokens}, {"image": present, "text": present}, torch.arange(n), torch.arange(n), [{}] * n
    )


def step(model: ContrastiveModel, batch: Batch, micro: int | None) -> None:
    def loss_of(embeddings: Embeddings) -> torch.Tensor:
        return contrastive_loss(embeddings.fields, logit_scale=embeddings.logit_scale)

    if micro:
        cached_backward(model, batch, micro, loss_of)
    else:
        loss_of(model(batch)).backward()


def peak(n: int, micro: int | None) -> int:
    model, batch = make_model(), make_batch(n)
    step(model, make_batch(2), None)  # gradients, and the libraries' buffers
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = resident("VmRSS")
    step(model, batch, micro)
    return resident("VmHWM") - before


def difference(n: int, micro: int) -> float:
    """Return the relative difference of the gradients, without dropout, which differs between a batch and its micro-batches."""
    gradients = []
    for size in (None, micro):
        model = make_model().eval()
        batch = make_batch(n)  # the same, after the model's seed
        step(model, batch, size)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    return float((gradients[0] - gradients[1]).norm() / gradients[0].norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--micro", type=int, default=32)
    parser.add_argument("--largest-plain", type=int, default=256, help="the largest batch that keeps its activations")
    options = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print(f"MiB above model, gradients and batch; micro-batches of {options.micro}\n{'batch':>8} {'kept':>10} {'cached':>10}")
    for n in options.batches:
        cells = []
        for micro in (None, options.micro):
            if micro is None and n > options.largest_plain:
                cells.append("–")
                continue
            with context.Pool(1) as pool:
                cells.append(f"{pool.apply(peak, (n, micro)) / 2**20:,.0f}")
        print(f"{n:>8,} {cells[0]:>10} {cells[1]:>10}", flush=True)
    print(f"gradients differ by {difference(options.batches[0], options.micro):.1e} (relative norm, fp32)")


if __name__ == "__main__":
    main()
