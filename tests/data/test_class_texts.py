"""Class-labelled data: prompts drawn of templates, one group for a class, from tables, shards and folders of class folders."""

import io
import json
import tarfile

import datasets
import pandas
import pytest
import torch
from PIL import Image

from mmcontrast.data import open_dataset
from mmcontrast.data.class_texts import group_of
from mmcontrast.errors import UserError
from mmcontrast.evaluation.cache import table_folder
from mmcontrast.modalities import ImageModality, TextModality
from mmcontrast.objectives import contrastive_loss
from mmcontrast.training.data_options import DataOptions

NAMES = ["rook", "Läufer", "black queen"]
TEMPLATES = ["a photo of a {}.", "a drawing of {c}", "{0}, carved"]
FIELDS = {"image": ImageModality(32), "text": TextModality()}


def picture(number):
    target = io.BytesIO()
    Image.new("RGB", (32, 32), (number * 7 % 256, 90, 30)).save(target, "PNG")
    return target.getvalue()


def as_table(folder):
    for number in range(12):
        (folder / f"{number}.png").write_bytes(picture(number))
    rows = {"image": [f"{k}.png" for k in range(12)], "label": [f" {NAMES[k % 3]} " for k in range(12)]}
    pandas.DataFrame(rows | {"group_id": range(12)}).to_csv(folder / "pairs.csv", index=False)
    return folder / "pairs.csv", "label"


def as_tar(folder):
    with tarfile.open(folder / "pairs.tar", "w") as tar:
        for number in range(12):
            about = json.dumps({"about": {"label": NAMES[number % 3]}}).encode()
            for name, data in ((f"{number:02}.png", picture(number)), (f"{number:02}.json", about)):
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder / "pairs.tar", "json:about.label"


def as_folders(folder):
    """As torchvision's ImageFolder reads them, below another folder."""
    for number in range(12):
        place = folder / "train" / NAMES[number % 3]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(picture(number))
    return folder / "train", "folder"


def as_dataset(folder):
    """As Hugging Face's datasets hold labels: numbers, and their names beside the columns."""
    columns = {"image": [{"bytes": picture(k), "path": None} for k in range(12)], "label": [k % 3 for k in range(12)]}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder / "pairs")
    return folder / "pairs", "label"


def as_parquet_of_datasets(folder):
    datasets.load_from_disk(as_dataset(folder)[0]).to_parquet(folder / "pairs.parquet")
    return folder / "pairs.parquet", "label"


def opened(shards, key, templates=None, **options):
    given = {"shards": str(shards), "keys": {"text": [key]}, "templates": {"text": templates or TEMPLATES}}
    return open_dataset(given, FIELDS, {}, **options)


def prompt(sample):
    tokens = [token for token in sample.values["text"].tolist() if token >= 0]
    return FIELDS["text"].tokenizer.decode(tokens).replace("<start_of_text>", "").replace("<end_of_text>", "").strip()


@pytest.mark.parametrize("write", [as_table, as_tar, as_folders, as_dataset, as_parquet_of_datasets])
def test_classes_of_any_data(write, tmp_path):
    """Evaluation takes the first template; training draws by (seed, epoch, sample), again the same; a class is one group."""
    shards, key = write(tmp_path)
    dataset = opened(shards, key)
    samples = [dataset[k] for k in range(12)]
    for sample in samples:
        name = sample.metadata["class_name"]
        assert name in NAMES and prompt(sample).startswith(f"a photo of a {name.lower()}")
        assert sample.group_id == group_of(name)
    assert len({sample.group_id for sample in samples}) == 3 and len({sample.sample_id for sample in samples}) == 12
    drawn, again = (opened(shards, key, seed=4, training=True) for _ in range(2))
    places = [(epoch, k) for epoch in range(6) for k in range(12)]
    texts = [prompt(drawn[place]) for place in places]
    assert texts == [prompt(again[place]) for place in reversed(places)][::-1]
    starts = [sum(text.startswith(start) for text in texts) for start in ("a photo of a ", "a drawing of ")]
    assert all(8 < number < 45 for number in (*starts, len(texts) - sum(starts)))
    other = opened(shards, key, seed=5, training=True)
    assert texts != [prompt(other[place]) for place in places]


def test_a_label_that_is_not_known_is_absent(tmp_path):
    """-1 is that of datasets; the metadata keeps the numbers, as the labels of an evaluation."""
    features = datasets.Features({"text": datasets.ClassLabel(names=NAMES)})
    datasets.Dataset.from_dict({"text": [2, -1, 0]}, features=features).save_to_disk(tmp_path / "labels")
    samples = list(open_dataset(str(tmp_path / "labels"), {"text": TextModality()}, {}))
    assert [sample.metadata["text"] for sample in samples] == [2, -1, 0]
    assert [prompt(sample) if "text" in sample.values else None for sample in samples] == ["black queen", None, "rook"]


def test_embeddings_of_other_templates_are_not_taken_from_the_cache(tmp_path):
    table, key = as_table(tmp_path)
    plain = open_dataset({"shards": str(table), "keys": {"text": [key]}}, FIELDS, {})
    datasets = [plain, *(opened(table, key, [template]) for template in TEMPLATES)]
    assert len({table_folder("model", dataset) for dataset in datasets}) == 4


def test_samples_of_a_class_are_no_negatives(tmp_path):
    """InfoNCE runs over those of the others of a batch alone that are of other classes."""
    dataset = opened(*as_table(tmp_path))
    batch = dataset.collate([dataset[k] for k in range(6)])
    torch.manual_seed(0)
    rows = {field: torch.nn.functional.normalize(torch.randn(6, 5, dtype=torch.float64), dim=1) for field in ("image", "text")}
    loss = contrastive_loss(rows, logit_scale=10.0, ids=batch.group_ids)
    scores = 10 * rows["image"] @ rows["text"].T
    same = torch.arange(6).unsqueeze(0) % 3 == torch.arange(6).unsqueeze(1) % 3
    kept = scores.masked_fill(same & ~torch.eye(6, dtype=torch.bool), -torch.inf)
    wanted = torch.stack([(side.logsumexp(1) - side.diagonal()).mean() for side in (kept, kept.T)]).mean()
    torch.testing.assert_close(torch.as_tensor(loss), wanted)


def test_what_is_no_class_is_refused(tmp_path):
    table, _ = as_table(tmp_path)
    with pytest.raises(UserError, match="templates of 'texts', which is no field of texts; did you mean 'text'"):
        open_dataset({"shards": str(table), "templates": {"texts": TEMPLATES}}, FIELDS, {})
    with pytest.raises(ValueError, match="'a photo' has no placeholder"):
        DataOptions.model_validate({"train": {"all": {"shards": "x.csv", "templates": {"text": ["a photo"]}}}})
    with pytest.raises(UserError, match="has a member .folder"):
        opened(table, "folder")
    frame = pandas.read_csv(table)
    frame["label"] = ["rook", None, "a\nb", *["king"] * 9]
    frame.to_csv(table, index=False)
    dataset = opened(table, "label")
    assert (
        "text" not in dataset[1].values and "class_name" not in dataset[1].metadata
    )  # no label: no text, as without templates
    assert "row 2" in dataset[2].error and "is not the name of one class" in dataset[2].error
