"""Files of tensors that no rank holds whole: what safetensors reads, what each rank sends, and who reads what."""

import os
import tempfile
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from mmcontrast.errors import EveryRankError, UserError
from mmcontrast.evaluation import sending
from mmcontrast.evaluation.sending import from_first
from mmcontrast.objectives import contrastive_loss
from mmcontrast.training import checkpoint, tensors
from mmcontrast.training.checkpoint import Contents
from mmcontrast.training.grad_cache import cached_backward
from mmcontrast.training.options import TrainOptions
from mmcontrast.training.parallel import check_placement, in_shards, make_mesh, shard
from mmcontrast.training.saver import Saver
from mmcontrast.training.tensors import TYPES, in_order, read_parts, whole_on_first, write_tensors
from tests.command import call_on_ranks
from tests.training.samples import make_batch, make_model

RANKS = 4
CPU = torch.device("cpu")


def test_a_file_is_what_safetensors_reads(tmp_path):
    """Every type, numbers, empty tensors, other memory formats, names that are not ASCII; numbers are aligned."""
    made = {f"of {kind}": (torch.arange(6) % 2).to(kind).reshape(2, 3) for kind in TYPES}
    made |= {"number": torch.tensor(2.5), "empty": torch.empty(0, 3, dtype=torch.bfloat16), "ü": torch.ones(3, 5).T}
    made["pictures"] = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    file = tmp_path / "x.safetensors"
    write_tensors(file, made, (made[name] for name in in_order(made)), {"start": "of it"})
    theirs = load_file(file)
    assert theirs.keys() == made.keys()
    for name, tensor in made.items():
        assert theirs[name].dtype == tensor.dtype and theirs[name].shape == tensor.shape and torch.equal(theirs[name], tensor)
    with safe_open(file, "pt") as opened:
        assert opened.metadata() == {"start": "of it"}
        types = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    assert types["of torch.bfloat16"] == "BF16" and set(types.values()) == set(TYPES.values())
    save_file({name: tensor.contiguous() for name, tensor in made.items()}, tmp_path / "theirs.safetensors")
    ours = read_parts(tmp_path / "theirs.safetensors", made, None, CPU)
    assert all(torch.equal(ours[name], tensor) for name, tensor in made.items())


def test_a_tree_that_one_process_makes_is_its_own():
    tree = {"a": [torch.ones(2), (1, None)]}
    assert from_first(lambda: tree, None, CPU) is tree


