"""Mined negatives against float64 by hand with every option, and against sentence-transformers."""

import json
import multiprocessing
import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, current_thread
from unittest import mock

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from data_pipelines.glyphs.glyphs import Glyphs
from mmcontrast.cli import app
from mmcontrast.config import load_config
from mmcontrast.curation.blocks import Blocks
from mmcontrast.curation.mine import MiningOptions, mine
from mmcontrast.curation.outputs import alone
from mmcontrast.data import open_dataset, training_batches
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable, embed
from mmcontrast.runs import make_run_context
from mmcontrast.search import table as stored
from mmcontrast.share import Share
from tests.command import mmcontrast
from tests.curation.pairs import bytes_of
from tests.curation.tables import write_table
from tests.training.teaching import run, write_config, write_vectors

FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def mined(table, out, *fields, **options):
    out.unlink(missing_ok=True)
    summary = mine(table, out, MiningOptions(*fields, **options), progress=False)
    return {row["sample_id"]: row for row in pq.read_table(out).to_pylist()}, summary


def by_hand(table: EmbeddingTable, query: str, candidate: str, window: int, options: MiningOptions):
    """Per sample id (candidates that are left in their order, positive), and what was removed by which rule; float64."""
    left_of, removed = {}, Counter()
    x, y = table.fields[query].double().numpy(), table.fields[candidate].double().numpy()
    ids, groups = table.sample_ids.tolist(), table.group_ids.tolist()
    for i in np.flatnonzero(table.present[query].numpy()):
        scored = [(float(x[i] @ y[j]), j) for j in np.flatnonzero(table.present[candidate].numpy())]
        own = [score for score, j in scored if groups[j] == groups[i] and (query != candidate or i != j)]
        p = min(own, default=None)
        best = sorted((pair for pair in scored if groups[pair[1]] != groups[i]), key=lambda pair: (-pair[0], pair[1]))[:window]
        left = []
        for s, j in best:
            margins = options.absolute_margin is not None or options.relative_margin is not None
            if margins and p is None:
                removed["no_positive"] += 1
            elif options.absolute_margin is not None and s + options.absolute_margin > p:
                removed["absolute_margin"] += 1
            elif options.relative_margin is not None and s > p - abs(p) * options.relative_margin:
                removed["relative_margin"] += 1
            elif options.max_score is not None and s > options.max_score:
                removed["max_score"] += 1
            elif options.min_score is not None and s < options.min_score:
                removed["min_score"] += 1
            else:
                left.append((ids[j], s))
        removed["range_min"] += len(left[: options.range_min])
        left_of[ids[i]] = left[options.range_min :], p
    return left_of, removed


scores = st.sampled_from([-3.0, -1.5, -0.5, 0.0, 0.5, 2.0, 4.0])


@st.composite
def problems(draw):
    """A table of small whole numbers, whose products are exact and often equal, and options."""
    n, dim = draw(st.integers(2, 40)), draw(st.integers(1, 4))
    random = np.random.default_rng(draw(st.integers(0, 2**31)))
    rows = [torch.from_numpy(random.integers(-2, 3, (n, dim))).float() for _ in range(2)]
    groups = torch.from_numpy(random.integers(0, draw(st.integers(1, n)), n)) if draw(st.booleans()) else None
    count, low = draw(st.integers(1, 6)), draw(st.integers(0, 3))
    options = {"count": count, "range_min": low, "range_max": draw(st.none() | st.integers(low + count, low + count + 30))}
    for name in ("max_score", "min_score", "absolute_margin"):
        options[name] = draw(st.none() | scores)
    if None not in (options["max_score"], options["min_score"]):
        options["max_score"], options["min_score"] = sorted((options["max_score"], options["min_score"]), reverse=True)
    options["relative_margin"] = draw(st.sampled_from([None, 0.0, 0.25, 0.5]))
    options |= {"sampling": draw(st.sampled_from(["top", "random"])), "seed": draw(st.integers(0, 5))}
    return rows, groups, options, draw(st.sampled_from(["ab", "aa"]))


@FAST
@given(problem=problems())
def test_it_is_what_is_found_by_hand(problem, tmp_path_factory):
    with mock.patch("mmcontrast.evaluation.finite.LENGTH", float("inf")):  # whole numbers, whose products are exact
        compare_by_hand(problem, tmp_path_factory)


