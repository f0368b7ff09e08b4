"""Indexes through a bridge: pictures and sounds meet in a list of texts, also those of two models that share nothing else."""

import copy
import json
import shutil

import pytest
import torch
import torch.nn.functional as F
import webdataset

import mmcontrast
from mmcontrast.errors import UserError
from mmcontrast.evaluation import EmbeddingTable
from mmcontrast.evaluation.banks import read_bank
from mmcontrast.search import Searcher, SearchIndex, build_index
from mmcontrast.search.query import TEXTS
from tests.models.open_clip_models import save
from tests.search.conftest import command

WORDS = ["black chess queen", "greek small letter alpha", "digit one", "plus sign", "latin capital letter b", "snowman"]


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    path = tmp_path_factory.mktemp("bank") / "words.txt"
    path.write_text("\n".join([*WORDS, WORDS[0], "  "]) + "\n")
    return path


@pytest.fixture(scope="module")
def bridged(small_index, words):
    folder = small_index.parent / "bridged"
    build_index(small_index.parent, folder, bridge=words, device="cpu", progress=False)
    return folder


def expected(rows, known, entries, scale):
    p = (scale * rows.double() @ known.double().T).softmax(1)
    return F.normalize(p @ entries.double(), dim=1)


def test_scores_are_cosines_of_expected_entries(small_index, bridged):
    searcher = Searcher.open(bridged, "cpu")
    embedder, table = searcher.embedder, EmbeddingTable.read(small_index.parent)
    bank, scale = embedder.embed(texts=WORDS), embedder.model.log_logit_scale.exp().item()
    about = searcher.index.about["bridge"]
    assert about["scale"] == pytest.approx(scale) and about["entries"] == len(WORDS) and about["field"] == "text"
    sound = table.fields["audio"][4]
    hits = searcher.index.search(sound, "image", k=29)
    scores = expected(sound[None], bank, bank, scale) @ expected(table.fields["image"], bank, bank, scale).T
    assert len(hits) == 29  # one sample has no picture
    for hit in hits:
        assert hit.score == pytest.approx(scores[0, hit.row].item(), abs=1e-5)
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    found = command("search", bridged, "--audio", _sound(searcher, bridged.parent), "--in", "image", "--k", 3, "--json")
    assert found.exit_code == 0, found.output
    assert [hit["row"] for hit in json.loads(found.stdout)] == [hit.row for hit in hits[:3]]


def _sound(searcher, folder):
    path = folder / "sound.flac"
    path.write_bytes(searcher.media(4, "audio"))
    return path


def test_another_model_asks_through_the_texts(small_index, bridged, tmp_path):
    """One of open_clip's, whose embeddings have another width: no pair of both models was ever seen."""
    folder = save(tmp_path / "clip", "clip")
    other = mmcontrast.load(folder, device="cpu")
    searcher = Searcher.open(bridged, "cpu", model=str(folder))
    own = searcher.embedder
    assert other.model.embed_dim != own.model.embed_dim
    assert "image (images), text (texts); 64 numbers" in repr(other)
    picture = searcher.media(5, "image")
    table = EmbeddingTable.read(small_index.parent)
    own_scale = own.model.log_logit_scale.exp().item()
    entries, known = own.embed(texts=WORDS), other.embed(texts=WORDS)
    asked = expected(other.embed(images=[picture]), known, entries, other.model.log_logit_scale.exp().item())
    scores = asked @ expected(table.fields["audio"], entries, entries, own_scale).T
    hits = searcher.search("audio", k=29, image=picture)
    assert len(hits) == 29
    for hit in hits:
        assert hit.score == pytest.approx(scores[0, hit.row].item(), abs=1e-5)
    program = other.bridge(WORDS, to=own)
    torch.testing.assert_close(program.expected(other.embed(images=[picture])).double(), asked, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="a stored row was embedded by"):
        searcher.search("audio", like=(4, "image"))
    with pytest.raises(UserError, match="has no bridge of texts, through which"):
        Searcher.open(small_index, "cpu", model=str(folder))


