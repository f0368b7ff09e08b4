"""Measures time and memory of each objective and combination beside plain InfoNCE, on the same inputs.

    python benchmarks/objectives.py                          # times: N = 4,096, D = 512; a few minutes on 2 cores
    python benchmarks/objectives.py --memory 2048 4096 8192 16384 --plot docs/objectives_memory.png

A row is a forward and backward of both directions; the ratio is the median of rounds in turn. `products` counts products of
N × N × D multiplications: 1 forward and 3 backward of plain InfoNCE, which recomputes the scores.
"""

import argparse
import multiprocessing
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from losses import inputs, peak_above_inputs, run  # type: ignore[import-not-found]  # beside this file
from torch import Tensor

from mmcontrast import contrastive_loss

OWN = 8  # candidates of each anchor alone


def rows(n: int, dim: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def loss_with(make_options: Callable[[int, int], dict[str, Any]], locked: bool = False) -> Any:
    """Return a loss of (x, y, scale, bias); its further options are made once for each shape."""
    options_of: dict[tuple[int, int], dict[str, Any]] = {}

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        if (shape := (len(x), x.shape[1])) not in options_of:
            options_of[shape] = make_options(*shape)
        options = options_of[shape]
        embeddings = {"image": x.detach() if locked else x, "text": y}
        biased = options.get("objective") == "siglip"
        return contrastive_loss(embeddings, logit_scale=scale, logit_bias=bias if biased else None, **options)

    return loss


def plain(n: int, dim: int, **options: Any) -> dict[str, Any]:
    return options


def taught(n: int, dim: int, teachers: int = 1, **objective: Any) -> dict[str, Any]:
    teacher_rows = [{"image": rows(n, dim, 2 * k), "text": rows(n, dim, 2 * k + 1)} for k in range(teachers)]
    return {"objective": objective, "teacher": teacher_rows}


def with_own(n: int, dim: int) -> dict[str, Any]:
    own_negatives = F.normalize(torch.randn(n, OWN, dim, generator=torch.Generator().manual_seed(0)), dim=2)
    return {"own_negatives": {"text": own_negatives}}


def prefixes(n: int, dim: int) -> dict[str, Any]:
    return {"matryoshka": (dim // 4, dim // 2, dim)}


FIELDS = {"type": "all_pairs", "same_field": True}
FORMS: dict[str, tuple[float, Any]] = {  # products, loss
    "infonce": (4, loss_with(plain)),
    "infonce, image tower locked": (3, loss_with(plain, locked=True)),
    "infonce, label_smoothing": (4, loss_with(partial(plain, objective={"type": "infonce", "label_smoothing": 0.1}))),
    "infonce, false_negative_margin": (
        4,
        loss_with(partial(plain, objective={"type": "infonce", "false_negative_margin": 0.1})),
    ),
    "infonce, guide": (6, loss_with(partial(taught, type="infonce", false_negative_margin=0.0, guide=True))),
    "infonce, 8 own negatives": (4, loss_with(with_own)),
    "infonce, same_field joint": (12, loss_with(partial(plain, pairing=FIELDS | {"joint": True}))),
    "infonce, matryoshka ¼, ½, 1": (7, loss_with(prefixes)),
    "infonce, lorentz": (4, loss_with(partial(plain, score={"type": "lorentz", "curvature": 1.0}))),
    "distillation": (7, loss_with(partial(taught, type="distillation"))),
    "distillation, 2 teachers": (10, loss_with(partial(taught, teachers=2, type="distillation"))),
    "hard_negative": (4, loss_with(partial(plain, objective="hard_negative"))),
    "hybrid": (4, loss_with(partial(plain, objective="hybrid"))),
    "multi_positive": (4, loss_with(partial(plain, objective="multi_positive"))),
    "siglip": (4, loss_with(partial(plain, objective="siglip"))),
}


def peak(name: str, n: int, dim: int) -> int:
    torch.set_num_threads(2)
    return int(peak_above_inputs(FORMS[name][1], n, dim, torch.float32))


def times(names: list[str], n: int, dim: int, rounds: int) -> None:
    leaves, ratios = inputs(n, dim, torch.float32), {name: [] for name in names}
    for name in names:
        run(FORMS[name][1], inputs(512, dim, torch.float32))
        FORMS[name][1](*leaves)  # makes its options
    for _ in range(rounds):
        reference = run(FORMS["infonce"][1], leaves)
        for name in names:
            ratios[name].append(run(FORMS[name][1], leaves) / reference)
    print(f"\nN = {n:,}, D = {dim}, fp32, {rounds} rounds in turn\n\n| | products | time / infonce |\n|---|---|---|")
    for name, values in ratios.items():
        print(f"| {name} | {FORMS[name][0] / 4:.2f} | {statistics.median(values):.2f} ({min(values):.2f}–{max(values):.2f}) |")


def memory(names: list[str], sizes: list[int], dim: int, path: str | None) -> None:
    print(f"\nMiB above the inputs, D = {dim}, fp32\n\n| | {' | '.join(f'{n:,}' for n in sizes)} |\n|---|{'---|' * len(sizes)}")
    table = {}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in names:
            table[name] = [pool.apply(peak, (name, n, dim)) / 2**20 for n in sizes]
            print(f"| {name} | {' | '.join(f'{value:,.0f}' for value in table[name])} |", flush=True)
    if path:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 5), layout="constrained")
        axes = figure.subplots()
        for number, (name, values) in enumerate(table.items()):
            axes.loglog(sizes, values, "osD^v<>"[number % 7] + "-", label=name, markersize=4)
        axes.loglog(sizes, [n * n * 4 / 2**20 for n in sizes], "k:", label="one N × N matrix")
        axes.set(xlabel="batch size N", ylabel="MiB above the inputs")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=7, ncols=2)
        figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS), metavar="FORM")
    parser.add_argument("--memory", type=int, nargs="+", metavar="N", help="peaks at these sizes in the place of times")
    parser.add_argument("--plot", help="a PNG of the peaks")
    options = parser.parse_args()
    if options.memory:
        memory(options.forms, options.memory, options.dim, options.plot)
    else:
        times(options.forms, options.n, options.dim, options.rounds)


if __name__ == "__main__":
    main()
