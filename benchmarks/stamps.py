"""Compares pairings on Tux Paint's stamps, and bridges between the fields that a pairing leaves apart.

    mmcontrast data build data_pipelines/stamps/stamps.yaml    # its README says how to get the pictures
    python benchmarks/stamps.py

Every arm is `configs/stamps.yaml`: pictures, English and French captions and spoken French, of which samples lack some. Recall
at 1 on the trained stamps, mirrored, by cosine and through a bridge of the training samples: pictures and speech through
English captions, English and French through pictures. Captions and speech are those of training, so they are known.
"""

from pathlib import Path

from arms import Recalls, compare_bridged, recall_at_1, table_of, train  # type: ignore[import-not-found]  # beside this file

from mmcontrast import load
from mmcontrast.evaluation.banks import read_bank

ARMS = {
    "anchored to English": ["pairing={type: anchor, field: en}"],
    "anchored to pictures": ["pairing={type: anchor, field: image}"],
    "all pairs": [],
}
QUERIES = {  # query, candidate: the bridge between them
    ("image", "en"): None,
    ("en", "image"): None,
    ("image", "speech"): "en",
    ("speech", "image"): "en",
    ("en", "fr"): "image",
    ("fr", "en"): "image",
}


def recalls(folder: Path, arm: str, seed: int) -> Recalls:
    run = train(folder, "configs/stamps.yaml", ARMS, arm, seed)
    table, model = table_of(run, "data/stamps/val_mirrored-*.tar", "val_mirrored"), load(str(run), device="cpu").model
    table_of(run, "data/stamps/train-*.tar", "train")
    found = {}
    for (query, candidate), through in QUERIES.items():
        bank = through and read_bank(model, run / "train", through, None, "cpu", {})
        bridge = bank.between(model, [query], [candidate]) if bank else None
        found[f"{query} → {candidate}"] = [recall_at_1(table, query, candidate, one) for one in (None, bridge)]
    return found


if __name__ == "__main__":
    compare_bridged(__doc__, ARMS, "runs/stamps", recalls, [f"{query} → {candidate}" for query, candidate in QUERIES])
