"""Real gloo processes: unequal, empty and absent parts give the single-process loss and gradients."""

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from mmcontrast import contrastive_loss

FIELDS = ("a", "b", "c")


def batch(n):
    generator = torch.Generator().manual_seed(3)
    fields = {f: F.normalize(torch.randn(n, 5, generator=generator, dtype=torch.float64), dim=1) for f in FIELDS}
    owner = torch.randint(n // 2 + 1, (n,), generator=generator)
    ids = {f: torch.where(torch.rand(n, generator=generator) < 0.25, -1, owner) for f in FIELDS}
    extra = F.normalize(torch.randn(7, 5, generator=generator, dtype=torch.float64), dim=1)
    return fields, ids, extra


def loss_and_grads(fields, ids, extra, objective, group):
    """The loss, and the gradients by every field, the extra negatives, the scale and the bias."""
    leaves = {f: rows.clone().requires_grad_() for f, rows in fields.items()}
    others = [extra.clone().requires_grad_(), *(torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (20.0, -2.0))]
    loss = contrastive_loss(
        leaves,
        objective=objective,
        ids=ids,
        extra_negatives={"b": others[0]},
        logit_scale=others[1],
        logit_bias=others[2],
        tile_size=3,
        group=group,
    )
    loss.backward()
    unused = [torch.zeros_like(t) if t.grad is None else t.grad for t in others]
    return loss.detach(), [leaf.grad for leaf in leaves.values()], unused


def worker(rank, sizes, port, members, failures):
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=len(sizes), timeout=timedelta(seconds=60)
    )
    group = dist.group.WORLD if members is None else dist.new_group(members)
    members = list(range(len(sizes))) if members is None else members
    if rank in members:
        own = members.index(rank)
        sizes = [sizes[m] for m in members]
        fields, ids, extra = batch(sum(sizes))
        rows = slice(sum(sizes[:own]), sum(sizes[: own + 1]))
        extras = extra.tensor_split(len(sizes))
        for objective in ("infonce", "siglip"):
            for some_ids in (None, ids):
                want, want_rows, (want_extra, *want_scalars) = loss_and_grads(fields, some_ids, extra, objective, None)
                mine = None if some_ids is None else {f: v[rows] for f, v in some_ids.items()}
                got, got_rows, (got_extra, *got_scalars) = loss_and_grads(
                    {f: v[rows] for f, v in fields.items()}, mine, extras[own], objective, group
                )
                mean = torch.stack([got, *got_scalars])  # what data parallelism averages over the ranks
                dist.all_reduce(mean, group=group)
                mean /= len(sizes)
                expected = [want, *want_scalars, *(g[rows] for g in want_rows), want_extra.tensor_split(len(sizes))[own]]
                # the rows' gradients are of the sum of all ranks' losses, W times the mean's
                found = [*mean, *(g / len(sizes) for g in got_rows), got_extra / len(sizes)]
                for a, b in zip(found, expected, strict=True):
                    if not torch.allclose(a, b, rtol=1e-10, atol=1e-10):
                        failures.put(f"rank {rank} {objective} ids={some_ids is not None}: {a} is not {b}")
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("sizes", [(12,), (5, 1), (5, 1, 6), (5, 0, 6), (1, 0, 0), (2, 5, 1, 4)], ids=str)
def test_ranks_together_are_one_process(sizes):
    run(sizes, None)


def test_a_group_other_than_the_world():
    run((3, 2, 4), [0, 2])


def run(sizes, members):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    failures = mp.get_context("spawn").SimpleQueue()
    mp.spawn(worker, (sizes, port, members, failures), nprocs=len(sizes))
    assert failures.empty(), failures.get()
