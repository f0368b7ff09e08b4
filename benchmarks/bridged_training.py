"""Compares ways to train fields that are never paired, or seldom, each scored by cosine and through a bridge of captions.

    make data
    python benchmarks/bridged_training.py --plot docs/bridged_training.png   # 100 minutes on 2 cores; goes on where it was

Every arm is `configs/quickstart.yaml` with equal steps and seeds: anchored to texts alone; with a bridge's targets for pictures
and sounds (`train.bridge`), early and late, weak and strong; and with their pairs (`all_pairs`), which an anchored corpus may
lack, alone and with both. The bank is the training set's captions, each once. Recall at 1 on `val`.
"""

from pathlib import Path

import torch
from arms import Recalls, compare, mmcontrast, parser_of  # type: ignore[import-not-found]  # beside this file

from mmcontrast import load
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.evaluation.banks import read_bank
from mmcontrast.evaluation.bridge import Bridge
from mmcontrast.evaluation.rankings import Pairs, rank

DATA = Path("data/glyphs")
WITHOUT_EVALUATION = ("evaluation.splits={}", "evaluation.zero_shot={}", "evaluation.best=null")
ALONE = "train.bridge=null"
ALL_PAIRS = "pairing={{type: all_pairs, weights: {{image-audio: {}}}}}"
ARMS: dict[str, list[str]] = {
    "anchor": [ALONE],
    "anchor, bridge 0.1 from step 230": ["train.bridge={through: text, weight: 0.1, start: 230}"],
    "anchor, bridge 0.5 from step 345": ["train.bridge={through: text, weight: 0.5, start: 345}"],
    "all pairs, image-audio 0.2": [ALL_PAIRS.format(0.2), ALONE],
    "all pairs, image-audio 1": [ALL_PAIRS.format(1.0), ALONE],
    "all pairs 0.2, bridge 0.1 from step 230": [
        ALL_PAIRS.format(0.2),
        "train.bridge={through: text, weight: 0.1, start: 230, pairs: [[image, audio]]}",
    ],
}
QUERIES = (("image", "text"), ("audio", "text"), ("image", "audio"), ("audio", "image"))


def train(folder: Path, arm: str, seed: int) -> Recalls:
    run = folder / f"{list(ARMS).index(arm):02d}-{seed}"
    if not (run / "val" / "manifest.json").exists():
        options = [f"run.dir={run.parent}", f"run.name={run.name}", f"train.seed={seed}", *ARMS[arm]]
        mmcontrast("train", "configs/quickstart.yaml", "--overwrite", *WITHOUT_EVALUATION, *options)
        mmcontrast("embed", run, DATA / "val-*.tar", run / "val")
    table, model = EmbeddingTable.read(run / "val"), load(str(run), device="cpu")
    bank, scale = read_bank(model.model, str(DATA / "train-*.tar"), None, None, model.device, {}).rows, model.scale_of_texts()
    bridge = Bridge(bank, bank, scale, scale)
    recalls_of_queries = {}
    for query, candidate in QUERIES:
        ways = [recall_at_1(table, query, candidate, None)]
        if "text" not in (query, candidate):
            ways.append(recall_at_1(table, query, candidate, bridge))
        recalls_of_queries[f"{query} → {candidate}"] = ways if len(ways) == 2 else ways * 2
    return recalls_of_queries


def recall_at_1(table: EmbeddingTable, query: str, candidate: str, bridge: Bridge | None) -> float:
    """Return recall at 1; rows of one group belong together."""
    pairs = Pairs.of_groups(table.group_ids, table.group_ids)
    (ranking, _) = rank(table.fields[query], table.fields[candidate], pairs, both=True, bridge=bridge)
    first = torch.full((len(table),), 2**62).scatter_reduce(0, ranking.queries, ranking.ranks, "amin")
    return (first == 1).double().mean().item()


def main() -> None:
    options = parser_of(__doc__, ARMS, "runs/bridged").parse_args()
    compare(
        options,
        lambda arm, seed: train(options.folder, arm, seed),
        [f"{query} → {candidate}" for query, candidate in QUERIES],
        [("#777777", "cosine"), ("#2166ac", "through the bridge")],
    )


if __name__ == "__main__":
    main()
