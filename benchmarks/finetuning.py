"""Measures time and memory of a fine-tuning step: all weights, a locked image tower, and low-rank updates, ours and peft's.

    python benchmarks/finetuning.py                      # transformers' CLIP ViT-B/32 with random weights, 32 pairs, CPU, fp32
    python benchmarks/finetuning.py --batch 64 --rank 4 --rounds 5

Every way is a process of its own that takes turns with the others: forward, loss, backward and AdamW on the same pairs, from
the same weights. Printed are medians over the rounds, the ratio to full fine-tuning, and bytes above the model as it was
loaded. "peft" adapts the same layers of the same model, the linear ones of its blocks (`pip install peft`; else left out).
"""

import argparse
import multiprocessing
import statistics
import time
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from losses import resident  # type: ignore[import-not-found]  # beside this file
from torch import nn

from mmcontrast import contrastive_loss
from mmcontrast.models.lora import add_lora
from mmcontrast.models.transformers import PooledTower

WAYS = ("full", "locked image tower", "LoRA", "LoRA, peft's")
LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"]


def make_clip() -> Any:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    return CLIPModel(CLIPConfig())  # its default is ViT-B/32


class Model(nn.Module):
    """CLIP's two halves as they are trained by one of the ways."""

    def __init__(self, way: str, rank: int) -> None:
        super().__init__()
        self.clip = make_clip()
        image = PooledTower(self.clip, "get_image_features", "pooler_output", lambda batch: {"pixel_values": batch})
        text = PooledTower(self.clip, "get_text_features", "pooler_output", lambda batch: {"input_ids": batch})
        self.image, self.text = image, text
        if way == "locked image tower":
            self.clip.vision_model.requires_grad_(False)
            self.clip.visual_projection.requires_grad_(False)
        elif way == "LoRA":
            add_lora(image, rank)  # the network is one: this adapts both halves
        elif way == "LoRA, peft's":
            from peft import LoraConfig, get_peft_model

            adapted = get_peft_model(self.clip, LoraConfig(r=rank, lora_alpha=rank, target_modules=LAYERS))
            image.network = text.network = self.clip = adapted.base_model.model

    def loss(self, pictures: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        rows = {"image": self.image(pictures), "text": self.text(texts)}
        unit = {field: nn.functional.normalize(row, dim=1) for field, row in rows.items()}
        return contrastive_loss(unit, logit_scale=self.clip.logit_scale.exp())


def work(way: str, batch: int, rank: int, pipe: Connection) -> None:
    """Train a step for each message, and send its seconds; at the end (trainable weights, peak bytes)."""
    model = Model(way, rank).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=1e-5)
    torch.manual_seed(1)
    pictures, texts = torch.randn(batch, 3, 224, 224), torch.randint(1, 49000, (batch, 77))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = resident("VmRSS")
    while pipe.recv():
        start = time.perf_counter()
        model.loss(pictures, texts).backward()
        optimizer.step()
        optimizer.zero_grad()
        pipe.send(time.perf_counter() - start)
    pipe.send((sum(parameter.numel() for parameter in trainable), resident("VmHWM") - before))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=32, help="pairs of a step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="steps of each way that are timed, after one that is not")
    options = parser.parse_args()
    context, ways = multiprocessing.get_context("spawn"), [way for way in WAYS if "peft" not in way or find_spec("peft")]
    pipes = {}
    for way in ways:
        pipes[way], theirs = context.Pipe()
        context.Process(target=work, args=(way, options.batch, options.rank, theirs), daemon=True).start()
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(options.rounds + 1):
        for way, pipe in pipes.items():  # in turn: nothing else runs meanwhile
            pipe.send(True)
            seconds[way].append(pipe.recv())
    versions = f"{torch.get_num_threads()} threads, torch {torch.__version__}"
    print(f"CLIP ViT-B/32, {options.batch} pairs, rank {options.rank}, {versions}")
    print(f"{'':20} {'learn':>10} {'s a step':>9} {'/ full':>18} {'peak':>10}")
    for way, pipe in pipes.items():
        pipe.send(False)
        trainable, peak = pipe.recv()
        ratios = [seconds_of_way / full for seconds_of_way, full in zip(seconds[way][1:], seconds["full"][1:], strict=True)]
        median, spread = statistics.median(ratios), f"({min(ratios):.2f}–{max(ratios):.2f})"
        step_seconds = statistics.median(seconds[way][1:])
        print(f"{way:20} {trainable / 1e6:>8.2f} M {step_seconds:>9.2f} {median:>6.2f} {spread} {peak / 2**30:>6.2f} GiB")


if __name__ == "__main__":
    main()
