"""A small model with dropout, and batches of vectors whose samples lack fields."""

import torch
from torch import nn

from mmcontrast.modalities import VectorModality
from mmcontrast.models import ContrastiveModel, Tower
from mmcontrast.types import Batch

FIELDS = "abc"


class DropoutTower(Tower):
    def __init__(self, norm=nn.LayerNorm):
        super().__init__()
        self.width = 8
        self.network = nn.Sequential(nn.Linear(6, 32), norm(32), nn.GELU(), nn.Dropout(0.3), nn.Linear(32, 8), nn.Dropout(0.1))


def make_model(norm=nn.LayerNorm, **options):
    torch.manual_seed(1)
    towers = {"shared": DropoutTower(norm), "own": DropoutTower(norm)}
    modalities = {f: VectorModality(6) for f in FIELDS}
    tower_of = {"a": "shared", "b": "own", "c": "shared"}
    return ContrastiveModel(modalities, towers, tower_of, 5, logit_bias=-1.0, **options).double()


def make_batch(n, seed=0):
    """Samples that lack fields; nobody of the third micro-batch of 4 has `c`."""
    generator = torch.Generator().manual_seed(seed)
    present = {f: torch.rand(n, generator=generator) < 0.8 for f in FIELDS}
    present["c"][8:12] = False
    rows = {f: torch.randn(int(here.sum()), 6, generator=generator).double() for f, here in present.items()}
    groups = torch.randint(n, (n,), generator=generator)
    return Batch(rows, present, torch.arange(n) + 100 * seed, groups, [{}] * n)
