"""Three ranks embed a split together: the table and the results of one process, whatever the sizes."""

import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from mmcontrast.data import ShardDataset, write_shard
from mmcontrast.evaluation import EvaluationOptions, embed_dataset, evaluate, open_splits
from mmcontrast.evaluation.embed import embed_together
from mmcontrast.evaluation.evaluate import broadcast_table
from mmcontrast.evaluation.retrieval_inputs import _rank_share
from mmcontrast.modalities import TextModality, VectorModality
from mmcontrast.models import ContrastiveModel, LinearTower, OpenClipTextTower
from tests.command import call_on_ranks

RANKS = 3
TASK = {"label": "kind", "field": "vector", "classes": {"odd": ["an odd number"], "even": ["an even number", "half of it"]}}


def make_parts(shard):
    torch.manual_seed(0)
    modalities = {"vector": VectorModality(4), "text": TextModality(context_length=8)}
    towers = {"v": LinearTower(4, 8), "t": OpenClipTextTower(16, 1, 2, 8, vocab_size=49408)}
    model = ContrastiveModel(modalities, towers, {"vector": "v", "text": "t"}, 6)
    return model, ShardDataset(str(shard), modalities, {})


def options_of(shard):
    """Labels and keys that say what is relevant, and every line of a text a caption."""
    retrieval = {
        "kinds": {"query": "vector", "candidate": "text", "by": "kind"},
        "judged": {"query": "vector", "candidate": "vector", "relevance": str(shard.with_suffix(".qrels"))},
    }
    tasks = {"zero_shot": {"kind": TASK}, "retrieval": retrieval, "captions": ["text"]}
    return EvaluationOptions(batch_size=2, splits={"val": str(shard)}, **tasks)


def check_shared(table, rank):
    """All have the first rank's tensors, and of the metadata what is asked for."""
    whole = joined([None] * RANKS, table)
    for entries in ((), ("kind", "nothing")):
        found = broadcast_table(whole if rank == 0 else table, dist.group.WORLD, entries)
        expected = [{name: entry[name] for name in entries if name in entry} for entry in whole.metadata]
        assert found.metadata == (whole.metadata if rank == 0 else expected)
        assert found.sample_ids.equal(whole.sample_ids) and found.group_ids.equal(whole.group_ids)
        for field, rows in whole.fields.items():
            assert found.fields[field].equal(rows) and found.present[field].equal(whole.present[field])


def joined(tables, own):
    """The whole table, on every rank, from what each has made or, on the first, from it."""
    dist.all_gather_object(tables, own)
    return tables[0]


def work(rank, folder):
    """Embed and evaluate every shard of a folder, and leave there what this rank got."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    folder, answers, read = Path(folder), [], []
    members = ShardDataset.members

    def counted(dataset, position, extensions):
        read.append(position)
        return members(dataset, position, extensions)

    ShardDataset.members = counted
    try:
        for shard in sorted(folder.glob("*.tar")):
            model, dataset = make_parts(shard)
            options = options_of(shard)
            table = embed_together(model, dataset, dist.group.WORLD, batch_size=2)
            check_shared(table, rank)
            read.clear()
            opened, datasets = open_splits(options, model, lambda _, whole=dataset: whole)
            results = evaluate(model, datasets, opened, group=dist.group.WORLD).values
            assert [sample for sample in read if sample < len(dataset)] == [*_rank_share(len(dataset), rank, RANKS)], "its own"
            answers.append((rank, shard.name, table, results))
        (folder / f"rank-{rank}.pickle").write_bytes(pickle.dumps(answers))
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    for n in (2, 7, 8, 9, 13):
        generator = torch.Generator().manual_seed(n)
        rows = torch.randn(n, 4, generator=generator).numpy()
        samples = []
        for k in range(n):
            text = f"number {k}" + f"\nline {k}" * (k % 3)
            samples.append({"__key__": f"{k:03d}", "npy": rows[k], "txt": text, "json": {"kind": ["even", "odd"][k % 2]}})
        write_shard(folder / f"{n:02d}.tar", samples)
        (folder / f"{n:02d}.qrels").write_text("".join(f"{k:03d} 0 {(k + 1) % n:03d} 1\n" for k in range(n)))
    return folder


def test_the_table_and_the_results_are_those_of_one_process(folder):
    torch.set_num_threads(1)
    call_on_ranks(f"{__name__}:work", RANKS, str(folder))
    answers = [answer for rank in range(RANKS) for answer in pickle.loads((folder / f"rank-{rank}.pickle").read_bytes())]
    assert len(answers) == 5 * RANKS
    for rank, name, table, results in answers:
        model, dataset = make_parts(folder / name)
        options = options_of(folder / name)
        whole = embed_dataset(model, dataset, batch_size=2)
        if rank:
            assert not results and len(table) in (len(whole) // RANKS, len(whole) // RANKS + 1)
            continue
        assert [entry["key"] for entry in table.metadata] == [entry["key"] for entry in whole.metadata]
        assert table.sample_ids.equal(whole.sample_ids) and table.group_ids.equal(whole.group_ids)
        for field, rows in whole.fields.items():
            torch.testing.assert_close(table.fields[field], rows)
            assert table.present[field].equal(whole.present[field])
        opened, datasets = open_splits(options, model, lambda _, whole=dataset: whole)
        expected = evaluate(model, datasets, opened).values
        assert results.keys() == expected.keys() and any("zero_shot/kind" in name for name in results)
        assert results == pytest.approx(expected, nan_ok=True, rel=1e-5)