def weights():
    """Tensors whose first dimensions four ranks share evenly, unevenly, and not at all."""
    torch.manual_seed(0)
    shapes = {"even": (8, 3), "uneven": (7, 2), "few": (2, 5), "one": (1,), "wide": (64, 32)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


class Weights(nn.Module):
    def __init__(self, sharded):
        super().__init__()
        for name, value in weights().items():
            self.register_parameter(name, nn.Parameter(value))
        self.register_buffer("counted", torch.tensor(3))
        if sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            fully_shard(self, mesh=init_device_mesh("cpu", (RANKS,)))


def proportional_memory():
    """Bytes of this process, and its share of memory that processes map together; without what it has of the process that it
    was forked from, of which the share changes with every other fork."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    kinds = ("Private_Dirty:", "Pss_Shmem:")
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(kinds))


def check_that_a_machine_has_one_copy(rank, group):
    """Large tensors are in memory once for all ranks; a change is a rank's own; without shared memory each has a copy."""
    size = 2**25
    sending.SHARED_MEMORY = Path(tempfile.mkdtemp(dir=sending.SHARED_MEMORY))

    def make():
        return {"rows": torch.arange(size // 4, dtype=torch.float32), "few": torch.ones(3), "more": [torch.ones(2**19).half()]}

    def total(number):
        numbers = torch.tensor(number, dtype=torch.float64)
        dist.all_reduce(numbers)
        return numbers.item()

    for has_shared_memory in (True, False):
        received = None
        if not has_shared_memory:
            sending._make_file = lambda size: None
        before = total(proportional_memory())
        received = from_first(make, group, CPU, share=True)
        assert received["rows"].sum() == make()["rows"].sum()  # reads all of it
        copies = (total(proportional_memory()) - before) / size  # less what else was given back meanwhile
        assert (0.5 < copies < 1.6) if has_shared_memory else copies > 3.5, copies
        assert torch.equal(received["few"], make()["few"]) and torch.equal(received["more"][0], make()["more"][0])
        assert not list(sending.SHARED_MEMORY.iterdir())
        dist.barrier()
        if rank:
            received["rows"][5] = -rank
        dist.barrier()
        assert received["rows"][5] == (-rank or 5)
    sending.SHARED_MEMORY.rmdir()


def work(rank, folder):
    """Run the checks of this file on every rank."""
    folder = Path(folder)
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        module, group = Weights(True), dist.group.WORLD
        assert all(in_shards(parameter) for parameter in module.parameters())
        sizes = counted(dist, "batch_isend_irecv", lambda exchanges: sum(each.tensor.numel() for each in exchanges))
        whole = counted(dist, "all_gather", lambda *_, **__: 1)
        for beside in (True, False):
            with Saver(folder / f"{beside}", 2, 0, beside, rank, dist.new_group(backend="gloo")) as saver:
                state = module.state_dict()
                shards = {f"exp_avg/{name}": value for name, value in state.items() if in_shards(value)}
                saver.save(1, Contents(state, {}, {"step": 1}, "a: 1", shards, queue={"encoder.wide": state["wide"]}))
                if beside:  # what is written is what there was
                    with torch.no_grad():
                        module.wide.mul_(2)
                saver.wait()
                dist.barrier()
        parts = 1 if rank else RANKS - 1
        assert max(sizes) == parts * 64 * 32 // RANKS, "a rank sends its part of one parameter at a time"
        assert not whole, "no rank but the first has a whole one"

        last = folder / "True" / "step-00000001"
        read = counted(tensors, "_read_own_part", lambda reader, name, example: example.to_local().numel())
        again = Weights(True)
        with torch.no_grad():
            again.wide.zero_()
        checkpoint_parts = read_parts(last / checkpoint.WEIGHTS, again.state_dict(), group, CPU)
        again.load_state_dict(checkpoint_parts)
        assert sum(read) == sum(part.to_local().numel() for part in again.parameters())
        for name, value in weights().items():
            assert torch.equal(getattr(again, name).full_tensor(), value)
        copies = read_parts(last / checkpoint.WEIGHTS, Weights(False).state_dict(), group, CPU)  # as whole copies
        assert all(torch.equal(copies[name], value) for name, value in weights().items())
        other = read_parts(last / checkpoint.WEIGHTS, {"wide": torch.empty(3)}, group, CPU)
        assert other["wide"].is_meta and other["wide"].shape == (64, 32)

        tree = {"b": [torch.arange(3), (torch.tensor(True), "x")], "empty": torch.empty(0), "half": torch.ones(2).bfloat16()}
        received = from_first(lambda: tree if rank == 0 else None, group, CPU)
        assert torch.equal(received["b"][0], tree["b"][0]) and received["b"][1] == (torch.tensor(True), "x")
        assert received["half"].dtype == torch.bfloat16 and received["empty"].shape == (0,)
        with pytest.raises(EveryRankError, match="not here"):
            from_first(refuse, group, CPU)

        check_that_a_machine_has_one_copy(rank, group)
        hashed = counted(checkpoint, "_checksum", lambda file: file.name)
        checkpoint.check(last, group)
        everyone = [None] * RANKS
        dist.all_gather_object(everyone, hashed)
        files = [name for names in everyone for name in names]
        assert len(files) == len(set(files)) == len(checkpoint._files(last)), "each is read by one rank"
        dist.barrier()
        if rank == 0:
            with (last / checkpoint.STATE).open("r+b") as file:
                file.write(b"x")
        dist.barrier()
        with pytest.raises(EveryRankError, match=r"state\.pt is damaged .another checksum.; remove this checkpoint"):
            checkpoint.check(last, group)
    finally:
        dist.destroy_process_group()


class CountedReductions(TorchDispatchMode):
    """Counts reduce-scatters."""

    number = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(of_argument, DTensor) for of_argument in types):
            return NotImplemented
        self.number += "reduce_scatter" in str(function)
        return function(*args, **(kwargs or {}))


def train_small(rank, folder):
    """One step of gradient caching, with weights in shards: of all ranks, of pairs of them, reduced once or by micro-batch."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        torch.set_num_threads(1)
        batch = make_batch(12, seed=rank)
        batch.group_ids += 50 * rank

        def loss_of(embeddings):
            return contrastive_loss(
                embeddings.fields, logit_scale=embeddings.logit_scale, ids=batch.ids, sample_ids=batch.sample_ids,
                group=dist.group.WORLD, communication="ring",  # which reduces nothing itself
            )  # fmt: skip

        results = {}
        for shard_ranks in (None, 2):
            for often in ("micro_batch", "step"):
                options = TrainOptions(steps=1, batch_size=48, parallel="fsdp", shard_ranks=shard_ranks, reduce_gradients=often)
                model = make_model()
                model.towers["own"].requires_grad_(False).eval()
                shard(model, options, CPU)
                torch.manual_seed(rank)
                with CountedReductions() as counted:
                    cached_backward(model, batch, 4, loss_of)
                gradients = {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}
                results[f"{shard_ranks} {often}"] = gradients, counted.number
                whole = {n: whole_on_first(p.detach()) for n, p in model.named_parameters()}
                again = make_model().state_dict()
                assert all(tensor is None if rank else torch.equal(tensor, again[n]) for n, tensor in whole.items())
        gradients, often = results["None micro_batch"]
        assert often > 0 and any("shared" in name for name in gradients)
        for name, (other, count) in results.items():
            assert count == (often // 3 if name.endswith("step") else often), "three micro-batches"
            torch.testing.assert_close(other, gradients, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
        with pytest.raises(UserError, match="train.shard_ranks=3: 4 processes cannot be cut into groups of 3"):
            make_mesh(TrainOptions(steps=1, batch_size=8, shard_ranks=3), CPU)
    finally:
        dist.destroy_process_group()


def test_shards_of_a_node_need_shards():
    with pytest.raises(UserError, match="train.shard_ranks=8: nothing is in shards: set train.parallel: fsdp"):
        check_placement(make_model(), TrainOptions(steps=1, batch_size=8, shard_ranks=8))


@pytest.mark.slow
def test_copies_of_shards_and_one_reduction_a_step(tmp_path):
    call_on_ranks(f"{__name__}:train_small", RANKS, str(tmp_path), timeout=120)


def refuse():
    raise UserError("not here")


def counted(place, name, number):
    """Return a list that grows by what `number` makes of the arguments of each call of a function."""
    function, calls = getattr(place, name), []

    def counting(*arguments, **named):
        calls.append(number(*arguments, **named))
        return function(*arguments, **named)

    setattr(place, name, counting)
    return calls


def test_ranks_save_and_read_one_tensor_at_a_time(tmp_path):
    call_on_ranks(f"{__name__}:work", RANKS, str(tmp_path), timeout=120)
    for beside, factor in ((True, 1), (False, 2)):
        last = tmp_path / f"{beside}" / "step-00000001"
        saved = load_file(last / checkpoint.WEIGHTS)
        assert int(saved["counted"]) == 3 and saved.keys() == {*weights(), "counted"}
        for name, value in weights().items():
            assert torch.equal(saved[name], value * (factor if name == "wide" else 1))
        assert torch.equal(load_file(last / checkpoint.QUEUE)["encoder.wide"], saved["wide"])
        assert {file.name for file in (last / "optimizer").iterdir()} == {".metadata"} | {
            f"__{rank}_0.distcp" for rank in range(RANKS)
        }


def fill(rank, folder):
    """Save where the first rank's disk is full: it says so, and the others are not left waiting."""
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=RANKS)
    try:
        module = Weights(True)
        if rank == 0:

            def full(*_):
                raise OSError(28, os.strerror(28))

            checkpoint.write_tensors = full
        saver = Saver(Path(folder), 2, 0, False, rank, dist.new_group(backend="gloo"))
        contents = Contents(module.state_dict(), {}, {"step": 1}, "a: 1")
        if rank:
            saver.save(1, contents)
        else:
            with pytest.raises(EveryRankError, match="step 1 could not be written .* No space left on device; the earlier"):
                saver.save(1, contents)
        dist.barrier()  # all are here
    finally:
        dist.destroy_process_group()


def test_a_full_disk_of_the_first_rank_leaves_nobody_waiting(tmp_path):
    call_on_ranks(f"{__name__}:fill", RANKS, str(tmp_path), timeout=120)
    assert not [*tmp_path.glob("*step*")]
