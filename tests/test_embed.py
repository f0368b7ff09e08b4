"""`mmcontrast embed`: killed for real and started again, by torchrun's ranks, with other libraries' models, read without us."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from typer.testing import CliRunner

import mmcontrast
from mmcontrast.cli import app
from mmcontrast.config import load_config
from mmcontrast.curation.run_stage import share_of_this_process
from mmcontrast.data import write_shard
from mmcontrast.embedder import identity
from mmcontrast.embedding_job import embed_shards, slices_of
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable, TableSlice, embed_dataset
from mmcontrast.models import make_model, weights_digest
from mmcontrast.run_folder import prepare_folder
from mmcontrast.search import Searcher, build_index
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from tests.command import children, start
from tests.command import mmcontrast as command
from tests.models.transformers_models import clip, saved

ROOT = Path(__file__).parent.parent
STOPS = """
import os, signal, sys

records = 0

def stop_at_the_third_record(event, arguments):
    global records
    if event == "os.rename" and ".slice-" in str(arguments[1]) and str(arguments[1]).endswith(".json"):
        records += 1
        if records == 3:
            os.kill(os.getpid(), signal.SIGSTOP)

sys.addaudithook(stop_at_the_third_record)
"""  # a sitecustomize.py


@pytest.fixture
def run(config_file):
    """A run's folder, with a checkpoint of random weights."""
    config = load_config(config_file)
    prepare_folder(config, overwrite=False)
    model = make_model(config.fields, config.towers, config.model, 0)
    checkpoint.save(config.folder / "checkpoints", 6, Contents(model.state_dict(), {}, {}, config.to_yaml()))
    return config.folder


def embed(*arguments, **how):
    return command("embed", *arguments, "--device", "cpu", "--batch-size", 2, **how)


