"""Measures the cost of wrong captions, and the gain of a filter by a model's own scores, on letters with a fifth shuffled.

    mmcontrast data build data_pipelines/glyphs/letters.yaml
    python benchmarks/wrong_captions.py --plot docs/wrong_captions.png     # 20 minutes on 2 cores; goes on where it was

The arm "planted" trains `configs/letters.yaml` on pictures and captions of which a fifth belong to another letter, and knows
nothing of it. Its scores of its own training data are the filter (Data Filtering Networks, arXiv:2309.17425, train one on
clean data: none is needed here); the other arms train afresh on what it keeps, on what a perfect filter would, and on the
corpus as it was. All take equal steps. Recall at 1 on pictures in a font that was never trained on.
"""

import io
import json
import random
import tarfile
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from arms import Recalls, compare, mmcontrast, parser_of  # type: ignore[import-not-found]  # beside this file
from compare_objectives import CONFIG, KINDS, lookalikes

from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.evaluation.rankings import Pairs, rank
from mmcontrast.evaluation.retrieval import first_of_each_group

DATA, VAL, QUERY = Path("data/letters"), "data/letters/val-*.tar", "image → text"
WRONG = 0.2
ARMS = ["planted", "best 80 % by score", "best 70 % by score", "perfect filter", "nothing planted"]


def plant(folder: Path, seed: int) -> list[int]:
    """Write the training shards with the captions (and groups, which a user takes from captions) of a fifth of the samples
    exchanged for others'; return the sample ids of those."""
    labels = {}
    for shard in sorted(DATA.glob("train-*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar.getmembers():
                if member.name.endswith((".json", ".txt")):
                    labels[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
    keys = sorted(name.removesuffix(".txt") for name in labels if name.endswith(".txt"))
    chosen = random.Random(seed).sample(keys, round(WRONG * len(keys)))
    caption_of = dict(zip(chosen, chosen[1:] + chosen[:1], strict=True))
    wrong = []
    folder.mkdir(parents=True, exist_ok=True)
    for shard in sorted(DATA.glob("train-*.tar")):
        with tarfile.open(shard) as source, tarfile.open(folder / shard.name, "w") as planted:
            for member in source.getmembers():
                key, ending = member.name.split(".", 1)
                file = source.extractfile(member)
                assert file is not None
                content = labels[f"{caption_of.get(key, key)}.txt"] if ending == "txt" else file.read()
                if ending == "json" and key in caption_of:
                    metadata, other_metadata = json.loads(content), json.loads(labels[f"{caption_of[key]}.json"])
                    if metadata["group_id"] != other_metadata["group_id"]:
                        wrong.append(metadata["sample_id"])
                    content = json.dumps(metadata | {"group_id": other_metadata["group_id"]}).encode()
                member.size = len(content)
                planted.addfile(member, io.BytesIO(content))
    return wrong


@cache
def prepare(seed: int, folder: Path) -> Path:
    """Return the folder of a seed with planted shards, the run on all of them, its scores and the selections."""
    planted_folder = folder / f"planted-{seed}"
    if not (planted_folder / "wrong.json").exists():
        (planted_folder / "wrong.json").write_text(json.dumps(plant(planted_folder, seed)))
    wrong = set(json.loads((planted_folder / "wrong.json").read_text()))
    start, table = folder / f"00-{seed}", planted_folder / "table"
    if not (start / "results.json").exists():
        train(start, seed, str(planted_folder / "train-*.tar"))
    if not (table / "manifest.json").exists():
        mmcontrast("embed", start, planted_folder / "train-*.tar", table)
    for arm in ARMS[1:3]:
        share = int(arm.split()[1]) / 100
        if not (out := selection(planted_folder, arm)).exists():
            mmcontrast("data", "score", table, out, "--pair", "image", "text", "--top", share)
        rows = pq.read_table(out, columns=["sample_id", "keep"]).to_pylist()
        dropped = [row["sample_id"] for row in rows if not row["keep"]]
        dropped_wrong = sum(sample in wrong for sample in dropped)
        recall, precision = dropped_wrong / len(wrong), dropped_wrong / len(dropped)
        print(f"seed {seed}, {arm}: drops {recall:.3f} of the wrong, {precision:.3f} of what it drops is wrong")
    if not (out := selection(planted_folder, "perfect filter")).exists():
        scores = pq.read_table(selection(planted_folder, ARMS[1]))
        kept = [sample not in wrong for sample in scores["sample_id"].to_pylist()]
        pq.write_table(scores.select(["sample_id"]).append_column("keep", [kept]), out)
    return planted_folder


def selection(planted_folder: Path, arm: str) -> Path:
    return planted_folder / f"{arm.replace(' ', '-').replace('%', 'percent')}.parquet"


def train(run: Path, seed: int, shards: str, *overrides: str) -> None:
    config = yaml.safe_load(Path(CONFIG).read_text())
    del config["fields"]["audio"], config["towers"]["audio"]
    (file := run.parent / "two_fields.yaml").write_text(yaml.safe_dump(config))
    options = [f"run.dir={run.parent}", f"run.name={run.name}", f"train.seed={seed}", f"data.train={shards}"]
    mmcontrast("train", file, *options, *overrides, "--overwrite")


def run(arm: str, seed: int, folder: Path) -> Recalls:
    planted_folder, run_folder = prepare(seed, folder), folder / f"{ARMS.index(arm):02d}-{seed}"
    if arm == "nothing planted":
        train(run_folder, seed, str(DATA / "train-*.tar"))
    elif arm != "planted":
        train(run_folder, seed, str(planted_folder / "train-*.tar"), f"data.select={selection(planted_folder, arm)}")
    mmcontrast("embed", run_folder, VAL, run_folder / "table")
    table = EmbeddingTable.read(run_folder / "table")
    letters, twins = first_of_each_group(table.group_ids), lookalikes(table.group_ids.tolist())
    pairs = Pairs.of_groups(table.group_ids, table.group_ids[letters])
    (ranking,) = rank(table.fields["image"], table.fields["text"][letters], pairs)
    return {QUERY: [(ranking.ranks[kind] == 1).double().mean().item() for kind in (~twins, twins)]}


def main() -> None:
    options = parser_of(__doc__, ARMS, "runs/wrong_captions").parse_args()
    compare(options, lambda arm, seed: run(arm, seed, options.folder), [QUERY], KINDS)


if __name__ == "__main__":
    main()
