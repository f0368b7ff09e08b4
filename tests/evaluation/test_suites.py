"""Suites on data in CLIP_benchmark's layout against its own evaluation, and every kind of task on shards of ours."""

import io
import json
import os
import shutil
import sys
import tarfile

import numpy as np
import open_clip
import pytest
import timm
import torch
import yaml
from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torch.utils.data import DataLoader

from mmcontrast.cli import main
from mmcontrast.config import load_config
from mmcontrast.data import write_shard
from mmcontrast.embedder import load
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable, EvaluationOptions, open_splits
from mmcontrast.evaluation.cache import fingerprint, table_folder
from mmcontrast.evaluation.gallery import comparable
from mmcontrast.models import make_model
from mmcontrast.run_folder import prepare_folder
from mmcontrast.runs import make_run_context
from mmcontrast.suites import open_suite, run_suite
from mmcontrast.training import checkpoint
from mmcontrast.training.checkpoint import Contents
from tests.command import mmcontrast, run_script
from tests.modalities.picture_files import files
from tests.models.open_clip_models import save
from tests.results import results_of

NAMES = ["queen", "king", "small house", "river"]
TEMPLATES = ["a photo of a {c}.", "{c}, drawn by hand"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("models") / "clip", "clip")


def pictures(number):
    noise = np.random.default_rng()
    for size in noise.integers(33, 70, (number, 2)):
        yield Image.fromarray(noise.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize(
            tuple(size.tolist()), Image.Resampling.BICUBIC
        )


def write(folder, split, samples, shards):
    (folder / split).mkdir(parents=True)
    for number in range(shards):
        write_shard(folder / split / f"{number}.tar", samples[number::shards])
    (folder / split / "nshards.txt").write_text(f"{shards}\n")


def classification(folder):
    samples = [{"__key__": f"s{k:04d}", "png": picture, "cls": k % 3} for k, picture in enumerate(pictures(42))]
    write(folder, "test", samples, 11)  # in the order of the names, 10 would come before 2
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    return folder


def retrieval(folder):
    words = ["queen", "king", "small", "village", "board", "two", "colours", "sea", "white", "bishop"]
    samples = []
    for k, picture in enumerate(pictures(24)):
        captions = [" ".join(np.random.default_rng().choice(words, 5)) for _ in range(2 + k % 4)]
        samples.append({"__key__": f"s{k:04d}", "png": picture, "txt": "\n".join(captions)})
    write(folder, "test", samples, 2)
    (folder / "dataset_type.txt").write_text("retrieval\n")
    return folder


def theirs(model, folder):
    """CLIP_benchmark's own data set, loader and metrics."""
    whole, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}")
    tokenize, dataset = open_clip.get_tokenizer(f"local-dir:{model}"), build_wds_dataset("x", preprocess, data_dir=str(folder))
    whole.eval()
    if dataset.classes:
        classes = zeroshot_classification.zero_shot_classifier(
            whole, tokenize, dataset.classes, dataset.templates, "cpu", amp=False
        )
        loader = DataLoader(dataset.batched(16), batch_size=None)
        return zeroshot_classification.run_classification(whole, classes, loader, "cpu", amp=False)
    loader = DataLoader(dataset, batch_size=5, collate_fn=image_captions_collate_fn)
    return zeroshot_retrieval.evaluate(whole, loader, tokenize, "cpu", amp=False, recall_k_list=[1, 5])