def test_a_table_is_a_bank(small_index, tmp_path):
    table = small_index.parent
    about = build_index(table, tmp_path / "index", bridge=table, scale=20.0, device="cpu", progress=False)
    assert about["bridge"]["entries"] == len(set(EmbeddingTable.read(table).group_ids.tolist())) - 1  # one has no text
    assert SearchIndex.open(tmp_path / "index").search(torch.ones(about["dim"]) / about["dim"] ** 0.5, "image")


def test_damage_and_mistakes(small_index, bridged, words, tmp_path):
    table, copy = small_index.parent, tmp_path / "table"
    shutil.copytree(table, copy)
    shutil.rmtree(copy / "index")
    file = copy / "bridged" / "bridge.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match="bridge.safetensors is damaged"):
        SearchIndex.open(copy / "bridged")
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"checkpoint": "step-1"}))
    with pytest.raises(UserError, match="its checkpoint is 'step-1', here it is '2': embed both with one model"):
        build_index(table, tmp_path / "a", bridge=copy, progress=False)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    for bank, message in ((empty, "no line has a text"), (tmp_path / "none.txt", "No such file")):
        with pytest.raises(UserError, match=message):
            build_index(table, tmp_path / "b", bridge=bank, progress=False)
    assert not (tmp_path / "b").exists()


def test_a_bank_of_the_texts_of_shards(small_index, words, tmp_path):
    """Each different text is an entry, as a line of a text file is; a field that reads another member has that one's texts."""
    texts = ["black chess\nqueen", *WORDS[1:], WORDS[2]]
    samples = [{"__key__": str(k), "txt": text, "fr.txt": f"fr {text}"} for k, text in enumerate(texts)]
    for number, part in enumerate((samples[:3], samples[3:])):
        with webdataset.TarWriter(str(tmp_path / f"bank-{number}.tar")) as writer:
            for sample in part:
                writer.write(sample)
    build_index(small_index.parent, tmp_path / "shards", bridge=tmp_path / "bank-*.tar", device="cpu", progress=False)
    build_index(small_index.parent, tmp_path / "words", bridge=words, device="cpu", progress=False)
    by_shards, by_words = (SearchIndex.open(tmp_path / name).about["bridge"] for name in ("shards", "words"))
    assert by_shards["sha256"] == by_words["sha256"] and by_shards["entries"] == len(WORDS)
    lines = [(tmp_path / name / TEXTS).read_text() for name in ("shards", "words")]
    assert lines[0] == lines[1]
    model = Searcher.open(tmp_path / "words", "cpu").embedder.model
    french = read_bank(model, tmp_path / "bank-*.tar", None, None, "cpu", {"text": ["fr.txt"]})
    assert french.texts == tuple(f"fr {text}" for text in WORDS)
    either = read_bank(model, tmp_path / "bank-*.tar", None, None, "cpu", {"text": ["caption", "fr.txt", "txt"]})
    assert either.texts == french.texts  # the first of the members that a sample has
    lines = copy.copy(model)
    lines.modalities = torch.nn.ModuleDict({"text": model.modality("text").by_lines()})
    by_lines = read_bank(lines, tmp_path / "bank-*.tar", None, None, "cpu", {})
    assert by_lines.texts == ("black chess", "queen", *WORDS[1:])
    with webdataset.TarWriter(str(tmp_path / "bad.tar"), encoder=False) as writer:
        writer.write({"__key__": "latin1", "txt": "é".encode("latin-1")})
    refused = {
        "none-*.tar": r"none-\*\.tar",
        "bad.tar": r"shard .*bad\.tar, .*latin1.*: not UTF-8 .*: mend it, or leave it out",
    }
    for name, message in refused.items():
        with pytest.raises(UserError, match=message):
            read_bank(model, tmp_path / name, None, None, "cpu", {})