def state(pid):
    """Return the letter of a process: T stopped, Z ended; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def records(out):
    return {path.name: path.stat().st_mtime_ns for path in out.glob(".slice-*.json")}


def same(first, second):
    assert first.metadata == second.metadata and torch.equal(first.sample_ids, second.sample_ids)
    assert first.fields.keys() == second.fields.keys() and torch.equal(first.group_ids, second.group_ids)
    for field, rows in first.fields.items():
        torch.testing.assert_close(rows, second.fields[field], atol=1e-5, rtol=1e-5)
        assert torch.equal(first.present[field], second.present[field])


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2], ids=["alone", "torchrun"])
def test_a_killed_table_goes_on_where_it_was(run, corpus, tmp_path, ranks):
    """Every rank stops itself when it has two slices and is about to have a third, and is killed there."""
    out, shards = tmp_path / "table", str(corpus / "train-*.tar")
    (tmp_path / "sitecustomize.py").write_text(STOPS)
    options = ["--device", "cpu", "--batch-size", 8, "--slice-rows", 8]
    process = start("embed", run, shards, out, *options, ranks=ranks, real=True, env={"PYTHONPATH": str(tmp_path)})

    def working():
        return children(process.pid) if ranks > 1 else [process.pid]

    while len(working()) < ranks or any(state(pid) != "T" for pid in working()):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    done, pids = records(out), working()
    process.kill()
    process.communicate()
    deadline = time.monotonic() + 300
    while any(state(pid) not in ("Z", "X", "") for pid in pids):
        assert time.monotonic() < deadline, "a rank outlived torchrun"
        time.sleep(0.01)
    assert records(out) == done and len(done) == 2 * ranks and not (out / "manifest.json").exists()
    (out / ".slice-killed").mkdir(exist_ok=True)
    again = embed(run, shards, out)  # on another number of ranks, too
    assert again.returncode == 0, again.stderr
    assert records(out).items() > done.items() and len(records(out)) == 12
    assert embed_shards(run, shards, tmp_path / "once", device="cpu", batch_size=8)
    same(EmbeddingTable.read(out), EmbeddingTable.read(tmp_path / "once"))
    assert not [path for path in out.iterdir() if path.is_dir()]
    manifest = json.loads((out / "manifest.json").read_text())
    assert (manifest["model"], manifest["checkpoint"], manifest["shards"]) == (str(run), "6", shards)
    dataset = mmcontrast.load(manifest["model"], checkpoint=manifest["checkpoint"], device="cpu").dataset(shards)
    assert manifest["data"] == dataset.digest and manifest["rows"] == len(dataset)


def test_two_ranks_make_one_table(run, corpus, tmp_path):
    shards = str(corpus / "val-*.tar")
    done = embed(run, shards, tmp_path / "two", "--num-workers", 1, ranks=2)
    assert done.returncode == 0, done.stderr
    assert len(records(tmp_path / "two")) == 2
    assert embed_shards(run, shards, tmp_path / "one", device="cpu", batch_size=7)
    same(EmbeddingTable.read(tmp_path / "two"), EmbeddingTable.read(tmp_path / "one"))
    before = records(tmp_path / "two")
    again = CliRunner().invoke(app, ["embed", str(run), shards, str(tmp_path / "two")])
    assert again.exit_code == 0 and "24 samples, fields audio, image, text" in " ".join(again.stderr.split())
    assert records(tmp_path / "two") == before


def test_a_rank_too_many_has_nothing_to_do(run, corpus, tmp_path, monkeypatch):
    shards, out = str(corpus / "val-*.tar"), tmp_path / "t"
    assert not embed_shards(run, shards, out, part=TableSlice(out, 1, 2), device="cpu")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank, complete in (("2", False), ("0", False), ("1", True), ("2", True)):
        monkeypatch.setenv("RANK", rank)
        assert embed_shards(run, shards, out, device="cpu") == complete
    assert len(EmbeddingTable.read(out)) == 24


@pytest.mark.parametrize(("rank", "world_size"), [("1", None), ("5", "2"), ("-1", "2")])
def test_a_rank_that_is_none_of_the_launch_is_refused(run, corpus, tmp_path, monkeypatch, rank, world_size):
    monkeypatch.setenv("RANK", rank)
    if world_size:
        monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(UserError, match=f"RANK={rank} where WORLD_SIZE="):
        embed_shards(run, str(corpus / "val-*.tar"), tmp_path / "table")
    with pytest.raises(UserError, match=f"RANK={rank} where WORLD_SIZE="):
        share_of_this_process()


def test_files_of_others_are_not_replaced(run, corpus, tmp_path):
    (tmp_path / "part-00000.parquet").write_bytes(b"another program's")
    with pytest.raises(UserError, match="part-00000.parquet is of something else"):
        embed_shards(run, str(corpus / "val-*.tar"), tmp_path)
    assert (tmp_path / "part-00000.parquet").read_bytes() == b"another program's"


def test_slices_are_bounded_and_none_is_empty():
    for samples in (1, 5, 100, 101, 12345):
        for rows in (1, 7, 100, 100_000):
            for ranks in (1, 3, 8):
                number = slices_of(samples, rows, ranks)
                sizes = [samples * (k + 1) // number - samples * k // number for k in range(number)]
                assert min(sizes) >= 1 and max(sizes) <= rows and sum(sizes) == samples
                assert number % ranks == 0 or number == samples


def test_a_part_at_a_time_is_in_memory(run, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr("mmcontrast.evaluation.embed.PART_ROWS", 7)
    most = []
    written = EmbeddingTable.write_parts
    monkeypatch.setattr(EmbeddingTable, "write_parts", lambda self, *a: most.append(len(self)) or written(self, *a))
    assert embed_shards(run, str(corpus / "val-*.tar"), tmp_path / "t", device="cpu", batch_size=4)
    assert most == [7, 7, 7, 3]
    embedder = mmcontrast.load(run, device="cpu")
    whole = embed_dataset(embedder.model, embedder.dataset(str(corpus / "val-*.tar")), batch_size=24)
    same(EmbeddingTable.read(tmp_path / "t"), whole)


def test_a_model_of_another_library_embeds_the_fields_that_are_there(corpus, tmp_path):
    folder = saved(clip(), tmp_path / "clip")
    done = CliRunner().invoke(
        app, ["embed", str(folder), str(corpus / "val-*.tar"), str(tmp_path / "t"), "--num-workers", "1", "--device", "cpu"]
    )
    assert done.exit_code == 0 and "fields image, text" in " ".join(done.stderr.split())
    model, table = mmcontrast.load(folder, device="cpu"), EmbeddingTable.read(tmp_path / "t")
    dataset = model.dataset(str(corpus / "val-*.tar"))
    members = [dataset.members(row, ["png", "txt"]) for row in range(24)]
    images = model.embed(images=[one["png"] for one in members])
    torch.testing.assert_close(table.fields["image"], images, atol=1e-5, rtol=1e-5)
    texts = model.embed(texts=[one["txt"].decode() for one in members])
    torch.testing.assert_close(table.fields["text"], texts, atol=1e-5, rtol=1e-5)
    about = json.loads((tmp_path / "t" / "manifest.json").read_text())
    assert (about["model"], about["checkpoint"], about["pretrained"]) == (str(folder), None, None)

    pictures = [{"__key__": f"{k}", "png": one["png"]} for k, one in enumerate(members)]
    write_shard(tmp_path / "pictures.tar", pictures)
    assert embed_shards(folder, str(tmp_path / "pictures.tar"), tmp_path / "p", device="cpu")
    assert list(EmbeddingTable.read(tmp_path / "p").fields) == ["image"]
    write_shard(tmp_path / "sounds.tar", [{"__key__": "a", "flac": b"x"}])
    with pytest.raises(UserError, match=r"no sample has a field of .*: image \(\.jpg, .*\), text .*; they have \.flac"):
        embed_shards(folder, str(tmp_path / "sounds.tar"), tmp_path / "s", device="cpu")
    with pytest.raises(UserError, match="another table"):
        embed_shards(folder, str(tmp_path / "pictures.tar"), tmp_path / "p", device="cpu", precision="bf16")


def test_the_documented_lines_read_a_table_without_us(run, corpus, tmp_path):
    assert embed_shards(run, str(corpus / "val-*.tar"), tmp_path / "table", device="cpu", slice_rows=9)
    lines, *_ = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "tables.md").read_text(), re.DOTALL)
    assert len(lines.strip().splitlines()) <= 10
    lines += "\nimport sys; assert 'mmcontrast' not in sys.modules\n"
    lines += "torch.save([image, here, rows['key'].to_pylist(), rows['sample_id'].to_pylist()], 'read.pt')"
    subprocess.run([sys.executable, "-c", lines], cwd=tmp_path, check=True)
    image, here, keys, ids = torch.load(tmp_path / "read.pt")
    table = EmbeddingTable.read(tmp_path / "table")
    assert torch.equal(image, table.fields["image"]) and torch.equal(here, table.present["image"])
    assert keys == [entry["key"] for entry in table.metadata] and ids == table.sample_ids.tolist()


def test_a_table_of_data_that_have_changed_is_not_complete(run, tmp_path, caplog):
    shard = tmp_path / "a.tar"
    texts = [{"__key__": f"k{k}", "txt": f"number {k}", "json": {"key": k, "sample_id": k}} for k in range(6)]
    write_shard(shard, texts[:4])
    assert embed_shards(run, str(shard), tmp_path / "t", device="cpu")
    assert [entry["key"] for entry in EmbeddingTable.read(tmp_path / "t").metadata] == ["k0", "k1", "k2", "k3"]  # the samples'
    assert embed_shards(run, str(shard), tmp_path / "t", device="cpu")
    assert "written after" not in caplog.text
    later = time.time() + 60
    os.utime(shard, (later, later))
    assert embed_shards(run, str(shard), tmp_path / "t", device="cpu") and "a.tar was written after" in caplog.text
    write_shard(shard, texts)
    with pytest.raises(UserError, match="slices of another table .data: "):
        embed_shards(run, str(shard), tmp_path / "t", device="cpu")


def test_an_index_is_searched_by_the_weights_that_made_it(tmp_path):
    """A model that a checkpoint's file belongs to, over pictures alone: texts can still ask."""
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=3)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    pictures = [{"__key__": f"p{k}", "png": Image.effect_noise((40, 40), 90.0).convert("RGB")} for k in range(12)]
    write_shard(tmp_path / "p.tar", pictures)
    assert embed_shards(
        "test_vit", str(tmp_path / "p.tar"), tmp_path / "t", pretrained=str(tmp_path / "weights.pth"), device="cpu"
    )
    build_index(tmp_path / "t", progress=False)
    searcher = Searcher.open(tmp_path / "t" / "index", "cpu")
    (best, *_) = searcher.search("image", image=searcher.media(7, "image"))
    assert best.row == 7 and best.score == pytest.approx(1.0, abs=1e-5)
    torch.save({"state_dict": timm.create_model("test_vit", num_classes=3).state_dict()}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"test_vit .*weights.pth has other weights now"):
        Searcher.open(tmp_path / "t" / "index", "cpu")