def test_zero_shot_on_its_layout_is_clip_benchmarks(model, tmp_path):
    folder = classification(tmp_path / "wds_chess")
    suite = open_suite(str(model), str(folder), [], tmp_path / "out")
    found = run_suite(str(model), suite, device="cpu").values
    logits, target = theirs(model, folder)
    predicted = logits.argmax(1)
    assert found["wds_chess/zero_shot/wds_chess/top1"] == pytest.approx((predicted == target).double().mean().item(), abs=1e-6)
    balanced = balanced_accuracy_score(target, predicted)
    assert found["wds_chess/zero_shot/wds_chess/mean_per_class"] == pytest.approx(balanced, abs=1e-6)
    report = json.loads((tmp_path / "out" / "results.json").read_text())["reports"]["wds_chess/zero_shot/wds_chess"]
    assert report["classes"] == NAMES and report["support"] == [14, 14, 14, 0]
    assert sum(count for *_, count in report["confusion"]) == 42
    page = (tmp_path / "out" / "report.html").read_text()
    assert "mistaken for" in page and "small house" in page


@pytest.fixture(scope="module")
def chess(tmp_path_factory):
    return classification(tmp_path_factory.mktemp("chess") / "wds_chess")


@pytest.fixture(scope="module")
def opened(model):
    return load(model, device="cpu")


CLASSNAMES, TEMPLATE_FILE = "classnames.txt", "zeroshot_classification_templates.txt"


def test_a_layout_written_elsewhere_is_that_of_clip_benchmark(model, tmp_path):
    """With a byte order mark and lines that end as on Windows, more names than classes, and labels with zeros."""
    folder = classification(tmp_path / "wds_chess")
    logits, target = theirs(model, folder)
    (folder / CLASSNAMES).write_bytes("\ufeff".encode() + ("\r\n".join(NAMES) + "\r\n").encode())
    (folder / TEMPLATE_FILE).write_bytes("\ufeff".encode() + "\r\n".join(TEMPLATES).encode())
    found = run_suite(str(model), open_suite(str(model), str(folder), ["resamples=0"], tmp_path / "out"), device="cpu")
    top1 = found.values["wds_chess/zero_shot/wds_chess/top1"]
    assert top1 == pytest.approx((logits.argmax(1) == target).double().mean().item(), abs=1e-6)
    assert found.reports["wds_chess/zero_shot/wds_chess"][1] == NAMES
    assert found.notes == ["wds_chess/zero_shot/wds_chess: classes without samples: 1 of 4"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (CLASSNAMES, b"queen\nking\n", r"labels that are no class: '2' \(14\); the list names 2 classes, .* 0 to 1"),
        (CLASSNAMES, b"queen\nking\n\nriver\n", "classnames.txt, line 3: a blank line"),
        (CLASSNAMES, b"queen\nking\nriver\n\n", "classnames.txt, line 4: a blank line"),
        (CLASSNAMES, "queen\nking\ncafé\n".encode("latin-1"), "classnames.txt, line 3: byte 0xe9 is not UTF-8: save"),
        (CLASSNAMES, "queen\nking\n".encode("utf-16"), "classnames.txt, line 1: byte 0xff is not UTF-8"),
        (CLASSNAMES, b"queen\n", "classnames.txt: 1 lines, where each is a name; there are at least 2"),
        (TEMPLATE_FILE, b"a {c}\na photo\n", "templates.txt, line 2: the template 'a photo' has no placeholder"),
        (TEMPLATE_FILE, b"a {classname}\n", "templates.txt, line 1: the template .* has the placeholder {classname}"),
        (TEMPLATE_FILE, b"a {c}\n\n", "templates.txt, line 2: a blank line"),
        (TEMPLATE_FILE, b"", "templates.txt: 0 lines"),
        ("test/nshards.txt", b"eleven", "nshards.txt: 'eleven' is no number of shards"),
        ("dataset_type.txt", b"retri\xe9val", "dataset_type.txt, line 1: byte 0xe9 is not UTF-8"),
    ],
)
def test_files_of_a_layout_that_do_not_fit(chess, opened, model, tmp_path, file, content, message):
    folder = tmp_path / "wds_chess"
    shutil.copytree(chess, folder)
    (folder / file).write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_splits(open_suite(str(model), str(folder), [], tmp_path).options, opened.model, opened.dataset)


