"""Gradient caching equals a pass that keeps the graph of the same micro-batches: three fields, dropout, 1 and 2 ranks."""

from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmcontrast import contrastive_loss
from mmcontrast.modalities import VectorModality
from mmcontrast.models import ContrastiveModel, Embeddings, TimmTower
from mmcontrast.objectives import OBJECTIVES, GlobalContrastive
from mmcontrast.training.grad_cache import batch_norms, cached_backward
from mmcontrast.training.optim import freeze
from mmcontrast.training.parallel import batches_counted, same_statistics
from tests.command import call_on_ranks, free_port
from tests.training.samples import FIELDS, make_batch, make_model

CASES = [(objective, pairing) for objective in sorted(OBJECTIVES) for pairing in ("all_pairs", "multilinear")]
CASES = [case for case in CASES if case not in (("multi_positive", "multilinear"), ("hybrid", "multilinear"))]
CASES.remove(("distillation", "multilinear"))


def loss_of(batch, objective, pairing, group=None):
    scorer = GlobalContrastive(temperature="individual") if objective == "global" else objective
    generator = torch.Generator().manual_seed(5)
    teacher = {f: torch.randn(len(batch.sample_ids), 6, generator=generator, dtype=torch.float64) for f in FIELDS}

    def loss(embeddings):
        return contrastive_loss(
            embeddings.fields,
            objective=scorer,
            pairing=pairing,
            logit_scale=embeddings.logit_scale,
            logit_bias=embeddings.logit_bias,
            ids=batch.ids,
            sample_ids=batch.sample_ids,
            teacher=teacher if objective == "distillation" else None,
            group=group,
        )

    return loss


def graph_keeping(model, batch, size):
    """The embeddings of all micro-batches, with their graph."""
    parts = [model(part) for part in batch.split(size)]
    fields = {f: torch.cat([part.fields[f] for part in parts]) for f in parts[0].fields}
    return Embeddings(fields, parts[-1].logit_scale, parts[-1].logit_bias)


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(("objective", "pairing"), CASES)
@pytest.mark.parametrize("size", [4, 5, 64])
def test_it_equals_a_pass_that_keeps_the_graph(objective, pairing, size):
    batch, kept, cached = make_batch(18), make_model(), make_model()
    torch.manual_seed(2)
    want = loss_of(batch, objective, pairing)(graph_keeping(kept, batch, size))
    want.backward()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    got, embeddings = cached_backward(cached, batch, size, loss_of(batch, objective, pairing))
    assert got == want and set(embeddings.fields) == set(FIELDS) and not got.requires_grad
    torch.testing.assert_close(gradients(cached), gradients(kept), rtol=1e-12, atol=1e-14)
    if pairing != "multilinear":  # which draws
        assert torch.equal(torch.get_rng_state(), state), "the next step's random numbers are those of a plain pass"


def test_without_replay_it_would_differ(monkeypatch):
    """So that the test above sees the dropout."""
    batch, kept, cached = make_batch(18), make_model(), make_model()
    loss_of(batch, "infonce", "all_pairs")(graph_keeping(kept, batch, 4)).backward()
    monkeypatch.setattr("mmcontrast.training.grad_cache._set_random_state", lambda *_: None)
    cached_backward(cached, batch, 4, loss_of(batch, "infonce", "all_pairs"))
    grads = gradients(cached), gradients(kept)
    assert not torch.allclose(grads[0]["projections.own.weight"], grads[1]["projections.own.weight"], rtol=1e-3)


class Timm(TimmTower):
    """Patch dropout, drop path and dropout at once, on vectors of 6 as pictures."""

    def __init__(self):
        rates = {"drop_path_rate": 0.3, "patch_drop_rate": 0.3, "proj_drop_rate": 0.1}
        size = {"img_size": 16, "patch_size": 4, "in_chans": 1, "embed_dim": 24, "depth": 2, "num_heads": 2}
        super().__init__("vit_tiny_patch16_224", **size, **rates)

    def forward(self, batch):
        return super().forward(batch.repeat(1, 43)[:, :256].view(-1, 1, 16, 16))


