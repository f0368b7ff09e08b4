"""Parts of a batch: as equal as can be, of any samples, with the rows of those that have a field."""

import pytest
import torch

from mmcontrast.types import Batch


def make(n):
    generator = torch.Generator().manual_seed(n)
    present = {"all": torch.ones(n, dtype=torch.bool), "some": torch.rand(n, generator=generator) < 0.5}
    present["none"] = torch.zeros(n, dtype=torch.bool)
    ids = torch.arange(n) * 10
    rows = {field: (ids[here] if here.any() else torch.tensor([-7])).unsqueeze(1) for field, here in present.items()}
    return Batch(rows, present, ids, ids + 1, [{"key": str(k)} for k in range(n)])


def check(part):
    for field, here in part.present.items():
        rows = part.values[field].squeeze(1)
        assert torch.equal(rows, part.sample_ids[here]) if here.any() else len(rows) == 1
    assert torch.equal(part.group_ids, part.sample_ids + 1)
    assert [int(entry["key"]) * 10 for entry in part.metadata] == part.sample_ids.tolist()


@pytest.mark.parametrize("n", [1, 2, 7, 17, 24])
@pytest.mark.parametrize("size", [1, 2, 4, 5, 100])
def test_parts_are_as_equal_as_can_be(n, size):
    parts = make(n).split(size)
    sizes = [len(part) for part in parts]
    assert sum(sizes) == n and max(sizes) <= size and max(sizes) - min(sizes) <= 1 and len(sizes) == -(-n // size)
    assert torch.cat([part.sample_ids for part in parts]).tolist() == make(n).sample_ids.tolist()
    for part in parts:
        check(part)


@pytest.mark.parametrize("number", [1, 2, 3, 6])
def test_what_is_dealt_is_the_same_on_any_number_of_ranks(number):
    whole = make(24).deal(number)
    for part in whole:
        check(part)
    for ranks in (2, 4):
        size = 24 // ranks
        if size % number:
            continue
        dealt = [share.deal(number) for share in make(24).split(size)]
        for k, part in enumerate(whole):
            assert torch.cat([parts[k].sample_ids for parts in dealt]).tolist() == part.sample_ids.tolist()


def test_one_part_is_the_batch_itself():
    """Its memory stays pinned: a copy of it would be a slow way to a card."""
    batch = make(24)
    assert batch.deal(1) == [batch] and batch.deal(1)[0] is batch
    assert all(
        a.data_ptr() == b.data_ptr() for a, b in zip(batch.split(24)[0].values.values(), batch.values.values(), strict=True)
    )
