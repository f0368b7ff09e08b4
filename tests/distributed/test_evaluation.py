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
    """Return tasks whose relevance is by a label and by keys, and captions on every line of a text."""
    retrieval = {
        "kinds": {"query": "vector", "candidate": "text", "by": "kind"},
        "judged": {"query": "vector", "candidate": "vector", "relevance": str(shard.with_suffix(".qrels"))},
    }
    tasks = {"zero_shot": {"kind": TASK}, "retrieval": retrieval, "captions": ["text"]}
    return EvaluationOptions(batch_size=2, splits={"val": str(shard)}, **tasks)


def check_broadcast(table, rank):
    """Check that all ranks have the first rank's tensors, and the requested entries of its metadata."""
    first_table = gather_first([None] * RANKS, table)
    for entries in ((), ("kind", "nothing")):
        received = broadcast_table(first_table if rank == 0 else table, dist.group.WORLD, entries)
        expected = [{name: entry[name] for name in entries if name in entry} for entry in first_table.metadata]
        assert received.metadata == (first_table.metadata if rank == 0 else expected)
        assert received.sample_ids.equal(first_table.sample_ids) and received.group_ids.equal(first_table.group_ids)
        for field, rows in first_table.fields.items():
            assert received.fields[field].equal(rows) and received.present[field].equal(first_table.present[field])


def gather_first(tables, own_table):
    """Return the first rank's table, which is complete, on every rank."""
    dist.all_gather_object(tables, own_table)
    return tables[0]


def work(rank, folder):
    """Embed and evaluate every shard of a folder, and write this rank's results there."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    folder, answers, read_positions = Path(folder), [], []
    members = ShardDataset.members

    def counting_members(dataset, position, extensions):
        read_positions.append(position)
        return members(dataset, position, extensions)

    ShardDataset.members = counting_members
    try:
        for shard in sorted(folder.glob("*.tar")):
            model, dataset = make_parts(shard)
            options = options_of(shard)
            table = embed_together(model, dataset, dist.group.WORLD, batch_size=2)
            check_broadcast(table, rank)
            read_positions.clear()
            full_options, datasets = open_splits(options, model, lambda _, dataset=dataset: dataset)
            results = evaluate(model, datasets, full_options, group=dist.group.WORLD).values
            own_positions = [position for position in read_positions if position < len(dataset)]
            assert own_positions == [*_rank_share(len(dataset), rank, RANKS)]
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
        expected_table = embed_dataset(model, dataset, batch_size=2)
        if rank:
            assert not results and len(table) in (len(expected_table) // RANKS, len(expected_table) // RANKS + 1)
            continue
        assert [entry["key"] for entry in table.metadata] == [entry["key"] for entry in expected_table.metadata]
        assert table.sample_ids.equal(expected_table.sample_ids) and table.group_ids.equal(expected_table.group_ids)
        for field, rows in expected_table.fields.items():
            torch.testing.assert_close(table.fields[field], rows)
            assert table.present[field].equal(expected_table.present[field])
        full_options, datasets = open_splits(options, model, lambda _, dataset=dataset: dataset)
        expected = evaluate(model, datasets, full_options).values
        assert results.keys() == expected.keys() and any("zero_shot/kind" in name for name in results)
        assert results == pytest.approx(expected, nan_ok=True, rel=1e-5)