def compare_by_hand(problem, tmp_path_factory):
    (a, b), groups, options, (query, candidate) = problem
    folder = tmp_path_factory.mktemp("mine")
    table = write_table(folder / "table", {"a": a, "b": b}, groups)
    asked = MiningOptions(query, candidate, **options)
    possible = table.present[query].any() and table.present[candidate].any()
    apart = possible and any(
        table.group_ids[i] != table.group_ids[j]
        for i in table.present[query].nonzero()
        for j in table.present[candidate].nonzero()
    )
    if not apart:
        with pytest.raises(UserError, match="no row of|own group: there are no negatives"):
            mine(folder / "table", folder / "m.parquet", asked, progress=False)
        assert not (folder / "m.parquet").exists() and not list(folder.glob(".*.partial"))
        return
    found, summary = mined(folder / "table", folder / "m.parquet", query, candidate, **options)
    want, removed = by_hand(table, query, candidate, asked.window, asked)
    assert found.keys() == want.keys()
    for sample_id, (left, positive) in want.items():
        row = found[sample_id]
        got = list(zip(row["candidate_ids"], row["scores"], strict=True))
        assert row["positive_score"] == positive
        assert len(got) == min(asked.count, len(left)) and got == [pair for pair in left if pair in got]
        assert asked.sampling == "random" or got == left[: asked.count]
    assert {rule: n for rule, n in summary["removed"].items() if n} == {rule: n for rule, n in removed.items() if n}
    sizes = [len(row["candidate_ids"]) for row in found.values()]
    assert summary["negatives"] == sum(sizes) and summary["empty_queries"] == sizes.count(0)
    assert summary["short_queries"] == sum(size < asked.count for size in sizes)