def test_retrieval_of_captions_on_its_layout_is_clip_benchmarks(model, tmp_path):
    folder = retrieval(tmp_path / "wds_captions")
    suite = open_suite(str(model), f"{folder}:test", ["retrieval_at=[1, 5]"], tmp_path / "out")
    found = run_suite(str(model), suite, device="cpu").values
    for (name, value), way in zip(
        sorted(theirs(model, folder).items()), ["text_to_image"] * 2 + ["image_to_text"] * 2, strict=True
    ):
        assert found[f"wds_captions/retrieval/{way}/recall_at_{name[-1]}"] == pytest.approx(value, abs=1e-6), name
    assert found["wds_captions/retrieval/text_to_image/num_queries"] == sum(2 + k % 4 for k in range(24))


def test_pictures_of_any_mode_are_given_to_the_model_as_clip_benchmark_gives_them(model, tmp_path):
    """Its loader converts them to RGB before open_clip scales them; a suite of other shards leaves them to open_clip."""
    folder = tmp_path / "wds_modes"
    pngs = [data for data in files().values() if data[1:4] == b"PNG"]
    samples = [{"__key__": f"s{k:04d}", "png": data, "cls": k % 3} for k, data in enumerate(pngs)]
    write(folder, "test", samples, 1)
    (folder / "classnames.txt").write_text("\n".join(NAMES) + "\n")
    (folder / "zeroshot_classification_templates.txt").write_text("\n".join(TEMPLATES) + "\n")
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model}", load_weights=False)
    embedder, options = load(model), EvaluationOptions(splits={"a": str(folder), "b": f"{folder}/test/*.tar"})
    datasets = open_splits(options, embedder.model, embedder.dataset)[1]
    for k, (picture, _) in enumerate(build_wds_dataset("x", preprocess, data_dir=str(folder))):
        assert torch.equal(datasets["a"][k].values["image"], picture)
        assert torch.equal(datasets["b"][k].values["image"], preprocess(Image.open(io.BytesIO(pngs[k]))))
    assert len(pngs) == k + 1 and table_folder("m", datasets["a"]) != table_folder("m", datasets["b"])


def test_an_encoder_of_pictures_is_asked_by_probes(tmp_path):
    folder = classification(tmp_path / "wds_chess")
    network = timm.create_model("test_vit", num_classes=3)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    probe = f"probes.chess={{train: [{folder}/test/0.tar, {folder}/test/1.tar, {folder}/test/2.tar], label: cls, kinds: [knn]}}"
    suite = open_suite("test_vit", str(folder), ["resamples=0", probe], tmp_path / "out")
    found = run_suite("test_vit", suite, pretrained=str(tmp_path / "weights.pth"), device="cpu").values
    assert found["wds_chess/probe/chess/knn/num_samples"] == 42 and not any("zero_shot" in name for name in found)
    suite = open_suite("test_vit", str(retrieval(tmp_path / "wds_captions")), [], tmp_path / "out")
    with pytest.raises(UserError, match="evaluation.captions: the model has no field that it could ask or read; it has image"):
        run_suite("test_vit", suite, pretrained=str(tmp_path / "weights.pth"), device="cpu")


def test_a_layout_that_is_not_whole(model, tmp_path):
    folder = classification(tmp_path / "d")
    with pytest.raises(UserError, match="has no split 'train'; it has test"):
        run_suite(str(model), open_suite(str(model), f"{folder}:train", [], tmp_path))
    (folder / "test" / "3.tar").unlink()
    with pytest.raises(UserError, match="11 shards are named in nshards.txt, but there are 10"):
        run_suite(str(model), open_suite(str(model), str(folder), [], tmp_path))
    (folder / "dataset_type.txt").write_text("multilabel")
    (folder / "test" / "nshards.txt").unlink()
    with pytest.raises(UserError, match="but there are 10|of type 'multilabel'"):
        run_suite(str(model), open_suite(str(model), str(folder), [], tmp_path))


