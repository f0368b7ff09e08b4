"""What a teacher reads beside the model: stored embeddings, and members of which some are missing."""

import re

import numpy as np
import pytest
import torch

from mmcontrast.data import (
    MixtureDataset,
    ShardDataset,
    StoredEmbeddings,
    StreamDataset,
    StreamOrder,
    TeacherView,
    training_batches,
    write_shard,
)
from mmcontrast.errors import UserError
from mmcontrast.modalities import TextModality, VectorModality
from tests.training.teaching import npy

TEXT = {"text": TextModality(context_length=12, captions="lines"), "vector": VectorModality(2)}


def view():
    return TeacherView({"text": StoredEmbeddings(), "vector": VectorModality(2)}, {"text": "teacher.npy"})


def write(path, *arrays, lines=4):
    text = "\n".join(f"line {k}" for k in range(lines))
    samples = []
    for k, array in enumerate(arrays):
        stored = {} if array is None else {"teacher.npy": array if isinstance(array, bytes) else npy(array)}
        samples.append({"__key__": f"s{k}", "txt": text, "npy": npy([k, 1]), "json": {"sample_id": k}, **stored})
    write_shard(path, samples)
    return ShardDataset(str(path), TEXT, {"text": ["txt"], "vector": ["npy"]}, seed=3, training=True, views=[view()])


def test_the_row_of_a_text_is_that_of_the_line_which_was_drawn(tmp_path):
    rows = np.random.default_rng(0).normal(size=(4, 3))
    data = write(tmp_path / "a.tar", rows, rows)
    unit, tokens = torch.nn.functional.normalize(torch.tensor(rows).float()), TEXT["text"].tokens
    plain = ShardDataset(str(tmp_path / "a.tar"), TEXT, {"text": ["txt"], "vector": ["npy"]}, seed=3, training=True)
    seen = set()
    for epoch in range(12):
        sample = data[epoch, 1]
        (line,) = [k for k in range(4) if torch.equal(sample.values["text"], tokens(f"line {k}"))]
        assert torch.equal(sample.views[0]["text"], unit[line])
        assert torch.equal(sample.values["text"], plain[epoch, 1].values["text"]), "the model draws as without a teacher"
        seen.add(line)
    assert len(seen) > 1
    batch = data.collate([data[0, 0], data[0, 1]])
    assert batch.views[0].values["text"].shape == (2, 3) and torch.equal(
        batch.views[0].values["vector"], batch.values["vector"]
    )
    for part, split in zip(batch.deal(2), batch.split(1), strict=True):
        assert torch.equal(part.views[0].values["text"], split.views[0].values["text"])
    assert not batch.labels().views and torch.equal(batch.weights, torch.ones(2))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (None, "member .teacher.npy: is missing, and train.teacher reads it"),
        (np.ones((3, 3)), "3 embeddings of a text of 4 lines: store one for each, or one"),
        (np.ones(4), "embeddings of 4 numbers, where the first sample has 3"),
        (np.zeros(3), "an embedding of zeros, which has no direction"),
        (np.ones((2, 2, 3)), r"an array of shape \(2, 2, 3\)"),
        (np.ones(0), r"an array of shape"),
        ([np.nan, 1, 1], "component 0 is nan"),
        (b"not an array", "not an array of numbers"),
    ],
)
def test_a_sample_without_the_teachers_member_is_a_bad_one(tmp_path, bad, message):
    data = write(tmp_path / "a.tar", np.ones(3), bad, np.ones((4, 3)))
    sample = data[0, 1]
    assert len(sample.replaces) >= 1 and not sample.error
    error = sample.replaces[0]["error"]
    assert "a.tar" in error and "sample 's1'" in error
    assert re.search(message, error), error


def test_a_sample_that_lacks_the_field_needs_none(tmp_path):
    write_shard(
        tmp_path / "a.tar", [{"__key__": "a", "npy": npy([1, 2])}, {"__key__": "b", "txt": "b", "teacher.npy": npy([3, 4])}]
    )
    keys = {"text": ["txt"], "vector": ["npy"]}
    data = ShardDataset(str(tmp_path / "a.tar"), TEXT, keys, training=True, views=[view()])
    (read,) = data.collate([data[0, 0], data[0, 1]]).views
    assert read.present["text"].tolist() == [False, True] and read.present["vector"].tolist() == [True, False]
    torch.testing.assert_close(read.values["text"], torch.tensor([[0.6, 0.8]]))
    (nobody,) = data.collate([data[0, 0]]).views
    assert nobody.values["text"].shape == (1, 2), "as wide as those of other ranks"


def test_embeddings_in_json_and_in_several_sources(tmp_path):
    for name in "xy":
        about = [{"sample_id": k, "e": [1.0, k]} for k in range(3)]
        write_shard(tmp_path / f"{name}.tar", [{"__key__": f"{k}", "txt": "a", "json": one} for k, one in enumerate(about)])
    text, views = {"text": TextModality(context_length=12)}, [TeacherView({"text": StoredEmbeddings()}, {"text": "json:e"})]
    sources = {name: ShardDataset(str(tmp_path / f"{name}.tar"), text, {}, 0, True, True, views=views) for name in "xy"}
    data = MixtureDataset(sources, text, ["y"], views)
    (read,) = data.collate([data[0, k] for k in (1, 5)]).views
    torch.testing.assert_close(read.values["text"], torch.nn.functional.normalize(torch.tensor([[1.0, 1.0], [1.0, 2.0]])))
    other = [TeacherView({"text": StoredEmbeddings()}, {"text": "json:f"})]
    with pytest.raises(UserError, match=r"train.teacher: no sample of .*x.tar has a member .json:f"):
        ShardDataset(str(tmp_path / "x.tar"), text, {}, training=True, views=other)


def test_a_stream_has_views_too(tmp_path):
    """Of the same members by another modality, in a worker."""
    write_shard(tmp_path / "a.tar", [{"__key__": f"{k}", "txt": f"{k} one\n{k} two"} for k in range(8)])
    lines, own = TextModality(context_length=12, captions="lines"), TextModality(context_length=3)
    data = StreamDataset(str(tmp_path / "a.tar"), {"text": lines}, {}, 0, [TeacherView({"text": own})])
    texts = [f"{k} {word}" for k in range(8) for word in ("one", "two")]
    for batch in training_batches(data, StreamOrder(8, 0), range(3), rank=0, world_size=1, num_workers=1, pin_memory=False):
        for row, read in zip(batch.values["text"], batch.views[0].values["text"], strict=True):
            (text,) = [text for text in texts if lines.tokens(text).tolist() == row.tolist()]
            assert read.tolist() == own.tokens(text).tolist() and len(read) == 3
