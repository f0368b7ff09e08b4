"""Vectors: every type of numpy's is a vector of float32, or a bad sample."""

import io

import numpy as np
import pytest
import torch

from mmcontrast.data import ShardDataset, write_shard
from mmcontrast.modalities import DecodeError, VectorModality


def saved(array):
    target = io.BytesIO()
    np.save(target, array, allow_pickle=True)
    return target.getvalue()


@pytest.mark.parametrize(
    "kind", ["?", "i1", "u1", "<i2", ">u2", "i4", "i8", "u8", "<f2", ">f2", "f4", ">f4", "f8", "longdouble"]
)
def test_real_numbers_of_any_type(kind):
    array = np.array([0, 1, 1, 0], dtype=kind)
    found = VectorModality(4).decode(saved(array))
    assert found.dtype == torch.float32 and found.tolist() == [0, 1, 1, 0]
    assert VectorModality(4).decode(saved(array[::-1])).tolist() == [0, 1, 1, 0]


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([0, np.nan, 1, np.nan]), "component 1 is nan, 2 of 4 are no finite float32"),
        (np.array([0, 1, -np.inf, 1], dtype="f2"), "component 2 is -inf, 1 of 4"),
        (np.array([1e300, 0, 0, 0]), "component 0 is 1e\\+300, 1 of 4"),
        (np.array([1, 0, 0, 1j]), "its type is complex128"),
        (np.zeros(4, dtype="c8"), "its type is complex64"),
        (np.array(["1", "2", "3", "4"]), "its type is <U1"),
        (np.array([b"1", b"2", b"3", b"4"]), r"its type is \|S1"),
        (np.zeros(4, dtype="M8[s]"), r"its type is datetime64\[s\]"),
        (np.zeros(4, dtype="m8[s]"), r"its type is timedelta64\[s\]"),
        (np.zeros(4, dtype=[("x", "f4"), ("y", "f4")]), "its type is .*'x'"),
        (np.zeros(4, dtype="V2"), r"its type is \|V2"),
        (np.array([1, "a", None, {}], dtype=object), "not an array of numbers"),
        (np.zeros((1, 4)), r"shape \(1, 4\) where width=4"),
        (np.float32(1), r"shape \(\) where width=4"),
    ],
)
def test_what_is_no_vector(array, message):
    with pytest.raises(DecodeError, match=message):
        VectorModality(4).decode(saved(array))


def test_archives_and_tensors():
    target = io.BytesIO()
    np.savez(target, a=np.zeros(4))
    with pytest.raises(DecodeError, match="an archive of arrays"):
        VectorModality(4).decode(target.getvalue())
    given = torch.nn.Parameter(torch.tensor([1.0, 2, 3, 4], dtype=torch.bfloat16))
    assert VectorModality(4).encode(given).tolist() == [1, 2, 3, 4]
    with pytest.raises(DecodeError, match="component 0 is nan"):
        VectorModality(1).encode([float("nan")])


def test_a_vector_that_is_not_finite_is_a_bad_sample(tmp_path):
    """In training another stands in its place, and it is listed."""
    vectors = [[1.0, 2.0], [np.nan, 0.0], [3.0, 4.0], [np.inf, 0.0], np.array([1j, 0])]
    samples = [{"__key__": f"s{k}", "npy": saved(np.asarray(vector))} for k, vector in enumerate(vectors)]
    write_shard(tmp_path / "0.tar", samples)
    dataset = ShardDataset(str(tmp_path / "0.tar"), {"vector": VectorModality(2)}, {}, training=True)
    batch = dataset.collate([dataset[(0, position)] for position in range(5)])
    assert torch.isfinite(batch.values["vector"]).all() and len(batch.replaced) >= 3
    told = " ".join(bad["error"] for bad in batch.replaced)
    for key, why in (("s1", "component 0 is nan"), ("s3", "component 0 is inf"), ("s4", "complex128")):
        assert key in told and why in told
