"""Defines our losses and their peers' as functions of the same four tensors, and the measurements that benchmarks share."""

import inspect
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcontrast import contrastive_loss, score_statistics
from mmcontrast.score import LogSumExp

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
SCALE = 50.0  # of all inputs, for losses that take it as a number


def ours(objective: str, backend: str = "auto") -> Loss:
    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        shift = bias if objective == "siglip" else None
        embeddings = {"image": x, "text": y}
        return contrastive_loss(
            embeddings, objective=objective, logit_scale=scale, logit_bias=shift, backend=backend, group=dist.group.WORLD
        )  # fmt: skip

    return loss


def ours_lit(backend: str = "auto") -> Loss:
    """InfoNCE of one direction; the candidates' tower is locked (LiT, arXiv:2111.07991)."""
    reduction = LogSumExp(over="all")

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        rows, _ = score_statistics(x, y.detach(), [reduction], scale=scale, columns=False, backend=backend)
        return (rows[reduction] - rows.positives).mean()

    return loss


def prefixes(dim: int) -> tuple[int, ...]:
    """Return the widths of Matryoshka embeddings: about a quarter, a half, and all of it."""
    return (*(dim * quarters // 4 // 64 * 64 or dim // (4 // quarters) for quarters in (1, 2)), dim)


def ours_matryoshka(backend: str = "auto") -> Loss:
    """Return the sum of InfoNCE over prefixes of the embeddings (Matryoshka, arXiv:2205.13147)."""
    infonce = ours("infonce", backend)

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        parts = [(F.normalize(x[:, :width], dim=1), F.normalize(y[:, :width], dim=1)) for width in prefixes(x.shape[1])]
        return torch.stack([infonce(a, b, scale, bias) for a, b in parts]).sum()

    return loss


def clip_loss() -> Loss:
    from open_clip.loss import ClipLoss

    return lambda x, y, scale, bias: ClipLoss()(x, y, scale)


def siglip_loss() -> Loss:
    from open_clip.loss import SigLipLoss

    return lambda x, y, scale, bias: SigLipLoss()(x, y, scale, bias)


def chunked_siglip_loss() -> Loss:
    from open_clip.loss import SigLipLoss

    if "chunk_size" not in inspect.signature(SigLipLoss.__init__).parameters:
        raise ImportError("this open_clip's SigLipLoss has no chunk_size")
    return lambda x, y, scale, bias: SigLipLoss(chunk_size=1024)(x, y, scale, bias)


def grad_cache() -> Loss:
    """Return GradCache's loss, which has one direction alone."""
    from grad_cache.loss import SimpleContrastiveLoss

    return lambda x, y, scale, bias: SimpleContrastiveLoss()(x * scale, y)


def sentence_transformers() -> Loss:
    """Both directions, 1,024 rows at a time; it goes backward itself."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction", "mini_batch_size": 1024}
    loss = CachedMultipleNegativesRankingLoss(torch.nn.Sequential(torch.nn.Identity()), scale=SCALE, **options)
    return lambda x, y, scale, bias: loss.calculate_loss([[x], [y]], with_backward=True)


def inf_cl() -> Loss:
    """Both directions of its kernel on one GPU, in fp32 (widths that are multiples of 128)."""
    from inf_cl import cal_flash_loss

    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        slices = {"head_dim": 256 if x.shape[1] % 256 == 0 else 128}
        return (cal_flash_loss(x, y, scale=scale, **slices) + cal_flash_loss(y, x, scale=scale, **slices)).mean() / 2

    return loss


def memeff_clip() -> Loss:
    """Triton kernels on one GPU; the scale is a number, without a gradient."""
    from memeff import MemoryEfficientCLIPLoss

    loss = MemoryEfficientCLIPLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return lambda x, y, scale, bias: loss(x, y)


def memeff_lit() -> Loss:
    from memeff import MemoryEfficientLiTLoss

    loss = MemoryEfficientLiTLoss(temperature=1 / SCALE, normalized_inputs=True, stable=False)
    return lambda x, y, scale, bias: loss(x, y)


def memeff_matryoshka() -> Loss:
    from memeff import MemoryEfficientMatryoshkaCLIPLoss

    options = {"temperature": 1 / SCALE, "normalized_inputs": True, "stable": False}
    return lambda x, y, scale, bias: MemoryEfficientMatryoshkaCLIPLoss(prefixes(x.shape[1]), **options)(x, y)


OURS = {objective: ours(objective) for objective in ("infonce", "siglip")}
FORMS: dict[str, Callable[..., Loss]] = {  # by what is computed; each takes the name of a backend
    **{objective: partial(ours, objective) for objective in OURS},
    "lit": ours_lit,
    "matryoshka": ours_matryoshka,
}
PEERS: dict[str, tuple[str, Callable[[], Loss]]] = {  # by name: the objective it computes, how to load it
    "open_clip ClipLoss": ("infonce", clip_loss),
    "open_clip SigLipLoss": ("siglip", siglip_loss),
    "open_clip SigLipLoss, chunked": ("siglip", chunked_siglip_loss),
    "GradCache SimpleContrastiveLoss": ("infonce", grad_cache),
    "sentence-transformers CachedMultipleNegativesRankingLoss": ("infonce", sentence_transformers),
    "Inf-CL cal_flash_loss": ("infonce", inf_cl),
    "memeff MemoryEfficientCLIPLoss": ("infonce", memeff_clip),
    "memeff MemoryEfficientLiTLoss": ("lit", memeff_lit),
    "memeff MemoryEfficientMatryoshkaCLIPLoss": ("matryoshka", memeff_matryoshka),
}
ON_GPUS = ("Inf-CL", "memeff")  # peers that begin so have no other kernels


def inputs(n: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Unit rows, and a scale and bias as in the middle of training."""
    generator = torch.Generator(device).manual_seed(0)
    rows = [F.normalize(torch.randn(n, dim, generator=generator, device=device), dim=1).to(dtype) for _ in range(2)]
    return [t.requires_grad_() for t in (*rows, torch.tensor(SCALE, device=device), torch.tensor(-10.0, device=device))]


def run(loss: Loss, leaves: list[Tensor]) -> float:
    """Return the seconds of one forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    wait(leaves[0])
    start = time.perf_counter()
    value = loss(*leaves)
    if value.requires_grad:
        value.backward()
    wait(leaves[0])
    return time.perf_counter() - start


def wait(tensor: Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize()


def join_group(device: str) -> None:
    dist.init_process_group("nccl" if device == "cuda" else "gloo", store=dist.HashStore(), rank=0, world_size=1)


def peak_above_inputs(loss: Loss, n: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> int:
    """Return the bytes that one forward and backward adds to the peak. On a CPU, run it in a process of its own (Linux)."""
    run(loss, inputs(min(n, 1024), dim, dtype, device))  # libraries load their buffers
    leaves = inputs(n, dim, dtype, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(loss, leaves)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at what is resident now
    before = resident("VmRSS")
    run(loss, leaves)
    return resident("VmHWM") - before


def resident(entry: str) -> int:
    """Return bytes of this process: VmRSS now, VmHWM at its peak."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[entry].removesuffix("kB")) * 1024


def product_rate(dim: int, dtype: torch.dtype, device: str) -> float:
    """Return the operations a second of a large matrix product of that inner width, the best of five."""
    size = 16_384 if device == "cuda" else 4096
    a, b = (torch.randn(size, dim, dtype=dtype, device=device) for _ in range(2))
    out = torch.empty(size, size, dtype=dtype, device=device)
    times = []
    for _ in range(6):
        wait(a)
        start = time.perf_counter()
        torch.mm(a, b.T, out=out)
        wait(a)
        times.append(time.perf_counter() - start)
    return 2 * size * size * dim / min(times[1:])


def load(name: str) -> Loss | str:
    """Return a peer's loss, or why it cannot be measured."""
    try:
        return PEERS[name][1]()
    except ImportError as error:
        return f"not measured ({error})"


def add_checkouts(paths: list[str]) -> None:
    """Put folders of peers that are checked out, not installed, into the import path."""
    sys.path[:0] = paths