@pytest.mark.parametrize("precision", ["float64", "bfloat16"])
def test_drop_path_and_patch_dropout_are_replayed(precision):
    def run(cache):
        torch.manual_seed(1)
        modalities = {f: VectorModality(6) for f in FIELDS}
        model = ContrastiveModel(modalities, {"t": Timm()}, dict.fromkeys(FIELDS, "t"), 5)
        model = model.double() if precision == "float64" else model
        batch = make_batch(18)
        batch.values = {f: rows.to(next(model.parameters()).dtype) for f, rows in batch.values.items()}
        plain = model.forward

        def forward(part):  # as accelerate wraps it
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
                return plain(part)

        model.forward = forward
        torch.manual_seed(2)
        loss = loss_of(batch, "infonce", "all_pairs")
        if cache:
            cached_backward(model, batch, 4, loss)
        else:
            loss(graph_keeping(model, batch, 4)).backward()
        return gradients(model)

    tolerance = {"rtol": 1e-12, "atol": 1e-14} if precision == "float64" else {"rtol": 2e-2, "atol": 2e-3}
    torch.testing.assert_close(run(cache=True), run(cache=False), **tolerance)


def test_scales_of_pairs_get_their_gradients():
    batch, kept, cached = make_batch(12), make_model(scale_per_pair=True).eval(), make_model(scale_per_pair=True).eval()
    loss_of(batch, "infonce", "all_pairs")(kept(batch)).backward()
    cached_backward(cached, batch, 5, loss_of(batch, "infonce", "all_pairs"))
    torch.testing.assert_close(gradients(cached), gradients(kept), rtol=1e-12, atol=1e-14)
    assert len(set(cached.log_logit_scale.grad.tolist())) == 3


def test_batch_norms_count_a_micro_batch_once():
    batch, kept, cached = make_batch(8), make_model(nn.BatchNorm1d), make_model(nn.BatchNorm1d)
    torch.manual_seed(2)
    graph_keeping(kept, batch, 4)
    torch.manual_seed(2)
    cached_backward(cached, batch, 4, loss_of(batch, "infonce", "all_pairs"))
    torch.testing.assert_close(dict(cached.named_buffers()), dict(kept.named_buffers()))
    assert batch_norms(cached) == ["towers.shared.network.1", "towers.own.network.1"]
    assert not batch_norms(make_model())


def test_saved_activations_do_not_grow_with_the_batch():
    """Bytes saved for the backward of the towers, at their highest, for batches of 32 to 512 in micro-batches of 16."""

    def peak(n, size):
        live, highest = 0, 0

        class Saved:
            def __init__(self, tensor):
                nonlocal live, highest
                self.tensor, self.bytes = tensor, tensor.nbytes
                live += self.bytes
                highest = max(highest, live)

            def __del__(self):
                nonlocal live
                live -= self.bytes

        model, batch = make_model(), make_batch(n)
        loss = loss_of(batch, "infonce", "all_pairs")

        def outside(embeddings):  # the loss's own O(N·D) apart
            with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
                return loss(embeddings)

        with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
            cached_backward(model, batch, size or n, outside)
        return highest

    small, large, uncut = peak(32, 16), peak(512, 16), peak(512, None)
    assert large < 1.3 * small, "absences differ between micro-batches, nothing else does"
    assert uncut > 10 * large


def check_statistics(rank, size):
    """Rank 0 lacks `b`, which has a tower of its own; `a` and `c` share one."""
    parts = [make_batch(12, seed=k) for k in (0, 1)]
    parts[0].present["b"][:] = False
    parts[0].values["b"] = torch.full((1, 6), 50.0).double()
    model, alone = make_model(nn.BatchNorm1d), [make_model(nn.BatchNorm1d) for _ in parts]
    before, called = batches_counted(model), DistributedDataParallel(model, broadcast_buffers=False)
    for one, part in zip(alone, parts, strict=True):
        graph_keeping(one, part, size or 12)
    loss = loss_of(parts[rank], "infonce", "all_pairs", dist.group.WORLD)
    if size:
        cached_backward(called, parts[rank], size, loss)
    else:
        loss(called(parts[rank])).backward()
    same_statistics(model, before)
    assert all(parameter.grad is not None for parameter in model.parameters())
    for name, found in model.named_buffers():
        ours = [dict(one.named_buffers())[name] for one in alone]
        if name.startswith("towers.own"):
            untouched = 0 if name.endswith("tracked") else float(name.endswith("var"))
            assert (ours[0] == untouched).all(), "nothing is learnt of what nobody has"
            torch.testing.assert_close(found, ours[1], rtol=1e-6, atol=1e-6)
        elif found.is_floating_point():
            torch.testing.assert_close(found, (ours[0] + ours[1]) / 2, rtol=1e-6, atol=1e-6)


