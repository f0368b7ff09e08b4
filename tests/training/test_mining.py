"""Mined anew during a run, and batches of neighbours in one: what is mined, who sees it, killed and resumed."""

import json
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from mmcontrast.config import load_config
from mmcontrast.curation.mine import MiningOptions, mine, training_miner
from mmcontrast.data import training_batches
from mmcontrast.embedding_job import embed_shards
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.run_folder import prepare_folder
from mmcontrast.runs import make_run_context, open_run
from mmcontrast.training.loop import train
from mmcontrast.training.mining import Mining, mining_options
from tests.command import mmcontrast, start
from tests.training.teaching import N, npy, run, write_config, write_vectors

MINE = {"query": "a", "candidate": "b", "count": 4}
NEGATIVES = {"field": "b", "count": 2}


def write(tmp_path, data=None, mine=None, **changes):
    """A run of 12 steps, three an epoch, that mines every four, and its shards."""
    shards = write_vectors(tmp_path / "t.tar", about=lambda k: {"group_id": k // 2})
    data = {"record_samples": True} | ({"negatives": NEGATIVES} if data is None else data)
    options = {"steps": 12, "mine_every": 4, "mine": MINE | (mine or {}), "schedule": "constant", "lr": 0.05}
    return write_config(tmp_path, shards, data=data, train=options | changes)


def run_with_miner(path, *overrides, resume=False, broken=lambda done: None):
    """Train in this process. `broken(step)` may raise before a round is mined."""
    config = load_config(path, overrides)
    miner, job = training_miner(mining_options(config.train.mine, config.data)), make_run_context(config, resume)
    if not resume:
        prepare_folder(config, overwrite=False, text=job.config)

    def mined(table, out, seed, device, share):
        broken(seed)
        return miner(table, out, seed, device, share)

    train(job, resume, miner=mined)
    return job


def losses_of(tmp_path, name):
    lines = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def end_of(tmp_path, name):
    """(final weights, losses, what was seen at each step) of a run."""
    folder = tmp_path / "runs" / name
    weights = load_file(folder / "checkpoints" / "step-00000012" / "ema.safetensors")
    return weights, losses_of(tmp_path, name), (folder / "samples.jsonl").read_text()


def assert_same_end(tmp_path, name, other="whole"):
    (weights, losses, seen), (want, losses_of_other, seen_by_other) = end_of(tmp_path, name), end_of(tmp_path, other)
    assert losses == losses_of_other and seen == seen_by_other
    assert all(torch.equal(tensor, want[key]) for key, tensor in weights.items())


def rows_of(path):
    return {row["sample_id"]: row["candidate_ids"] for row in pq.read_table(path).to_pylist()}


def test_mined_with_the_averaged_weights_of_the_step(tmp_path):
    """Each round is what `mmcontrast embed` and `data mine` make of that step's checkpoint; the steps after it show it, and
    those before the first none; interrupted before, at and after a round, and killed in
    one, the end is the same to the bit."""
    path = write(tmp_path, ema_decay=0.5, keep_checkpoints=9)
    job = run_with_miner(path, "run.name=whole")
    folder = tmp_path / "runs" / "whole"
    assert job.mined == 8 and sorted(p.name for p in (folder / "mined").iterdir()) == [
        f"step-{step:06d}.{kind}" for step in (4, 8) for kind in ("parquet", "report.html", "summary.json")
    ]
    for step in (4, 8):
        assert embed_shards(folder, str(tmp_path / "t.tar"), tmp_path / f"table{step}", checkpoint=str(step), device="cpu")
        mine(tmp_path / f"table{step}", tmp_path / f"{step}.parquet", MiningOptions("a", "b", 4), progress=False)
        assert rows_of(folder / "mined" / f"step-{step:06d}.parquet") == rows_of(tmp_path / f"{step}.parquet")
    assert rows_of(tmp_path / "4.parquet") != rows_of(tmp_path / "8.parquet")
    shown = rows_of(tmp_path / "8.parquet")
    options = {"rank": 0, "world_size": 1, "num_workers": 0, "pin_memory": False}
    names = ("b.negative.0", "b.negative.1")
    for batch in training_batches(job.dataset, job.order, range(8, 12), **options):
        vectors = {int(k): v for k, v in zip(range(N), _values(job), strict=True)}
        rows = [iter(batch.values[name]) for name in names]
        for number, sample_id in enumerate(batch.sample_ids.tolist()):
            assert all(bool(batch.present[name][number]) for name in names)
            for own in rows:
                value = next(own)
                (of,) = [k for k, vector in vectors.items() if torch.equal(vector, value)]
                assert of in shown[sample_id] and of // 2 != sample_id // 2
    (before,) = training_batches(*_anew(path), range(1), **options)
    assert not any(before.present[name].any() for name in names)
    run_with_miner(path, "run.name=none", "train.mine_every=100", "train.steps=5")
    without, losses = losses_of(tmp_path, "none"), losses_of(tmp_path, "whole")
    assert without[:4] == losses[:4] and without[4] < losses[4]

    for number, stop in enumerate((3, 4, 6, 8, 12)):
        run_with_miner(path, "run.name=resumed", f"train.steps={stop}", resume=number > 0)
    assert_same_end(tmp_path, "resumed")

    class KilledError(Exception):
        pass

    def killed(seed):
        if seed == 8:
            raise KilledError

    with pytest.raises(KilledError):
        run_with_miner(path, "run.name=killed", broken=killed)
    folder = tmp_path / "runs" / "killed"
    assert (folder / "mined" / "embeddings").is_dir(), "left by the killed round"
    (folder / "mined" / ".step-000008.parquet.1.partial").write_text("half")
    (folder / "mined" / "step-000008.parquet").write_text("of weights that are lost")
    (folder / "mined" / ".step-000008.parquet.blocks").mkdir()
    (folder / "mined" / ".step-000008.parquet.blocks" / "begun.json").write_text('{"table": "of those embeddings"}')
    run_with_miner(path, "run.name=killed", resume=True)
    assert_same_end(tmp_path, "killed")
    assert not [p for p in (folder / "mined").iterdir() if not p.name.startswith("step-")]

    shown[0] = shown[0][::-1]
    changed = pa.table({"sample_id": list(shown), "candidate_ids": list(shown.values())})
    pq.write_table(changed, folder / "mined" / "step-000008.parquet")
    with pytest.raises(UserError, match="cannot resume .*its data order had data="):
        run_with_miner(path, "run.name=killed", "train.steps=14", resume=True)
    (folder / "mined" / "step-000008.parquet").unlink()
    with pytest.raises(UserError, match=r"mined/step-000008.parquet is gone, with which its last checkpoint was trained"):
        run_with_miner(path, "run.name=killed", "train.steps=14", resume=True)
    off = ("train.mine_every=null", "train.mine=null", "data.negatives=[]")
    with pytest.raises(UserError, match="cannot resume .*its data order had data="):
        run(path, "run.name=whole", "train.steps=14", *off, resume=True)
    assert set(open_run(tmp_path / "runs" / "whole", device="cpu").model.modalities) == {"a", "b"}


def _anew(path):
    job = make_run_context(load_config(path))
    return job.dataset, job.order


def _values(job):
    return [job.dataset[position].values["b"] for position in np.argsort(job.dataset.sample_ids())]


def test_neighbours_are_mined_between_epochs(tmp_path):
    """Whole epochs of each table, every sample once; from the first step on; resumed across rounds and inside of one."""
    neighbours = {"batches": {"type": "neighbours", "nearest": 6, "count": 3}}
    options = {"mine_every": 3, "ema_decay": 0.5, "keep_checkpoints": 1, "async_checkpoints": False}
    path = write(tmp_path, neighbours, {"count": None, "first": True}, **options)
    job = run_with_miner(path, "run.name=whole")
    assert mining_options(job.options.mine, job.data)["count"] == 6
    tables = sorted((tmp_path / "runs" / "whole" / "mined").glob("*.parquet"))
    assert [table.name for table in tables] == [f"step-00000{step}.parquet" for step in (3, 6, 9)], "0 is needed no more"
    steps = [json.loads(line)["ids"] for line in end_of(tmp_path, "whole")[2].splitlines()]
    for epoch in range(4):
        assert sorted(i for ids in steps[3 * epoch : 3 * epoch + 3] for i in ids) == list(range(N))
    near = rows_of(tables[2])
    for ids in steps[9:]:
        assert sum(any(b in near[a] for a in ids[:k]) for k, b in enumerate(ids)) >= 3
    for name, stops in (("inside", (4,)), ("across", (3, 8))):
        for number, stop in enumerate(stops):
            run_with_miner(path, f"run.name={name}", f"train.steps={stop}", resume=number > 0)
        run_with_miner(path, f"run.name={name}", "data.num_workers=1", resume=True)
        assert_same_end(tmp_path, name)
    with pytest.raises(UserError, match="train.mine_every=4: .*between epochs alone, each of 3 steps: set it to a"):
        make_run_context(load_config(path, ["train.mine_every=4"]))


def test_a_table_of_neighbours(tmp_path):
    """Read from the config: its look-alikes share batches; another table, or other options, cannot be resumed with."""
    rows = [[4 * (k // 4) + j for j in range(4) if j != k % 4] for k in range(N)]
    pq.write_table(pa.table({"sample_id": range(N), "candidate_ids": rows}), tmp_path / "near.parquet")
    shards = write_vectors(tmp_path / "t.tar")
    near = {"type": "neighbours", "table": str(tmp_path / "near.parquet"), "nearest": 3, "count": 3}
    path = write_config(tmp_path, shards, data={"batches": near, "record_samples": True}, train={"steps": 2})
    run(path)
    seen = [json.loads(line)["ids"] for line in (tmp_path / "runs" / "run" / "samples.jsonl").read_text().splitlines()]
    assert all(len({k // 4 for k in ids}) == 2 for ids in seen)
    for changed in ("data.batches.share=1.0", "data.batches.count=2", "data.batches=mixed"):
        with pytest.raises(UserError, match="cannot resume .*its data order had"):
            run(path, changed, "train.steps=4", resume=True)
    for override, message in (
        ("data.clusters=x.csv", "data.batches neighbours and data.clusters"),
        ("data.bucket_by=a", "data.batches neighbours and data.bucket_by"),
        ("data.sequential=true", "data.batches neighbours: .*no data.sequential"),
        (f"data.train={{x: {{shards: {shards}, weight: 2}}}}", "data.batches neighbours: .*no weights"),
        ("data.batches=neighbours", "data.batches.table is missing: name what .* or set train.mine_every"),
        ("data.batches=neighbors", "data.batches: it is mixed, single, or neighbours with options"),
        (f"data.batches={{table: {shards}}}", "data.batches.type: field required"),
        ("data.batches.count=4", r"data.batches: count=4 neighbours cannot be of nearest=3"),
        ("data.batches.shares=1", "data.batches.shares.*share"),
        ("data.held_out=0.2", "data.batches: .* is no sample of the training data .*set data.batches.unknown_ids=skip"),
    ):
        with pytest.raises(UserError, match=message):
            make_run_context(load_config(path, [override]))
    held = make_run_context(load_config(path, ["data.held_out=0.2", "data.batches.unknown_ids=skip"]))
    assert held.order.samples == len(held.dataset) < N


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.mine.query=c"], "train.mine.query: no field 'c'"),
        (["train.mine=null"], r"train: mine_every and mine go together.*mine: \{query"),
        (["train.mine_every=null"], "train: mine_every and mine go together.*mine_every: 2000"),
        (["train.mine_every=null", "train.mine=null"], "data.negatives.table is missing"),
        (["data.negatives=[]"], "train.mine_every: nothing reads what is mined"),
        (["data.negatives.field=a"], "data.negatives.field=a has no table, and what is mined are candidates of .*=b"),
        (["data.sequential=true"], "data.sequential"),
        (["score={type: lorentz}"], "train.mine_every: what is mined is compared by cosines"),
        (["train.mine.relative_margins=0.1"], "train.mine.relative_margins.*relative_margin"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path, overrides, message):
    with pytest.raises(UserError, match=message):
        make_run_context(load_config(write(tmp_path), overrides))


def test_what_cannot_be_mined_is_said_before_the_run(tmp_path):
    with pytest.raises(UserError, match="train.mine: .*range-min 3, --range-max 4"):
        training_miner({"query": "a", "candidate": "b", "count": 5, "range_min": 3, "range_max": 4})
    with pytest.raises(UserError, match="train.mine_every: .* needs a miner"):
        run(write(tmp_path))
    with pytest.raises(UserError, match=r"step-000004.parquet names no candidate at all"):
        run_with_miner(write(tmp_path), "run.name=none", "train.mine.max_score=-1.5")


def test_what_is_embedded(tmp_path):
    """Samples of two sources with ids of their own are embedded without augmentation, each at its place, the same whatever the
    ranks; one that cannot be decoded has neither field."""
    shards = {}
    for name in "xy":
        shards[name] = write_vectors(tmp_path / f"{name}.tar", lambda k, _: {"b.npy": npy([np.nan] * 6)} if k == 3 else {})
    sources = {name: {"shards": str(path), "own_ids": True} for name, path in shards.items()}
    path = write(tmp_path, {"train": sources, "negatives": NEGATIVES, "num_workers": 0})
    job = make_run_context(load_config(path, ["evaluation.batch_size=5"]))

    class Accelerator:
        device, is_main_process = "cpu", True

        def __init__(self, rank, world_size):
            self.process_index, self.num_processes = rank, world_size

    class Learner:
        averaged = None

    tables = {}
    for world_size in (1, 2, 3, 16):
        parts = []
        for rank in range(world_size):
            Learner.accelerator = Accelerator(rank, world_size)
            mining, folder = Mining(job, Learner, None), tmp_path / f"table{world_size}"
            folder.mkdir(exist_ok=True)
            parts += list(mining._embed(folder, None))
        whole = {"rows": sum(part["rows"] for part in parts), "parts": [one for part in parts for one in part["parts"]]}
        (folder / "manifest.json").write_text(json.dumps(parts[0] | whole))
        tables[world_size] = table = EmbeddingTable.read(folder)
        assert table.sample_ids.tolist() == job.dataset.sample_ids().tolist() and len(table) == 2 * N
        assert set(table.fields) == {"a", "b"}
        for field in "ab":
            assert torch.equal(table.fields[field], tables[1].fields[field])
            assert (~table.present[field]).nonzero().flatten().tolist() == [3, N + 3]
    assert len(set(tables[1].sample_ids.tolist())) == 2 * N and not job.dataset.negatives[0].ids.size


def test_the_command_killed_and_resumed(tmp_path):
    """The command itself, by its own miner: killed after a round, to the bit; on two ranks, in shards, and then on one."""
    path = write(tmp_path, ema_decay=0.5, checkpoint_every=5)
    done = mmcontrast("train", path, "run.name=whole")
    assert done.returncode == 0 and "mined at step 8: 96 candidates of 24 samples, of which 0 have" in done.stderr, done.stderr
    process = start("train", path, "run.name=killed")
    while process.poll() is None and not (tmp_path / "runs/killed/checkpoints/step-00000004").exists():
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert mmcontrast("train", path, "run.name=killed", "--resume").returncode == 0
    assert_same_end(tmp_path, "killed")

    for stop, *options in ((5,), (7, "train.parallel=fsdp", "--resume")):
        done = mmcontrast("train", path, "run.name=again", f"train.steps={stop}", *options, ranks=2)
        assert done.returncode == 0, done.stderr
    done = mmcontrast("train", path, "run.name=again", "--resume")
    assert done.returncode == 0, done.stderr
    (weights, losses, seen), (want, others, seen_by_other) = end_of(tmp_path, "again"), end_of(tmp_path, "whole")
    assert seen == seen_by_other and losses == pytest.approx(others, rel=1e-4)
    for step in (4, 8):
        names = [tmp_path / "runs" / name / "mined" / f"step-{step:06d}.parquet" for name in ("whole", "again")]
        assert rows_of(names[0]) == rows_of(names[1])
    assert all(torch.allclose(tensor, want[key], atol=1e-5) for key, tensor in weights.items())