@pytest.fixture
def run(config_file):
    """A run of three fields whose weights are so random that samples differ."""
    config = load_config(config_file)
    prepare_folder(config, overwrite=False)
    model = make_model(config.fields, config.towers, config.model, 0)
    for weights in model.parameters():
        weights.data += 0.3 * torch.randn_like(weights)
    checkpoint.save(config.folder / "checkpoints", 6, Contents(model.state_dict(), {}, {}, config.to_yaml()))
    return config.folder


@pytest.fixture
def suite_file(corpus, tmp_path):
    relevance = tmp_path / "relevance.txt"
    with relevance.open("w") as file:
        from mmcontrast.data import open_shards

        keys = list(open_shards(str(corpus / "val-*.tar"))[0].keys)
        file.writelines(f"{query} 0 {keys[(k + step) % 24]} {step - 1}\n" for k, query in enumerate(keys) for step in (1, 2, 3))
    tree = {
        "splits": {"val": str(corpus / "val-*.tar")},
        "retrieval": {
            "both_to_audio": {"query": ["image", "text"], "candidate": "audio"},
            "same_script": {"query": "image", "candidate": "image", "by": "script"},
            "graded": {"query": "text", "candidate": "image", "relevance": str(relevance)},
        },
        "languages": {"names": {"fields": ["text", "audio"], "candidate": "image"}},
        "probes": {
            "script": {"train": str(corpus / "train-*.tar"), "label": "script", "shots": [2], "seeds": 3, "neighbours": 5}
        },
    }
    path = tmp_path / "suite.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_every_kind_of_task(run, suite_file):
    suite = open_suite(str(run), str(suite_file), ["resamples=50"], None)
    found = run_suite(str(run), suite, device="cpu")
    assert (
        suite.out.parent == run / "evaluations"
        and suite.out.name.startswith("suite-")
        and results_of(suite.out) == pytest.approx(found.values, nan_ok=True)
    )
    for name in (
        "retrieval/both_to_audio/recall_at_1", "retrieval/same_script/map", "retrieval/graded/ndcg_at_5",
        "languages/names/to_image/mean_rank_variance", "languages/names/text_to_image/recall_at_1",
        "probe/script/linear/top1", "probe/script/knn/macro_f1", "probe/script/few_shot_2/top1",
        "geometry/image_text/modality_gap", "geometry/audio/effective_rank", "geometry/text_to_image/hubness",
    ):  # fmt: skip
        low, high = found.intervals[f"val/{name}"]
        assert low <= found.values[f"val/{name}"] + 1e-9 and high >= low, name
    table = found.tables["val"]
    scripts = np.array([entry["script"] for entry in table.metadata])
    rows = table.fields["image"].double()
    scores = (rows @ rows.T).fill_diagonal_(-9)
    first = scripts[scores.argmax(1).numpy()] == scripts
    assert found.values["val/retrieval/same_script/recall_at_1"] == pytest.approx(first.mean())
    together = torch.nn.functional.normalize(table.fields["image"] + table.fields["text"], dim=1)
    hits = (together @ table.fields["audio"].T).argmax(1) == torch.arange(24)
    assert found.values["val/retrieval/both_to_audio/recall_at_1"] == pytest.approx(hits.double().mean().item())
    best = (table.fields["text"] @ table.fields["image"].T).topk(5).indices
    gains = torch.zeros(24, 24)
    for step in (2, 3):
        gains[torch.arange(24), (torch.arange(24) + step) % 24] = step - 1
    discounts = 1 / (torch.arange(5) + 2.0).log2()
    ndcg = (gains.gather(1, best) * discounts).sum(1) / (2 * discounts[0] + discounts[1])
    assert found.values["val/retrieval/graded/ndcg_at_5"] == pytest.approx(ndcg.mean().item(), rel=1e-5)


