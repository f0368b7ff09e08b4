"""The commands of docs/curation.md, from raw pairs to a search, as they stand there."""

import json
import re
import shlex
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml

from tests.command import ROOT, mmcontrast
from tests.curation.pairs import jpeg, pair, write_pairs

PAGE = (ROOT / "docs" / "curation.md").read_text(encoding="utf-8")
WALK = PAGE.partition("## From raw pairs")[2].partition("\n## ")[0]


def blocks(kind: str) -> list[str]:
    return [text for of, text in re.findall(r"^```(\w*)\n(.*?)^```$", WALK, re.MULTILINE | re.DOTALL) if of == kind]


def write_raw(folder: Path) -> None:
    """60 pairs, of which some have a short caption, a small picture, a low score, or another's picture."""
    samples = [pair(row // 20, row % 20) for row in range(60)]
    samples[3] = pair(0, 3, "fox")
    samples[4] = pair(0, 4, picture=jpeg(1, 40, 16))
    samples[5]["jpg"] = samples[25]["jpg"] = samples[20]["jpg"]
    samples[6]["jpg"] = b"\xff\xd8\xff no picture"
    write_pairs(folder, samples=[samples[:20], samples[20:40], samples[40:]])


@pytest.mark.slow  # each command has tests of its own
def test_from_raw_pairs_to_a_search(config_file, tmp_path):
    write_raw(tmp_path / "pairs")
    (rules,), (commands,) = blocks("yaml"), blocks("")
    (tmp_path / "rules.yaml").write_text(rules)
    tree = yaml.safe_load(config_file.read_text())
    tree["run"] = {"name": "my", "dir": "runs"}
    del tree["fields"]["audio"], tree["towers"]["audio"]
    tree |= {"data": {"train": "", "num_workers": 0, "block": 8, "window": 32}, "evaluation": {}}
    tree["train"] |= {"steps": 2, "batch_size": 8}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    said = {}
    for line in commands.splitlines():
        words = shlex.split(line)
        assert words.pop(0) == "mmcontrast"
        if words[0] == "serve":  # it goes on until it is ended
            continue
        done = mmcontrast(*words, cwd=tmp_path, env={"MMCONTRAST_CACHE": str(tmp_path / "cache")})
        assert done.returncode == 0, f"{line}: {done.stderr[-2000:]}"
        said[" ".join(words[:2])] = done.stdout + done.stderr
    summary = json.loads((tmp_path / "selections" / "rules" / "summary.json").read_text())
    removed = {rule["rule"]: rule["removed"] for rule in summary["rules"]}
    assert removed["words ≥ 3"] == 1 and removed["pixels ≥ 24"] == 2 and summary["reasons"]["picture unreadable"] == 1
    unique = json.loads((tmp_path / "selections" / "unique" / "summary.json").read_text())
    assert unique["reasons"]["duplicate"] >= 1 and unique["given"] == summary["kept"]
    rows = sum(len(pq.read_table(part)) for part in (tmp_path / "table").glob("part-*.parquet"))
    assert rows == unique["kept"]
    assert "fox" in said["search table/index"]


def test_what_the_page_names_is_there():
    from mmcontrast.curation.rules import RULES, presets

    for name in re.findall(r"`([a-z-]+)`", PAGE.partition("each with its source:")[2].partition("\n")[0]):
        assert name in presets()
    table = PAGE.partition("| `type` |")[2].partition("\n\n")[0]
    named = {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(RULES)
    for preset in presets().values():  # each recipe begins with the command that runs it
        assert preset.read_text().startswith("# mmcontrast data filter ")