def worker(rank, port):
    try:
        torch.set_num_threads(1)
        method = f"tcp://127.0.0.1:{port}"
        dist.init_process_group("gloo", init_method=method, rank=rank, world_size=2, timeout=timedelta(seconds=600))
        batch = make_batch((13, 7)[rank], seed=rank)
        batch.group_ids += 50 * rank
        for objective, pairing in CASES:
            loss, kept, reduced = loss_of(batch, objective, pairing, dist.group.WORLD), make_model(), []
            torch.manual_seed(rank)
            want = loss(graph_keeping(kept, batch, 4))
            want.backward()
            for parameter in kept.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= 2
            cached = DistributedDataParallel(make_model())

            def count(_, bucket, reduced=reduced):
                reduced.append(bucket.index())
                buffer = bucket.buffer() / 2
                return dist.all_reduce(buffer, async_op=True).get_future().then(lambda future: future.value()[0])

            cached.register_comm_hook(None, count)
            torch.manual_seed(rank)
            got, _ = cached_backward(cached, batch, 4, loss_of(batch, objective, pairing, dist.group.WORLD))
            torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-14)
            torch.testing.assert_close(gradients(cached.module), gradients(kept), rtol=1e-12, atol=1e-14)
            assert reduced == [0], f"buckets reduced: {reduced}, for {objective} {pairing}"
        for size in (None, 4):
            check_statistics(rank, size)
    finally:
        dist.destroy_process_group()


def test_on_two_ranks_with_one_all_reduce():
    """Parts of 13 and 7 samples, so of 4 and 2 micro-batches."""
    call_on_ranks(f"{__name__}:worker", 2, free_port())


@pytest.mark.parametrize("projection", ["learns", "is locked too"])
def test_a_locked_tower_embeds_once(projection):
    """The gradient is that of a pass that keeps the graph."""
    batch, models = make_batch(18), [make_model(), make_model()]
    runs = {"shared": 0, "own": 0}
    for model in models:
        patterns = {"towers.own.*": None} | ({"projections.own.*": None} if projection == "is locked too" else {})
        freeze(model, patterns)
        assert model.is_locked("own") and not model.is_locked("shared")
        model.train()
        for name, tower in model.towers.items():
            tower.register_forward_hook(lambda *_, name=name: runs.update({name: runs[name] + 1}))
    loss = loss_of(batch, "infonce", "all_pairs")
    torch.manual_seed(0)
    want = loss(graph_keeping(models[0], batch, 4))
    want.backward()
    parts = len(batch.split(4))
    assert runs == {"shared": 2 * parts, "own": parts}
    torch.manual_seed(0)
    got, _ = cached_backward(models[1], batch, 4, loss)
    assert runs == {"shared": 2 * parts + 4 * parts, "own": 2 * parts}, "the tower that learns twice, the locked one once"
    torch.testing.assert_close(got, want.detach(), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(gradients(models[1]), gradients(models[0]), rtol=1e-12, atol=1e-14)
    assert (models[1].projections["own"].weight.grad is None) == (projection == "is locked too")


class Drawing(nn.Module):
    def forward(self, features):
        return features + torch.rand_like(features)


def test_what_a_locked_tower_draws_is_not_taken_from_the_others():
    """A tower that draws random numbers in evaluation mode too: those of the second pass are those of the first."""
    batch, model = make_batch(12), make_model()
    model.towers["own"].network.append(Drawing())
    freeze(model, {"towers.own.*": None})
    seen = []
    model.towers["shared"].register_forward_hook(lambda _, __, features: seen.append(features.detach()))
    cached_backward(model, batch, 4, loss_of(batch, "infonce", "all_pairs"))
    first, second = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
