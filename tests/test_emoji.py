"""The corpora of emoji: characters of a real font, names as CLDR writes them, real voices."""

import io
import json

import matplotlib
import pytest
import soundfile
from PIL import Image

from data_pipelines.emoji.emoji import Emoji
from data_pipelines.emoji.together import Together
from mmcontrast.data.build import build_corpus
from mmcontrast.errors import UserError

FONT = f"{matplotlib.get_data_path()}/fonts/ttf/DejaVuSans.ttf"
NAMES = {
    "en": {
        "☀": "sun",
        "☂": "umbrella",
        "♥": "heart",
        "☎": "telephone",
        "✈": "airplane",
        "☃": "snowman",
        "🇫🇷": "flag",
        "🦥": "sloth",
    },
    "fr": {"☀": "soleil", "☂": "parapluie", "♥": "cœur", "☎": "téléphone", "✈": "avion", "🇫🇷": "drapeau", "🦥": "paresseux"},
}


@pytest.fixture
def annotations(tmp_path):
    for language, names in NAMES.items():
        (tmp_path / language).mkdir()
        about = {emoji: {"default": [name, "thing"], "tts": [name]} for emoji, name in names.items()}
        (tmp_path / language / "annotations.json").write_text(json.dumps({"annotations": {"annotations": about}}), "utf-8")
    return str(tmp_path)


def test_an_emoji_is_drawn_named_and_spoken_in_every_language(annotations):
    emoji = Emoji(FONT, annotations, ("en", "fr"), side=40)
    splits = emoji.splits()
    assert sorted(splits["train"] + splits["val"]) == sorted("☀☂♥☎✈")  # drawn by the font, one character, named in both
    assert all(ord(one) % 5 == 0 for one in splits["val"]) and splits["val_voices"] == splits["train"]
    sample, again, other = (emoji.make_sample(split, "☂") for split in ("train", "train", "val_voices"))
    assert sample.keys() == {"__key__", "png", "json", "en.txt", "en.flac", "fr.txt", "fr.flac"}
    assert all(sample[member] == again[member] for member in sample if "flac" not in member)  # a voice is not the same twice
    assert (sample["en.txt"], sample["fr.txt"]) == ("umbrella", "parapluie")
    assert sample["png"] != other["png"] and sample["en.flac"] != other["en.flac"]
    picture = Image.open(io.BytesIO(sample["png"]))
    assert picture.size == (40, 40) and picture.getextrema()[0][0] < 100  # something is drawn
    sound, rate = soundfile.read(io.BytesIO(sample["fr.flac"]))
    assert rate == 16_000 and 0.2 < len(sound) / rate < 3 and abs(sound).max() > 0.01


def test_the_picture_is_what_the_text_names_in_the_language_that_is_spoken(annotations, tmp_path):
    described = tmp_path / "together.yaml"
    described.write_text(
        f"out: {tmp_path}/out\nsource: {{type: 'data_pipelines.emoji.together:Together', font: {FONT},"
        f" annotations: {annotations}, languages: [en, fr], emoji: 4, train: 12, val: 2}}\n"
    )
    assert "train 12, val 2 samples" in " ".join(build_corpus(described, workers=1).split())
    task = Together(FONT, annotations, ("en", "fr"), emoji=4, train=12, val=2)
    abouts = []
    for number in task.splits()["train"]:
        sample = task.make_sample("train", number)
        about, told = sample["json"], sample["txt"].split(", ")
        assert NAMES[about["language"]][about["shown"]] in told and len(told) == 2
        assert NAMES[about["language"]][about["heard"]] not in told
        abouts.append(about)
    assert {about["language"] for about in abouts} == {"en", "fr"} and len({about["shown"] for about in abouts}) == 4


def test_a_file_that_is_not_there_is_named(annotations, tmp_path):
    with pytest.raises(
        UserError, match=r"no file .*zh/annotations\.json: README\.md of data_pipelines/emoji says how to get it"
    ):
        Emoji(FONT, annotations, ("en", "zh")).splits()