@pytest.fixture
def random_table(tmp_path, monkeypatch):
    """700 samples in groups of one to three, some of which lack a field, in several parts and blocks."""
    monkeypatch.setattr(embed, "PART_ROWS", 300)
    monkeypatch.setattr(stored, "BLOCK_ROWS", 128)
    torch.manual_seed(0)
    a = F.normalize(torch.randn(700, 16))
    b = F.normalize(a + 0.6 * torch.randn(700, 16))
    a[torch.rand(700) < 0.1], b[torch.rand(700) < 0.1] = 0, 0
    return write_table(tmp_path / "table", {"a": a, "b": b}, torch.arange(700) // torch.randint(1, 4, (700,)))


def test_blocks_random_draws_and_ivf(random_table, tmp_path):
    """Several blocks give what one gives; draws depend on ids alone; of the approximate search the recall is measured."""
    options = {"count": 4, "range_max": 24, "relative_margin": 0.05, "sampling": "random"}
    found, _ = mined(tmp_path / "table", tmp_path / "m.parquet", "a", "b", **options)
    first = (tmp_path / "m.parquet").read_bytes()
    want, _ = by_hand(random_table, "a", "b", 24, MiningOptions("a", "b", **options))
    drawn = []
    for sample_id, (left, positive) in want.items():
        scores = dict(left)
        assert set(found[sample_id]["candidate_ids"]) <= scores.keys()
        assert found[sample_id]["scores"] == pytest.approx([scores[c] for c in found[sample_id]["candidate_ids"]], abs=1e-6)
        assert found[sample_id]["positive_score"] == (positive if positive is None else pytest.approx(positive, abs=1e-6))
        ranks = [c for c, _ in left]
        drawn += [ranks.index(c) / (len(ranks) - 1) for c in found[sample_id]["candidate_ids"] if len(ranks) >= 8]
    shares = np.histogram(drawn, 3, (0, 1))[0] / len(drawn)
    assert len(drawn) > 200 and (abs(shares - 1 / 3) < 0.08).all(), "every rank is drawn about as often"
    again, _ = mined(tmp_path / "table", tmp_path / "m.parquet", "a", "b", **options)
    assert (tmp_path / "m.parquet").read_bytes() == first
    other, _ = mined(tmp_path / "table", tmp_path / "m.parquet", "a", "b", **options, seed=1)
    assert other != again == found
    ivf, summary = mined(tmp_path / "table", tmp_path / "i.parquet", "a", "b", **options, search="ivf", recall=0.8)
    about = summary["search"]
    assert 0.8 <= about["recall"] < 1 and 1 <= about["nprobe"] < about["lists"] and about["at"] == 24
    assert all(set(row["candidate_ids"]).isdisjoint(_group(random_table, sample_id)) for sample_id, row in ivf.items())
    whole, summary = mined(tmp_path / "table", tmp_path / "i.parquet", "a", "b", **options, search="ivf", recall=1.0)
    assert summary["search"]["recall"] == 1.0 and (whole == found or summary["search"]["nprobe"] < about["lists"])


@pytest.mark.parametrize("search", ["exact", "ivf"])
def test_a_run_that_was_killed_goes_on(random_table, tmp_path, monkeypatch, search):
    """Ended at each block in turn and begun again: no block is mined twice, and the files are those of a run that was not."""
    asked = MiningOptions("a", "b", count=4, range_max=24, relative_margin=0.05, sampling="random", search=search)
    mine(tmp_path / "table", tmp_path / "whole" / "m.parquet", asked, progress=False)
    out, left, kept = tmp_path / "killed" / "m.parquet", tmp_path / "killed" / ".m.parquet.blocks", {}

    class Killed(BaseException):
        pass

    def killed(blocks, kind, number, *made):
        write(blocks, kind, number, *made)
        kept[number] = (left / f"mined-{number:06d}.parquet").stat().st_mtime_ns
        (left / ".000009.parquet.partial").write_bytes(b"torn")
        raise Killed

    write = Blocks.write
    monkeypatch.setattr(Blocks, "write", killed)
    for _ in range(3):
        with pytest.raises(Killed):
            mine(tmp_path / "table", out, asked, progress=False)
    monkeypatch.setattr(Blocks, "write", write)
    times = {int(path.stem[-6:]): path.stat().st_mtime_ns for path in left.glob("mined-*.parquet")}
    assert times == kept and len(times) == 3 and not out.exists()
    with pytest.raises(UserError, match="unfinished run wrote, of another options: give the same as then"):
        mine(tmp_path / "table", out, MiningOptions("a", "b", count=3), progress=False)
    part = next((tmp_path / "table").glob("*.safetensors"))
    when = part.stat().st_mtime_ns
    os.utime(part, ns=(when, when + 1))
    with pytest.raises(UserError, match="of another state of the table"):
        mine(tmp_path / "table", out, asked, progress=False)
    os.utime(part, ns=(when, when))
    mine(tmp_path / "table", out, asked, progress=False)
    assert bytes_of(tmp_path / "killed") == bytes_of(tmp_path / "whole") and len(bytes_of(tmp_path / "whole")) == 3


@pytest.mark.parametrize("search", ["exact", "ivf"])
def test_several_processes_mine_one_table_together(random_table, tmp_path, monkeypatch, search):
    """Each mines a third of the blocks, none twice; the first writes the files of a run alone."""
    asked = MiningOptions("a", "b", count=4, range_max=24, relative_margin=0.05, sampling="random", search=search)
    summary = mine(tmp_path / "table", tmp_path / "alone" / "m.parquet", asked, progress=False)
    out, barrier, mined_by = tmp_path / "together" / "m.parquet", Barrier(3), {}

    def write_as(blocks, kind, number, *made):
        assert number not in mined_by
        mined_by[number] = current_thread().name.partition("_")[2]
        write(blocks, kind, number, *made)

    write = Blocks.write
    monkeypatch.setattr(Blocks, "write", write_as)
    with ThreadPoolExecutor(3) as pool:
        shares = [Share(rank, 3, lambda: barrier.wait(60)) for rank in range(3)]
        answers = [pool.submit(mine, tmp_path / "table", out, asked, progress=False, share=share) for share in shares]
        counts = [answer.result(120) for answer in answers]
    assert counts == [summary, {}, {}]
    assert len(mined_by) == 7 and Counter(mined_by.values()) == {"0": 3, "1": 2, "2": 2}
    assert bytes_of(tmp_path / "together") == bytes_of(tmp_path / "alone")


def _group(table, sample_id):
    row = table.sample_ids.tolist().index(sample_id)
    return {int(i) for i in table.sample_ids[table.group_ids == table.group_ids[row]]}


def test_a_large_group_does_not_starve_the_approximate_search(tmp_path):
    """The nearest 200 are of the query's own group: the window is still full of others."""
    torch.manual_seed(1)
    rows = F.normalize(torch.cat([torch.tensor([[1.0, 0, 0, 0]]) + 0.01 * torch.randn(200, 4), torch.randn(300, 4)]))
    write_table(tmp_path / "table", {"a": rows}, torch.cat([torch.zeros(200, dtype=torch.int64), torch.arange(1, 301)]))
    exact, _ = mined(tmp_path / "table", tmp_path / "e.parquet", "a", "a", count=5)
    found, summary = mined(tmp_path / "table", tmp_path / "m.parquet", "a", "a", count=5, search="ivf", recall=1.0)
    assert summary["short_queries"] == 0
    same = [set(found[key]["candidate_ids"]) == set(row["candidate_ids"]) for key, row in exact.items()]
    assert sum(same) >= 0.98 * len(same)


def sentence_transformer(words):
    """Real modules of theirs: every word has a vector, a text is their mean."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, WordEmbeddings
    from sentence_transformers.sentence_transformer.modules.tokenizer import WhitespaceTokenizer

    vocabulary = sorted(words)
    vectors = torch.randn(len(vocabulary), 24, generator=torch.Generator().manual_seed(2)).numpy()
    embedding = WordEmbeddings(WhitespaceTokenizer(vocabulary, stop_words=(), do_lower_case=True), vectors)
    return SentenceTransformer(modules=[embedding, Pooling(24), Normalize()], device="cpu")


@pytest.mark.parametrize("texts", ["random", "captions"])
def test_it_is_what_sentence_transformers_finds(texts, tmp_path):
    """Mining equals theirs where both are defined: a query with one positive, and a window that no rule leaves short. Theirs
    looks at one candidate more where the positive is beyond the window, so a query with fewer negatives may have one more."""
    from datasets import Dataset
    from sentence_transformers.util import mine_hard_negatives

    if texts == "random":
        random = np.random.default_rng(0)
        draws = [[f"w{k}" for k in random.integers(0, 400, 6)] for _ in range(150)]
        pairs = [(" ".join([*draw, "x"]), " ".join(draw[:4])) for draw in draws]
    else:
        items = Glyphs().splits()["train"]
        made = [Glyphs(side=24).make_sample("train", item) for item in items[:400:3]]
        pairs = [(s["txt"], f"{s['json']['name']} {s['json']['category']}") for s in made]
    pairs = list({b: (a, b) for a, b in {a: (a, b) for a, b in pairs}.values() if a != b}.values())
    assert len(pairs) > 40
    model = sentence_transformer({word.lower() for pair in pairs for text in pair for word in text.split()})
    anchors, positives = (model.encode([pair[k] for pair in pairs], convert_to_tensor=True) for k in (0, 1))
    write_table(tmp_path / "table", {"a": anchors.cpu(), "b": positives.cpu()})
    dataset = Dataset.from_dict({"anchor": [a for a, _ in pairs], "positive": [b for _, b in pairs]})
    row_of = {b: row for row, (_, b) in enumerate(pairs)}
    cases = [{}, {"range_min": 3}, {"relative_margin": 0.05, "range_max": 20}, {"absolute_margin": 0.1, "range_max": 30}]
    cases += [{"max_score": 0.6, "min_score": 0.2, "range_min": 1, "range_max": 25}]
    compared = differing = 0
    for case in cases:
        theirs = mine_hard_negatives(
            dataset, model, num_negatives=4, **{"range_max": 4 + case.get("range_min", 0), **case}, verbose=False,
            output_format="triplet", output_scores=True,
        )  # fmt: skip
        want = {}
        for entry in theirs.to_list():
            want.setdefault(entry["anchor"], []).append((row_of[entry["negative"]] + 1000, entry["scores"][1]))
        found, _ = mined(tmp_path / "table", tmp_path / "m.parquet", "a", "b", count=4, **case)
        for row, (anchor, _) in enumerate(pairs):
            ours, other = found[1000 + row], sorted(want.get(anchor, []), key=lambda pair: -pair[1])
            compared += 1
            assert ours["scores"] == pytest.approx([s for _, s in other][: len(ours["scores"])], abs=1e-5), (case, anchor)
            if len(other) != len(ours["scores"]):
                assert len(ours["scores"]) < len(other) <= 4 and case.get("range_max")
                differing += 1
    assert compared == len(pairs) * len(cases) and differing < 0.05 * compared


def test_the_command_reports_what_was_left_out(random_table, tmp_path):
    out = tmp_path / "m.parquet"
    command = ("data", "mine", tmp_path / "table", out, "--query", "a", "--candidate", "b", "--relative-margin", 0.3)
    done = mmcontrast(*command, "--range-max", 6)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stderr.split())
    summary = json.loads((tmp_path / "m.summary.json").read_text())
    assert summary["short_queries"] and summary["removed"]["relative_margin"] and summary["without_positive"]
    assert f"{summary['removed']['relative_margin']:,} by relative_margin" in said
    assert f"{summary['short_queries']:,} queries have fewer than 5 negatives" in said
    assert json.loads(pq.read_metadata(out).metadata[b"mmcontrast"]) == summary
    assert "caption 0" in (tmp_path / "m.report.html").read_text()
    assert mmcontrast(*command).returncode == 2, "the file is there"


def test_from_shards_to_a_training_with_what_was_mined(tmp_path):
    """Embedded, mined and trained on, with ids of one's own and without; the negatives are those that the table names."""
    shards = [write_vectors(tmp_path / "a.tar"), write_vectors(tmp_path / "b.tar", about=lambda k: {"sample_id": None})]
    path = write_config(tmp_path, shards[0], data={"train": [str(shard) for shard in shards]})
    job = make_run_context(load_config(path))
    embed.embed_dataset(job.model, open_dataset([str(s) for s in shards], job.dataset.modalities, job.dataset.keys),
                        batch_size=16).write(tmp_path / "table")  # fmt: skip
    found, _ = mined(tmp_path / "table", tmp_path / "m.parquet", "a", "b", count=2, relative_margin=0.05)
    job = run(path, f"data.negatives={{table: {tmp_path / 'm.parquet'}, field: b, count: 2}}")
    positions = {job.dataset.sample_id(position): position for position in range(len(job.dataset))}
    assert found.keys() == positions.keys() and len(positions) == 48
    (batch,) = training_batches(job.dataset, job.order, range(1), rank=0, world_size=1, num_workers=0, pin_memory=False)
    for k, name in enumerate(("b.negative.0", "b.negative.1")):
        rows = iter(batch.values[name])
        for sample_id, here in zip(batch.sample_ids.tolist(), batch.present[name].tolist(), strict=True):
            candidates = found[sample_id]["candidate_ids"]
            assert here == (len(candidates) > k)
            assert not here or torch.equal(next(rows), job.dataset[positions[candidates[k]]].values["b"])


def test_mistakes_are_named(tmp_path):
    table = write_table(tmp_path / "table", {"a": torch.eye(3), "b": torch.zeros(3, 3)})
    (tmp_path / "t.parquet").touch()
    for options, message in (
        (MiningOptions("c", "a"), "--query c: .* has none of this name"),
        (MiningOptions("a", "b"), "--candidate b: no row of"),
        (MiningOptions("a", "a", count=5, range_min=2, range_max=6), "4 candidates are left for --count 5"),
        (MiningOptions("a", "a", sampling="best"), "--sampling 'best'"),
        (MiningOptions("a", "a", max_score=0.1, min_score=0.2), "no candidate is left"),
        (MiningOptions("a", "a", relative_margin=float("nan")), "--relative-margin nan"),
    ):
        with pytest.raises(UserError, match=message):
            mine(tmp_path / "table", tmp_path / "m.parquet", options, progress=False)
    with pytest.raises(UserError, match="--device nowhere: "):
        mine(tmp_path / "table", tmp_path / "m.parquet", MiningOptions("a", "a"), "nowhere", progress=False)
    for name, message in (("t.parquet", "exists"), ("m.csv", "name it m.parquet")):
        with pytest.raises(UserError, match=message):
            mine(tmp_path / "table", tmp_path / name, MiningOptions("a", "a"), progress=False)
    table.sample_ids[2] = table.sample_ids[0]
    table.write(tmp_path / "twice")
    with pytest.raises(UserError, match=r"rows 0 \('k0'\) and 2 \('k2'\) have one sample_id, 1000"):
        mine(tmp_path / "twice", tmp_path / "m.parquet", MiningOptions("a", "a"), progress=False)


def hold(out, held, done):
    with alone(out):
        held.set()
        done.wait(120)


def test_two_commands_do_not_make_one_output(tmp_path):
    """Started twice, or by every rank of torchrun: the second says so at once, and leaves the first's blocks alone."""
    rows = F.normalize(torch.randn(20, 4), dim=1)
    write_table(tmp_path / "table", {"a": rows, "b": rows.flip(0)})
    fork = multiprocessing.get_context("fork")
    held, done = fork.Event(), fork.Event()
    other = fork.Process(target=hold, args=(tmp_path / "out.parquet", held, done))
    other.start()
    try:
        assert held.wait(120)
        for command in (
            ["mine", "--query", "a", "--candidate", "b"],
            ["dedup-near", "--field", "a"],
            ["cluster", "--field", "a", "--clusters", "2"],
        ):
            arguments = [str(tmp_path / "table"), str(tmp_path / "out.parquet"), *command[1:]]
            refused = CliRunner().invoke(app, ["data", command[0], *arguments])
            assert refused.exit_code == 2 and "another process makes" in refused.output, refused.output
    finally:
        done.set()
        other.join()
    assert CliRunner().invoke(app, ["data", "mine", *arguments[:2], "--query", "a", "--candidate", "b"]).exit_code == 0
    assert not list(tmp_path.glob(".*"))