def test_post_processing_changes_retrieval_alone(run, suite_file):
    plain = run_suite(str(run), open_suite(str(run), str(suite_file), ["resamples=0", "geometry=false"], None), device="cpu")
    for option in ("scoring=csls", "scoring=inverted_softmax", "scoring=margin", "whiten=true"):
        suite = open_suite(str(run), str(suite_file), ["resamples=0", "geometry=false", option], None)
        found = run_suite(str(run), suite, device="cpu").values
        changed = {name for name, value in plain.values.items() if found[name] != pytest.approx(value, abs=1e-6, nan_ok=True)}
        assert changed and all("/retrieval/" in name or "/languages/" in name for name in changed), option


def captions_in(shard):
    with tarfile.open(shard) as tar:
        return [tar.extractfile(member).read() for member in tar.getmembers() if member.name.endswith(".txt")]


@pytest.mark.parametrize("rows", ["exact", "expected"])
def test_fields_are_compared_through_a_bank(run, suite_file, corpus, tmp_path, rows):
    """Banks of words, of a table, and of the captions of shards; pairs with the bank's own field keep their cosines."""
    words, plainly = tmp_path / "words.txt", ["resamples=0", "geometry=false", "probes={}"]
    words.write_text("black chess king\n\ngreek small letter alpha\ndigit one\ndigit one\nplus sign\n")
    plain = run_suite(str(run), open_suite(str(run), str(suite_file), plainly, None), device="cpu")
    table, embedder = plain.tables["val"], load(str(run), device="cpu")
    table.write(tmp_path / "table")
    scale = embedder.model.log_logit_scale.exp().item()
    lines = list(dict.fromkeys(words.read_text().split("\n")))
    banks = {words: embedder.embed(texts=[line for line in lines if line]), tmp_path / "table": table.fields["text"]}
    for source, bank in banks.items():
        scoring = f"scoring={{type: bridge, bank: {source}, rows: {rows}}}"
        suite = open_suite(str(run), str(suite_file), [*plainly, scoring], None)
        found = run_suite(str(run), suite, device="cpu").values
        p, q = ((scale * table.fields[field] @ bank.T).double().softmax(1) for field in ("image", "audio"))
        expected = [torch.nn.functional.normalize(of @ bank.double(), dim=1) for of in (p, q)]
        scores = p.sqrt() @ q.sqrt().T if rows == "exact" else expected[0] @ expected[1].T
        hits = (scores.argmax(1) == torch.arange(24)).double().mean().item()
        assert found["val/retrieval/image_to_audio/recall_at_1"] == pytest.approx(hits, abs=1e-6)
        for name in ("image_to_text", "text_to_audio"):
            name = f"val/retrieval/{name}/median_rank"
            assert found[name] == plain.values[name]
    shards = f"scoring={{type: bridge, bank: {corpus}/train-*.tar, rows: {rows}}}"
    by_shards = run_suite(str(run), open_suite(str(run), str(suite_file), [*plainly, shards], None), device="cpu")
    texts = sorted({text.decode() for file in corpus.glob("train-*.tar") for text in captions_in(file)})
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    texts = f"scoring={{type: bridge, bank: {tmp_path / 'texts.txt'}, rows: {rows}}}"
    by_texts = run_suite(str(run), open_suite(str(run), str(suite_file), [*plainly, texts], None), device="cpu")
    assert by_shards.values == pytest.approx(by_texts.values, nan_ok=True)
    everything = torch.arange(24)
    shown = comparable("image", "audio", everything, everything, embedder.model, table, by_shards.bank)
    bridge = by_shards.bank.between(embedder.model, ["image"], ["audio"])
    rows_of_pages = [bridge.expected(table.fields[field]) for field in ("image", "audio")]
    torch.testing.assert_close(shown, tuple(rows_of_pages))
    table.write(tmp_path / "others", {"model": "ViT-B-32", "pretrained": "openai"})
    with pytest.raises(UserError, match="of other weights than those that learn here"):
        make_run_context(
            load_config(run / "config.yaml", [f"evaluation.scoring={{type: bridge, bank: {tmp_path / 'others'}}}"])
        )
    refused = {
        f"bank: {tmp_path / 'others'}": "its model is 'ViT-B-32', here it is .*: embed both with one model",
        f"bank: {tmp_path / 'none.txt'}": "none.txt: No such file",
        f"bank: {words}, field: image": "field 'image' reads no texts; those that do: text",
        f"bank: {tmp_path / 'table'}, field: name": "field 'name' is not of the table and the model; of both are audio, image",
    }
    for options, message in refused.items():
        suite = open_suite(str(run), str(suite_file), [*plainly, f"scoring={{type: bridge, {options}}}"], None)
        with pytest.raises(UserError, match=message):
            run_suite(str(run), suite, device="cpu")