def test_a_run_that_was_trained_again_is_another_model(run, corpus, tmp_path):
    """Under the same name and step: its table goes on with the weights of before, and is searched by them, or not at all."""
    shards = str(corpus / "val-*.tar")
    assert embed_shards(run, shards, tmp_path / "t", device="cpu")
    build_index(tmp_path / "t", progress=False)
    Searcher.open(tmp_path / "t" / "index", "cpu")
    saved_step = run / "checkpoints" / "step-00000006"
    weights = {name: tensor + 1 for name, tensor in load_file(saved_step / "model.safetensors").items()}
    checkpoint.save(run / "checkpoints", 6, Contents(weights, {}, {}, (run / "config.yaml").read_text()))
    with pytest.raises(UserError, match="runs/.* 6 has other weights now than those that made the table: embed again"):
        Searcher.open(tmp_path / "t" / "index", "cpu")
    with pytest.raises(UserError, match="slices of another table .weights: "):
        embed_shards(run, shards, tmp_path / "t", device="cpu")


def test_a_checkpoints_folder_and_mistakes(run, corpus, tmp_path, monkeypatch):
    whole, one = mmcontrast.load(run, device="cpu"), mmcontrast.load(run / "checkpoints" / "step-00000006", device="cpu")
    assert torch.equal(whole.embed(texts=["a"]), one.embed(texts=["a"]))
    monkeypatch.chdir(run.parent)
    assert identity(run.name) == identity(f"{run.name}/checkpoints/step-00000006")
    about = identity(run.name)
    assert len(about.pop("weights")) == 16 and about == {"model": str(run), "checkpoint": "6", "pretrained": None}
    (run.parent / "resnet50").mkdir()
    Path("m.pt").touch()
    empty = weights_digest(Path("m.pt"))
    assert identity("resnet50", pretrained="m.pt") == {
        "model": "resnet50", "checkpoint": None, "pretrained": str(run.parent / "m.pt"), "weights": empty,
    }  # fmt: skip
    Path("m.pt").write_bytes(b"weights")
    assert identity("resnet50", pretrained="m.pt")["weights"] != empty
    (run.parent / "resnet50" / "config.json").write_text('{"architecture": "resnet18"}')
    assert identity("timm:resnet50")["model"] == f"timm:{run.parent / 'resnet50'}"
    with pytest.raises(UserError, match="takes neither pretrained nor pooling"):
        mmcontrast.load(run, pretrained="x")
    with pytest.raises(UserError, match="precision 'fp8': it must be one of fp32"):
        mmcontrast.load(run, precision="fp8")
    monkeypatch.setenv("WORLD_SIZE", "2")
    shards = str(corpus / "val-*.tar")
    both = CliRunner().invoke(app, ["embed", str(run), shards, str(tmp_path / "t"), "--part", "1/2"])
    assert both.exit_code == 2 and "torchrun already share the slices" in " ".join(both.stderr.split())


