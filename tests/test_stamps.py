"""The corpus of stamps: Tux Paint's files as they are laid out, with what some of them lack."""

import io

import pytest
import webdataset
from PIL import Image

from data_pipelines.stamps.stamps import Stamps
from mmcontrast.data.build import build_corpus
from mmcontrast.errors import UserError

CAPTIONS = {
    "animals/gnu": "A blue gnu.\nde.utf8=Ein blaues Gnu.\nfr.utf8=Un gnou bleu.\nel.utf8=\n",
    "animals/gnu_old": "A blue gnu.\nfr.utf8=Un gnou bleu.\n",
    "food/kiwi": "A kiwifruit.\nfr.utf8=Un kiwi.",
    "symbols/a": "The letter A.",
}


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "stamps"
    for number, (name, text) in enumerate(CAPTIONS.items()):
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGBA", (400, 200), (0, 0, 0, 0))  # transparent, which is white here
        picture.paste((200, 40 * number, 0, 255), (0, 0, 100, 200))
        picture.save(f"{file}.png")
        file.with_suffix(".txt").write_text(text, "utf-8")
    (root / "animals" / "gnu_desc_fr.ogg").write_bytes(b"OggS spoken")
    (root / "animals" / "gnu.ogg").write_bytes(b"OggS moo")
    Image.new("RGB", (9, 9)).save(root / "animals" / "gnu_mirror.png")
    Image.new("RGB", (9, 9)).save(root / "nameless.png")
    return root


def test_members_are_what_a_stamp_has(folder):
    stamps = Stamps(str(folder), languages=("fr", "el"), side=100)
    splits = stamps.splits()
    assert sorted(p.stem for p in splits["train"] + splits["val"]) == ["a", "gnu", "gnu_old", "kiwi"]
    assert splits["val_mirrored"] == splits["train"]
    made = {picture.stem: stamps.make_sample("train", picture) for picture in splits["train"] + splits["val"]}
    gnu = made["gnu"]
    assert {"txt", "fr.txt", "fr.ogg", "ogg", "png", "json"} == gnu.keys() - {"__key__"}
    assert (gnu["txt"], gnu["fr.txt"], gnu["ogg"]) == ("A blue gnu.", "Un gnou bleu.", b"OggS moo")
    assert gnu["json"]["category"] == "animals" and made["a"].keys() == {"__key__", "png", "txt", "json"}
    assert gnu["json"]["group_id"] == made["gnu_old"]["json"]["group_id"] != made["kiwi"]["json"]["group_id"]
    assert len({one["json"]["sample_id"] for one in made.values()}) == 4
    held_out = {p.stem for p in splits["val"]}
    assert held_out.isdisjoint({"gnu", "gnu_old"}) or {"gnu", "gnu_old"} <= held_out
    plain, mirrored = (
        Image.open(io.BytesIO(stamps.make_sample(split, folder / "animals" / "gnu.png")["png"]))
        for split in ("train", "val_mirrored")
    )
    assert plain.size == (100, 50) and plain.getpixel((99, 0)) == (255, 255, 255) == mirrored.getpixel((0, 0))
    assert plain.getpixel((0, 0))[0] == 200 == mirrored.getpixel((99, 0))[0]


def test_it_is_built_as_any_corpus_is(folder, tmp_path):
    described = tmp_path / "stamps.yaml"
    described.write_text(f"out: {tmp_path}/out\nsource: {{type: 'data_pipelines.stamps.stamps:Stamps', folder: {folder}}}\n")
    said = build_corpus(described, workers=1)
    assert "val_mirrored" in said
    samples = list(webdataset.WebDataset(str(tmp_path / "out" / "val_mirrored-00000.tar"), shardshuffle=False))
    trained = {picture.stem for picture in Stamps(str(folder)).splits()["train"]}
    assert {sample["__key__"].rpartition("-")[2] for sample in samples} == trained and all("png" in one for one in samples)


def test_a_folder_without_stamps_says_how_to_get_them(tmp_path):
    with pytest.raises(UserError, match=r"holds no stamps: README\.md of data_pipelines/stamps says how to unpack them"):
        Stamps(str(tmp_path)).splits()


@pytest.mark.parametrize("text", [b"\xff\xfeA gnu", b""])
def test_a_caption_that_is_none_names_its_file(text, folder):
    (folder / "food" / "kiwi.txt").write_bytes(text)
    with pytest.raises(UserError, match=r"kiwi\.txt is no caption in UTF-8 .*: remove it, or mend it"):
        Stamps(str(folder)).splits()