def test_embeddings_are_kept_until_the_weights_or_the_data_change(run, suite_file, corpus, monkeypatch):
    suite = open_suite(str(run), str(suite_file), ["resamples=0"], None)
    before = run_suite(str(run), suite, device="cpu").values
    embedded = []
    monkeypatch.setattr("mmcontrast.suites.embed_split", lambda *given: embedded.append(given[-2]) or again.tables["val"])
    again = run_suite(str(run), suite, device="cpu")
    assert again.values == pytest.approx(before, nan_ok=True) and not embedded
    assert isinstance(again.tables["val"], EmbeddingTable)
    file = next(corpus.glob("val-*.tar"))
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    run_suite(str(run), suite, device="cpu")
    assert embedded == ["val"]
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def test_a_fingerprint_is_the_same_in_every_process(run, model):
    """Strings have other hashes there. And after use: a tokenizer remembers what it has seen."""
    script = (
        "import sys, mmcontrast; from mmcontrast.evaluation.cache import fingerprint\n"
        "for name in sys.argv[1:]:\n    m = mmcontrast.load(name, device='cpu')\n    before = fingerprint(m.model)\n"
        "    m.embed(texts=['a queen of many colours']); assert fingerprint(m.model) == before; print(before)\n"
        "print(hash('a queen'))"
    )
    there = run_script(script, run, model)
    assert there.returncode == 0, there.stderr
    *prints, a_hash = there.stdout.split()[-3:]
    assert int(a_hash) != hash("a queen") or "PYTHONHASHSEED" in os.environ
    assert prints == [fingerprint(load(name, device="cpu").model) for name in (run, model)]
    changed = load(run, device="cpu")
    before = fingerprint(changed.model)
    next(changed.model.parameters()).data[0] += 1
    assert fingerprint(changed.model) != before
    changed = load(run, device="cpu")
    changed.model.modality("image").scaled_decode = True
    assert fingerprint(changed.model) != before


def test_in_half_precision(run, suite_file):
    suite = open_suite(str(run), str(suite_file), ["resamples=0", "probes={}"], None)
    whole = run_suite(str(run), suite, device="cpu").tables["val"]
    for precision in ("bf16", "fp16"):
        half = run_suite(str(run), suite, device="cpu", precision=precision, cached=False).tables["val"]
        difference = (whole.fields["image"] - half.fields["image"]).abs().max()
        assert 0 < difference < 0.2 and half.fields["image"].dtype == torch.float32, precision


def test_results_of_a_checkpoint_are_not_written_into_it(run):
    name = str(run / "checkpoints" / "step-00000006")
    assert open_suite(name, None, [], None).out == run / "evaluations" / "checkpoint-00000006"
    assert open_suite(str(run), None, [], None).out == run
    own, other = (open_suite(str(run), None, [option], None).out for option in ("resamples=0", "scoring=csls"))
    assert own.parent == run / "evaluations" and own.name.startswith("own-") and own != other  # the training's own stay
    suite = open_suite(name, None, ["resamples=0"], None)
    assert suite.out == own.with_name(f"{own.name}-checkpoint-00000006")
    run_suite(name, suite, device="cpu")
    run_suite(name, suite, device="cpu")  # it can still be read