def test_a_checkpoint_of_what_is_no_run_is_refused(run, tmp_path):
    saved(clip(), tmp_path / "clip")
    with pytest.raises(UserError, match="clip is no run: leave out the checkpoint '500'"):
        mmcontrast.load(tmp_path / "clip", checkpoint="500")
    step = run / "checkpoints" / "step-00000006"
    with pytest.raises(UserError, match="step-00000006 is a checkpoint itself: leave out the checkpoint 'best'"):
        mmcontrast.load(step, checkpoint="best")
    assert mmcontrast.load(step, checkpoint="6").name == str(step)


def test_logits_of_a_run_are_scaled_and_shifted(config_file, corpus):
    config = load_config(config_file, ["model.logit_bias=-3.5", "model.logit_scale=7.25"])
    model = make_model(config.fields, config.towers, config.model, 0)
    embedder = mmcontrast.Embedder(model, "m", "cpu")
    first, second = torch.randn(3, 16), torch.randn(2, 16)
    torch.testing.assert_close(embedder.logits(first, second), 7.25 * first @ second.T - 3.5)
    config = load_config(config_file, ["model.scale_per_pair=true"])
    pairs = mmcontrast.Embedder(make_model(config.fields, config.towers, config.model, 0), "m", "cpu")
    with torch.no_grad():
        pairs.model.log_logit_scale.copy_(torch.tensor([1.0, 2.0, 3.0]))
    place = next(k for k, pair in enumerate(pairs.model.pairs) if set(pair) == {"text", "audio"})
    scale = pairs.model.log_logit_scale[place].exp()
    torch.testing.assert_close(pairs.logits(first, second, ("audio", "text")), scale.detach() * first @ second.T)
    with pytest.raises(UserError, match="a scale for each pair"):
        pairs.logits(first, second)
