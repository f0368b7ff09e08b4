"""Compares ways to train fields that are never paired, or seldom, each scored by cosine and through a bridge of captions.

    make data
    python benchmarks/bridged_training.py --plot docs/bridged_training.png   # 100 minutes on 2 cores; goes on where it was

Every arm is `configs/quickstart.yaml` with equal steps and seeds: anchored to texts alone; with a bridge's targets for pictures
and sounds (`train.bridge`), early and late, weak and strong; and with their pairs (`all_pairs`), which an anchored corpus may
lack, alone and with both. The bank is the training set's captions, each once. Recall at 1 on `val`.
"""

from pathlib import Path

from arms import Recalls, compare_bridged, recall_at_1, table_of, train  # type: ignore[import-not-found]  # beside this file

from mmcontrast import load
from mmcontrast.evaluation.banks import read_bank
from mmcontrast.evaluation.bridge import Bridge

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


def recalls(folder: Path, arm: str, seed: int) -> Recalls:
    run = train(folder, "configs/quickstart.yaml", ARMS, arm, seed, *WITHOUT_EVALUATION)
    table, model = table_of(run, DATA / "val-*.tar", "val"), load(str(run), device="cpu")
    bank, scale = read_bank(model.model, str(DATA / "train-*.tar"), None, None, model.device, {}).rows, model.scale_of_texts()
    bridge = Bridge(bank, bank, scale, scale)
    recalls_of_queries = {}
    for query, candidate in QUERIES:
        ways = [recall_at_1(table, query, candidate)]
        if "text" not in (query, candidate):
            ways.append(recall_at_1(table, query, candidate, bridge))
        recalls_of_queries[f"{query} → {candidate}"] = ways if len(ways) == 2 else ways * 2
    return recalls_of_queries


if __name__ == "__main__":
    compare_bridged(__doc__, ARMS, "runs/bridged", recalls, [f"{query} → {candidate}" for query, candidate in QUERIES])
