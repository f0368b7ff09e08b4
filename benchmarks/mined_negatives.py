"""Compares mined negatives, and batches of neighbours, with in-batch negatives on letters that look alike, at equal compute.

    mmcontrast data build data_pipelines/glyphs/letters.yaml
    python benchmarks/mined_negatives.py --plot docs/mined_negatives.png   # 25 minutes on 2 cores; goes on where it was

All arms of a seed go on from one run of `configs/letters.yaml` with as many FLOPs of the towers, what is embedded to mine
included. Letters whose pictures are those of another (Latin A, Greek Alpha) are its false negatives: as many of the mined
candidates as are drawn the same is told for each filter. Recall at 1 on the held-out pictures and voices, of those letters and
of the others, as `compare_objectives.py` takes it.
"""

import sys
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
from arms import Recalls, compare, mmcontrast, parser_of  # type: ignore[import-not-found]  # beside this file
from compare_objectives import CONFIG, FONT, KINDS, QUERIES, recalls

from mmcontrast.config import load_config
from mmcontrast.evaluation import EmbeddingTable

BATCH, STEPS = 128, 116  # of the arm with in-batch negatives
TRAIN = "data/letters/train-*.tar"
MINED = {"query": "image", "candidate": "text"}
FILTERS: dict[str, list[str]] = {
    "none": [],
    "relative margin 0.05": ["--relative-margin", "0.05"],
    "relative margin 0.2": ["--relative-margin", "0.2"],
}
NEGATIVES = "data.negatives={{table: {table}, field: text, count: 1}}"
NEIGHBOURS = "data.batches={{type: neighbours, table: {table}, nearest: 16, count: 7}}"
ROUND = 58  # steps between two minings: two epochs, as batches of neighbours ask for
AGAIN = [
    f"train.mine_every={ROUND}",
    "train.mine={query: image, candidate: text, count: 16, relative_margin: 0.05, first: true}",
]
ARMS: dict[str, tuple[str | None, list[str]]] = {  # the filter of what is mined once, overrides
    "in-batch": (None, []),
    "mined, no filter": ("none", [NEGATIVES]),
    "mined, relative margin 0.05": ("relative margin 0.05", [NEGATIVES]),
    "mined, relative margin 0.2": ("relative margin 0.2", [NEGATIVES]),
    "mined every 58 steps, relative margin 0.05": (None, ["data.negatives={{field: text, count: 1}}", *AGAIN]),
    "neighbours": ("none", [NEIGHBOURS]),
    "neighbours, mined every 58 steps": (None, ["data.batches={{type: neighbours, nearest: 16, count: 7}}", *AGAIN]),
}


@cache
def costs() -> dict[str, float]:
    """Return the FLOPs of a forward of one sample, by field."""
    from mmcontrast.plan import plan_run

    return {tower: plan.flops for tower, plan in plan_run(load_config(Path(CONFIG), [])).towers.items()}


def steps_of(arm: str, samples: int, forward: Mapping[str, float]) -> int:
    """Return how many steps cost what the in-batch arm does: a backward is two forwards, an embedding one of two fields."""
    overrides, step = ARMS[arm][1], BATCH * 3 * sum(forward.values())
    budget = STEPS * step
    if any("negatives" in override for override in overrides):
        step += BATCH * 3 * forward["text"]
    if AGAIN[0] in overrides:
        step += samples * (forward["image"] + forward["text"]) / ROUND
    return round(budget / step)


def base(seed: int, folder: Path) -> Path:
    """Return the run that all arms of a seed start from, with its training data embedded and mined."""
    base_run = folder / f"base-{seed}"
    if not (base_run / "results.json").exists():
        mmcontrast("train", CONFIG, f"run.dir={folder}", f"run.name={base_run.name}", f"train.seed={seed}", "--overwrite")
    if not (base_run / "train" / "manifest.json").exists():
        mmcontrast("embed", str(base_run), TRAIN, str(base_run / "train"))
    for name, options in FILTERS.items():
        out = base_run / f"{name.replace(' ', '-')}.parquet"
        if not out.exists():
            fields = [f"--{side}={field}" for side, field in MINED.items()]
            mmcontrast("data", "mine", str(base_run / "train"), str(out), *fields, "--count", "16", *options)
    return base_run


def false_negatives(base_run: Path) -> dict[str, tuple[float, float]]:
    """By filter: the share of the first candidates that are drawn as the query is, and of queries that keep a candidate."""
    sys.path.insert(0, "")
    from data_pipelines.glyphs.glyphs import draw

    table = EmbeddingTable.read(base_run / "train")
    letter = dict(zip(table.sample_ids.tolist(), table.group_ids.tolist(), strict=True))
    drawn = {code: draw(chr(code), FONT, 40, 48).tobytes() for code in set(letter.values())}
    shares = {}
    for name in FILTERS:
        rows = pq.read_table(base_run / f"{name.replace(' ', '-')}.parquet").to_pylist()
        pairs = [(row["sample_id"], row["candidate_ids"][0]) for row in rows if row["candidate_ids"]]
        drawn_alike = [drawn[letter[query]] == drawn[letter[candidate]] for query, candidate in pairs]
        shares[name] = sum(drawn_alike) / max(1, len(drawn_alike)), len(pairs) / len(rows)
    return shares


def run(arm: str, seed: int, folder: Path) -> Recalls:
    start, (mined, overrides) = base(seed, folder), ARMS[arm]
    steps = steps_of(arm, len(EmbeddingTable.read(start / "train")), costs())
    run_folder = folder / f"{list(ARMS).index(arm):02d}-{seed}"
    table = start / f"{mined.replace(' ', '-')}.parquet" if mined else ""
    formatted = [override if override in AGAIN else override.format(table=table) for override in overrides]
    options = [f"run.dir={folder}", f"run.name={run_folder.name}", f"train.seed={seed + 100}", f"train.init_from={start}"]
    options += [f"train.steps={steps}", "train.lr=5e-3", "train.tower_lr={text: 1e-3}", "train.warmup_steps=10", *formatted]
    mmcontrast("train", CONFIG, *options, "--overwrite")
    mmcontrast("embed", run_folder, "data/letters/val-*.tar", run_folder / "table")
    return recalls(EmbeddingTable.read(run_folder / "table"), multilinear=False) | {"steps": [steps]}


def main() -> None:
    options = parser_of(__doc__, ARMS, "runs/mined").parse_args()

    def before(seed: int) -> None:
        for name, (share, kept) in false_negatives(base(seed, options.folder)).items():
            print(
                f"seed {seed}, filter {name}: {share:.3f} of first candidates are drawn alike, {kept:.3f} of queries have any"
            )

    compare(options, lambda arm, seed: run(arm, seed, options.folder), list(QUERIES), KINDS, before)


if __name__ == "__main__":
    main()
