"""A queue of past embeddings from a momentum encoder: more negatives than a batch has, for any objective."""

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mmcontrast.models import ContrastiveModel
from mmcontrast.score.ranks import exchange, gather_rows
from mmcontrast.training.optim import update_average
from mmcontrast.types import ABSENT, Batch


class MomentumQueue(nn.Module):
    """A queue of the last embeddings of every field, by an encoder whose weights follow the model's slowly (MoCo,
    arXiv:1911.05722; v2, 2003.04297). They carry their group ids, so an anchor's own group is never its negative. Positives
    come from the model.

    The queue is the same on every rank; each rank contributes its share of the rows, which are negatives of all ranks' anchors.

    Args:
        model: the encoder starts as its copy, in evaluation mode: no dropout, fixed batch norms.
        fields: those of the model's that are queued.
        size: the number of rows of each field.
        momentum: m of encoder ← m · encoder + (1 − m) · model, a step.
    """

    def __init__(self, model: ContrastiveModel, fields: list[str], size: int, momentum: float) -> None:
        super().__init__()
        self.encoder = copy.deepcopy(model).requires_grad_(False).eval()
        self.encoder.modalities.train()  # pictures are as large as the model's at every step
        self.fields, self.size, self.momentum = list(fields), size, momentum
        for field in self.fields:
            self.register_buffer(f"{field}_rows", torch.zeros(size, model.embed_dim))
            self.register_buffer(f"{field}_ids", torch.full((size,), ABSENT))
            self.register_buffer(f"{field}_pushed", torch.zeros((), dtype=torch.int64))

    def negatives(self, rank: int = 0, world_size: int = 1) -> dict[str, tuple[Tensor, Tensor]]:
        """Return a rank's share of the queue: per field, rows [K, D] and group ids [K]."""
        negatives = {}
        for field in self.fields:
            share = slice(rank, min(int(self.get_buffer(f"{field}_pushed")), self.size), world_size)
            rows, ids = self.get_buffer(f"{field}_rows"), self.get_buffer(f"{field}_ids")
            negatives[field] = rows[share].clone(), ids[share].clone()
        return negatives

    def update_encoder(self, model: nn.Module, momentum: float | None = None) -> None:
        """Move the encoder's weights towards a model's, and copy running statistics."""
        update_average(self.encoder, model, self.momentum if momentum is None else momentum)

    @torch.no_grad()
    def push(self, batch: Batch, micro_batch_size: int | None, device: torch.device, group: dist.ProcessGroup | None) -> None:
        """Embed a batch, and put all ranks' embeddings in place of the oldest rows."""
        parts = [self.encoder(part.to(device)).fields for part in batch.split(micro_batch_size or len(batch))]
        sizes = [size for (size,) in exchange([len(batch)], group, device)]
        for field in self.fields:
            rows = gather_rows(torch.cat([part[field] for part in parts]), group, sizes)
            ids = gather_rows(batch.ids[field].to(device), group, sizes)
            rows, ids = rows[ids != ABSENT][-self.size :], ids[ids != ABSENT][-self.size :]
            pushed = self.get_buffer(f"{field}_pushed")
            slots = (pushed + torch.arange(len(rows), device=device)) % self.size
            self.get_buffer(f"{field}_rows")[slots] = rows.to(self.get_buffer(f"{field}_rows").dtype)
            self.get_buffer(f"{field}_ids")[slots] = ids
            pushed += len(rows)
