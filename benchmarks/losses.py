"""Our losses and their peers', as functions of the same four tensors; what the benchmarks have in common."""

import inspect
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from mmcontrast import contrastive_loss

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def ours(objective: str) -> Loss:
    def loss(x: Tensor, y: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        shift = bias if objective == "siglip" else None
        embeddings = {"image": x, "text": y}
        return contrastive_loss(
            embeddings, objective=objective, logit_scale=scale, logit_bias=shift, group=dist.group.WORLD
        )  # fmt: skip

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
    """One direction alone: its loss has no other."""
    from grad_cache.loss import SimpleContrastiveLoss

    return lambda x, y, scale, bias: SimpleContrastiveLoss()(x * scale, y)


def sentence_transformers() -> Loss:
    """Both directions, 1,024 rows at a time; it goes backward itself."""
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    options = {"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction", "mini_batch_size": 1024}
    loss = CachedMultipleNegativesRankingLoss(torch.nn.Sequential(torch.nn.Identity()), scale=50.0, **options)
    return lambda x, y, scale, bias: loss.calculate_loss([[x], [y]], with_backward=True)


def inf_cl() -> Loss:
    """Both directions of its kernel on one GPU (widths that are multiples of 256)."""
    from inf_cl import cal_flash_loss

    return lambda x, y, scale, bias: (cal_flash_loss(x, y, scale=scale) + cal_flash_loss(y, x, scale=scale)).mean() / 2


OURS = {objective: ours(objective) for objective in ("infonce", "siglip")}
PEERS: dict[str, tuple[str, Callable[[], Loss]]] = {  # by name: the objective it computes, how to load it
    "open_clip ClipLoss": ("infonce", clip_loss),
    "open_clip SigLipLoss": ("siglip", siglip_loss),
    "open_clip SigLipLoss, chunked": ("siglip", chunked_siglip_loss),
    "GradCache SimpleContrastiveLoss": ("infonce", grad_cache),
    "sentence-transformers CachedMultipleNegativesRankingLoss": ("infonce", sentence_transformers),
    "Inf-CL cal_flash_loss": ("infonce", inf_cl),
}


def inputs(n: int, dim: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """Unit rows, and a scale and bias as in the middle of training."""
    generator = torch.Generator(device).manual_seed(0)
    rows = [F.normalize(torch.randn(n, dim, generator=generator, device=device), dim=1).to(dtype) for _ in range(2)]
    return [t.requires_grad_() for t in (*rows, torch.tensor(50.0, device=device), torch.tensor(-10.0, device=device))]


def run(loss: Loss, leaves: list[Tensor]) -> float:
    """Seconds of one forward and backward."""
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
    """Bytes that one forward and backward adds to the peak. On a CPU, run it in a process of its own (Linux)."""
    run(loss, inputs(1024, dim, dtype, device))  # libraries load their buffers
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
    """Bytes of this process: VmRSS now, VmHWM at its peak."""
    lines = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[entry].removesuffix("kB")) * 1024


def product_rate(dim: int, dtype: torch.dtype, device: str) -> float:
    """Operations a second of a large matrix product of that inner width, the best of five."""
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
    """A peer's loss, or why it is not here."""
    try:
        return PEERS[name][1]()
    except ImportError as error:
        return f"not measured ({error})"


def add_checkouts(paths: list[str]) -> None:
    """Peers that are checked out rather than installed."""
    sys.path[:0] = paths
