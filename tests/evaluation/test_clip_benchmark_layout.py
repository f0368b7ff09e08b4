"""Suites on data in CLIP_benchmark's layout, against its own evaluation."""

import io
import json
import shutil

import open_clip
import pytest
import timm
import torch
from clip_benchmark.datasets.builder import build_wds_dataset, image_captions_collate_fn
from clip_benchmark.metrics import zeroshot_classification, zeroshot_retrieval
from PIL import Image
from sklearn.metrics import balanced_accuracy_score
from torch.utils.data import DataLoader

from mmcontrast.embedder import load
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EvaluationOptions, open_splits
from mmcontrast.evaluation.cache import table_folder
from mmcontrast.suites import open_suite, run_suite
from tests.evaluation.layouts import NAMES, TEMPLATES, classification, retrieval, write
from tests.modalities.picture_files import files


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


def test_a_layout_is_one_in_a_mapping_too(chess, opened):
    for split in (str(chess), {"shards": str(chess)}):
        options = EvaluationOptions.model_validate({"splits": {"v": split}})
        _, datasets = open_splits(options, opened.model, opened.dataset)
        assert datasets["v"].modalities["image"].background == "drop"


def test_an_encoder_of_pictures_is_asked_by_probes(tmp_path):
    folder = classification(tmp_path / "wds_chess")
    network = timm.create_model("test_vit", num_classes=3)
    torch.save({"state_dict": network.state_dict()}, tmp_path / "weights.pth")
    probe = f"probes.chess={{train: [{folder}/test/0.tar, {folder}/test/1.tar, {folder}/test/2.tar], label: cls, kinds: [knn]}}"
    suite = open_suite("test_vit", str(folder), ["resamples=0", probe], tmp_path / "out")
    found = run_suite("test_vit", suite, pretrained=str(tmp_path / "weights.pth"), device="cpu").values
    assert found["wds_chess/probe/chess/knn/num_samples"] == 42 and not any("zero_shot" in name for name in found)
    suite = open_suite("test_vit", str(retrieval(tmp_path / "wds_captions")), [], tmp_path / "out")
    with pytest.raises(UserError, match="evaluation.captions: the model has no image or text field for it: .* it has image"):
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
