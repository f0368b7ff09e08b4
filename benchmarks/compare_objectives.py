"""Objectives, pairings and batches on the letters corpus: equal samples seen, a minute each on 2 cores, three seeds.

    mmcontrast data build data_pipelines/glyphs/letters.yaml
    python benchmarks/compare_objectives.py --plot docs/objectives.png     # 40 minutes; interrupted, it goes on where it was

Recall at 1 on pictures in a font that was never trained on, names in voices that were not. The pictures of some letters are
those of another too (Latin A, Greek Alpha, Cyrillic A): only their sound tells them apart. They are counted apart.
"""

import sys
import time
from pathlib import Path

import torch
from arms import Recalls, compare, mmcontrast, parser_of  # type: ignore[import-not-found]  # beside this file

from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.evaluation.rankings import Pairs, rank
from mmcontrast.evaluation.retrieval import first_of_each_group

CONFIG, FONT = "configs/letters.yaml", "DejaVuSerif-Bold"
PRODUCTS = ["pairing=multilinear", "model.logit_scale=277", "model.max_logit_scale=1386"]  # √192 times a pair's
ARMS = {
    "infonce": [],
    "dcl": ["objective=dcl"],
    "siglip": ["objective=siglip", "model.logit_scale=10", "model.logit_bias=-10"],
    "hard_negative, β = 0.25": ["objective=hard_negative"],
    "debiased, τ⁺ = 0.01": ["objective={type: debiased, tau_plus: 0.01}"],
    "multi_positive": ["objective=multi_positive"],
    "global, ρ = 3": ["objective={type: global, gamma: 0.5, rho: 3}"],
    "global, individual τ, ρ = 2": ["objective={type: global, gamma: 0.5, rho: 2, temperature: individual}"],
    "infonce, anchor text": ["pairing={type: anchor, field: text}"],
    "infonce, multilinear": PRODUCTS,
    "infonce, margin 0.1 of false negatives": ["objective={type: infonce, false_negative_margin: 0.1}"],
    "infonce, label smoothing 0.1": ["objective={type: infonce, label_smoothing: 0.1}"],
    "infonce, own fields too": ["pairing={type: all_pairs, same_field: true}"],
    "infonce, own fields in one denominator": ["pairing={type: all_pairs, same_field: true, joint: true}"],
    "infonce, matryoshka 24, 48, 96, 192": ["train.matryoshka=[24, 48, 96, 192]"],
    "hybrid": ["objective=hybrid"],
    "distillation of infonce's first seed": ["objective={type: distillation, alpha: 0.5}", "train.teacher=FOLDER/00-0"],
    "infonce, queue of 1024": ["train.queue_size=1024", "train.queue_momentum=0.99"],
    "infonce, batch 32": ["train.batch_size=32", "train.steps=928", "train.warmup_steps=100"],
    "infonce, batch 512, cached": [
        "train.batch_size=512",
        "train.micro_batch_size=128",
        "train.steps=58",
        "train.warmup_steps=6",
    ],
}
QUERIES = {
    "image → text": (["image"], "text"),
    "audio → text": (["audio"], "text"),
    "image → audio": (["image"], "audio"),
    "image + audio → text": (["image", "audio"], "text"),
}


KINDS = [("#2166ac", "other letters"), ("#d6604d", "look-alikes")]


def lookalikes(codes: list[int]) -> torch.Tensor:
    """bool, one a code point: another one is drawn the same."""
    sys.path.insert(0, "")  # the corpus is described in the folder that this is run from
    from data_pipelines.glyphs.glyphs import draw

    drawn = {code: draw(chr(code), FONT, 40, 48).tobytes() for code in set(codes)}
    pictures = list(drawn.values())
    return torch.tensor([pictures.count(drawn[code]) > 1 for code in codes])


def recalls(table: EmbeddingTable, multilinear: bool) -> Recalls:
    """Per query, recall at 1 of letters that look like no other, and of the others. Two fields are joined as they were trained:
    by the sum of their cosines, or by their product."""
    twins, values = lookalikes(table.group_ids.tolist()), {}
    candidates = first_of_each_group(table.group_ids)
    for name, (fields, target) in QUERIES.items():
        rows = [table.fields[field] for field in fields]
        query = torch.stack(rows).prod(0) if multilinear else torch.stack(rows).sum(0)
        pairs = Pairs.of_groups(table.group_ids, table.group_ids[candidates])  # of each query one
        (ranking,) = rank(query, table.fields[target][candidates], pairs)
        values[name] = [(ranking.ranks[kind] == 1).double().mean().item() for kind in (~twins, twins)]
    return values


def run(arm: str, seed: int, folder: Path, extra: list[str]) -> Recalls:
    """Return the recalls, and the seconds that training took."""
    run_folder = folder / f"{list(ARMS).index(arm):02d}-{seed}"
    arm_options = [option.replace("FOLDER", str(folder)) for option in ARMS[arm]]
    options = [f"run.dir={folder}", f"run.name={run_folder.name}", f"train.seed={seed}", *arm_options, *extra]
    began = time.perf_counter()
    mmcontrast("train", CONFIG, *options, "--overwrite")
    seconds = time.perf_counter() - began
    mmcontrast("embed", run_folder, "data/letters/val-*.tar", run_folder / "table")
    return recalls(EmbeddingTable.read(run_folder / "table"), ARMS[arm] is PRODUCTS) | {"seconds": [seconds]}


def main() -> None:
    parser = parser_of(__doc__, ARMS, "runs/objectives")
    parser.add_argument("--override", nargs="*", default=[], help="further overrides of every run: train.steps=20")
    options = parser.parse_args()
    compare(options, lambda arm, seed: run(arm, seed, options.folder, options.override), list(QUERIES), KINDS)


if __name__ == "__main__":
    main()