def test_data_in_a_layout_leaves_other_splits_as_they_are(run, suite_file, tmp_path):
    options = ["resamples=0", "geometry=false"]
    options += [f"{task}.splits=[val]" for task in ("retrieval.graded", "retrieval.same_script", "probes.script")]
    before = run_suite(str(run), open_suite(str(run), str(suite_file), options, None), device="cpu").values
    options.append(f"splits.captions={retrieval(tmp_path / 'wds_captions')}")
    after = run_suite(str(run), open_suite(str(run), str(suite_file), options, None), device="cpu").values
    assert {name: after[name] for name in before} == pytest.approx(before, nan_ok=True)
    assert after["captions/retrieval/text_to_image/num_queries"] == sum(2 + k % 4 for k in range(24))


def test_what_cannot_be_written(run, suite_file, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/x: no folder for results"):
        run_suite(str(run), open_suite(str(run), str(suite_file), [], tmp_path / "file" / "x"), device="cpu")
    monkeypatch.setenv("MMCONTRAST_CACHE", str(tmp_path / "file"))
    found = run_suite(str(run), open_suite(str(run), str(suite_file), ["resamples=0"], None), device="cpu")
    assert found.values and "embeddings are not kept" in caplog.text


def test_two_ranks_find_what_one_finds(run, suite_file):
    command = ["evaluate", run, "--suite", suite_file, "--no-cache", "resamples=20", "--out", run / "two"]
    done = mmcontrast(*command, ranks=2)
    assert done.returncode == 0, done.stderr[-3000:]
    found = run_suite(
        str(run), open_suite(str(run), str(suite_file), ["resamples=20"], run / "one"), device="cpu", cached=False
    )
    assert results_of(run / "two") == pytest.approx(found.values, nan_ok=True, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["retrieval.x={query: image, candidate: smell}"], "evaluation.retrieval.x: the model has no field 'smell'"),
        (["retrieval.x={query: image, candidate: text, by: colour}"], "no sample has the label 'colour'"),
        (["zero_shot.z={label: script, classes: imagenet2}"], "no classes of the name 'imagenet2'"),
        (["zero_shot.z={label: script, classes: [a, b], splits: [vall]}"], "no split 'vall'; did you mean 'val'"),
        (["probes.script.train=nowhere.tar"], "no shard at 'nowhere.tar'"),
        (["retrieval.x={query: image, candidate: image, once: true}"], "once is of groups"),
        (["captions=[image]"], "evaluation.captions: 'image' is not text"),
        (["retrieval_att=[1]"], "unknown key 'retrieval_att'; did you mean 'retrieval_at'"),
    ],
)
def test_mistakes_are_told_in_a_line(run, suite_file, options, message, capsys, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["mmcontrast", "evaluate", str(run), "--suite", str(suite_file), "--device", "cpu", *options]
    )
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_relevance_that_is_none(run, suite_file, tmp_path):
    (tmp_path / "relevance.txt").write_text("a b c\n")
    with pytest.raises(UserError, match="relevance.txt, line 1: 'a b c' is not"):
        run_suite(str(run), open_suite(str(run), str(suite_file), [], None), device="cpu")
    (tmp_path / "relevance.txt").write_text("a 0 b 1\n")
    with pytest.raises(UserError, match="no sample has the key 'a'"):
        run_suite(str(run), open_suite(str(run), str(suite_file), [], None), device="cpu")


def test_a_folder_whose_files_have_changed_is_embedded_again(model, tmp_path):
    """By texts of the same lengths, which leave the folder's own time, its names and its sizes."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_text(f"number {number}")
    opened = load(str(model), device="cpu")
    before = table_folder("m", opened.dataset(str(folder)))
    assert table_folder("m", opened.dataset(str(folder))) == before
    (folder / "2.txt").write_text("number 7")
    assert table_folder("m", opened.dataset(str(folder))) != before
