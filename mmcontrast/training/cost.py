"""Count the FLOPs and bytes of a forward and backward, by running the model on tensors with shapes and no contents (torch's
FakeTensorMode): nothing is allocated, and a model of any size takes seconds on a CPU."""

import re
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import _engine_run_backward, saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mmcontrast.modalities import PADDING, TextModality
from mmcontrast.models import ContrastiveModel

# FLOP/s of dense bf16 products (V100: fp16) with fp32 accumulation, from the vendor's data sheet of the named product; the
# first name that a device's name contains counts. Where a sheet gives the figure "with sparsity", half of it.
PEAK_FLOPS = {
    "GB200": 2.5e15,  # NVIDIA GB200 NVL72: 180 PFLOP/s dense for 72
    "B200": 2.25e15,  # NVIDIA HGX B200: 18 PFLOP/s dense for 8
    "H200 NVL": 835.5e12,
    "H200": 989.4e12,  # NVIDIA H200, SXM
    "H100 PCIe": 756e12,
    "H100 NVL": 835.5e12,
    "GH200": 989.4e12,
    "H100": 989.4e12,  # SXM
    "H800": 989.4e12,  # as its H100, with slower NVLink
    "A100": 312e12,
    "A800": 312e12,  # as its A100, with slower NVLink
    "L40S": 362.05e12,
    "L40": 181.05e12,
    "L4": 121e12,
    "A40": 149.7e12,
    "A10G": 70e12,
    "A10": 125e12,
    "A6000": 154.8e12,
    "4090": 165.2e12,  # Ada architecture white paper: fp32 accumulation
    "3090": 71e12,  # Ampere GA102 white paper: fp32 accumulation
    "V100-PCIE": 112e12,
    "V100": 125e12,
}

_HALF = (torch.bfloat16, torch.float16)
_IN_FP32 = {  # functions of towers that autocast computes in fp32 on a GPU, but not on a CPU
    F.layer_norm, torch.layer_norm, F.group_norm, torch.group_norm, F.softmax, torch.softmax, Tensor.softmax, F.log_softmax,
    torch.log_softmax, Tensor.log_softmax, F.normalize,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Return the dense bf16 FLOP/s of a GPU by `torch.cuda.get_device_name()`; None: not in the table."""
    if re.search(r"MIG|Laptop|Max-Q|4090 D", device_name):  # a part of a card, or another card of the same name
        return None
    for name, peak in PEAK_FLOPS.items():
        if re.search(rf"(?<![A-Z0-9]){name}(?![A-Z0-9])", device_name):
            return peak
    return None


def peak_samples(model: ContrastiveModel, precision: str, device: torch.device) -> float | None:
    """Return the samples a second that a device could train on if it did nothing but the model's operations at its data sheet's
    rate; None where that is not known. The model's blocks must not be compiled or recomputed yet."""
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" and precision in ("bf16", "fp16") else None
    return peak / flops_per_sample(model) if peak else None


@dataclass(frozen=True)
class Flops:
    """The FLOPs of one sample that has every field; a multiplication with its addition is 2.

    Attributes:
        forward: per field, of its modality, tower and projection.
        backward: for the gradients of the trainable parameters.
    """

    forward: dict[str, float]
    backward: float

    @property
    def total(self) -> float:
        """Return the FLOPs of forward and backward."""
        return sum(self.forward.values()) + self.backward


@dataclass(frozen=True)
class Bytes:
    """The bytes of one forward and backward of samples that have every field.

    Attributes:
        saved: per field, what the forward keeps for the backward, without parameters and inputs; what two fields share counts
            for the first.
        peak: the most that is alive at a time and, but for gradients, was not before: activations, gradients and temporary
            tensors.
    """

    saved: dict[str, int]
    peak: int


def flops_per_sample(model: ContrastiveModel, shapes: Mapping[str, Sequence[int]] | None = None) -> float:
    """Return the FLOPs of forward and backward of one sample with every field: both are counted, operation by operation, so
    that locked weights cost their forward alone. The loss is not counted, nor a second forward of gradient caching or of
    recomputed activations (switch recomputation on after counting). Model FLOPs utilisation is this, times samples a second of
    one device, over `peak_flops`.

    Args:
        model: as it trains, with its `requires_grad`; its weights and gradients are not touched.
        shapes: of one sample by field, of a text its length: {"text": [32]}; default: the longest.
    """
    with fakes(), _training(model), next(model.parameters()).device:
        return count_flops(model, make_values(model, 2, shapes)).total


@contextmanager
def fakes() -> Iterator[None]:
    """Make tensors without contents within it. Modules are built as usual, but are not moved or converted: a fake parameter
    cannot be converted in place. A decision on a content is made as if it were 0: timm's models are built without stochastic
    depth."""
    convert = nn.Module._apply

    def keep(self: nn.Module, fn: Callable[..., Any], recurse: bool = True) -> nn.Module:
        return self

    nn.Module._apply = keep  # type: ignore[method-assign]
    try:
        with _Shapes(allow_non_fake_inputs=True):
            yield
    finally:
        nn.Module._apply = convert  # type: ignore[method-assign]


@contextmanager
def _training(model: nn.Module) -> Iterator[None]:
    """Put the model in training mode within it."""
    before = model.training
    model.train()
    try:
        yield
    finally:
        model.train(before)


def make_values(model: ContrastiveModel, samples: int, shapes: Mapping[str, Sequence[int]] | None = None) -> dict[str, Tensor]:
    """Return values as the modalities collate them for samples that have every field, with the longest texts."""
    values = {}
    for field in model.modalities:
        modality = model.modality(field)
        if isinstance(modality, TextModality):
            shape, dtype = [modality.context_length], torch.int64
        else:
            blank = modality.for_training().blank()
            shape, dtype = list(blank.shape), blank.dtype
        values[field] = torch.zeros(samples, *((shapes or {}).get(field, shape)), dtype=dtype)
        if isinstance(modality, TextModality):
            values[field][-1, 1:] = PADDING  # where no text is shorter, some models compute without a mask
    return values


def count_flops(model: ContrastiveModel, values: Mapping[str, Tensor], keep_gradients: bool = False) -> Flops:
    """Run the model forward and backward, and count its FLOPs.

    Args:
        keep_gradients: leave the gradients on the parameters, in the place of earlier ones.
    """
    samples = len(next(iter(values.values())))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    forward: dict[str, float] = {}
    outputs: list[Tensor] = []
    # attention as plain products: which fused attention a device picks, and whether torch's table of FLOPs knows it, changes
    # from version to version; what a fused one computes twice does not count either
    with _Products() as counter, sdpa_kernel(SDPBackend.MATH), _AsOnGpu():
        for field, batch in values.items():
            before = counter.flops
            outputs.append(model.encode(field, batch))
            forward[field] = (counter.flops - before) / samples
        before = counter.flops
        total = torch.stack([output.sum() for output in outputs]).sum()
        gradients = torch.autograd.grad(total, trainable, allow_unused=True)
        backward = (counter.flops - before) / samples
    if keep_gradients:
        for parameter, gradient in zip(trainable, gradients, strict=True):
            parameter.grad = gradient
    return Flops(forward, backward)


def count_bytes(model: ContrastiveModel, values: Mapping[str, Tensor], precision: str = "fp32") -> Bytes:
    """Run the model forward and backward, and count the bytes that are alive; gradients are added to existing ones. On real
    tensors it counts the same, which is how it is tested.

    Args:
        precision: `train.precision`, by autocast's rules for a GPU.
    """
    inputs = {_key(tensor) for tensor in (*model.parameters(), *model.buffers(), *values.values())}
    saved: dict[str, int] = {}
    kept: dict[int, Any] = {}  # storages by key

    def keep(tensor: Tensor) -> Tensor:
        if _key(tensor) not in inputs:
            kept.setdefault(_key(tensor), tensor.untyped_storage())
        return tensor

    with _AliveBytes(inputs, [p.grad for p in model.parameters() if p.grad is not None]) as alive, _AsOnGpu():
        outputs = []
        for field, batch in values.items():
            count = len(kept)
            autocast = torch.autocast(batch.device.type, torch.bfloat16, enabled=precision in ("bf16", "fp16"))
            with autocast, saved_tensors_hooks(keep, lambda tensor: tensor):
                outputs.append(model.encode(field, batch))
            saved[field] = sum(storage.nbytes() for storage in list(kept.values())[count:])
        kept.clear()  # from here on only the graph keeps them alive
        total = torch.stack([output.sum() for output in outputs]).sum()
        del outputs
        # what torch.autograd.backward calls, which would leave `_AsOnGpu` while blocks are recomputed
        _engine_run_backward(
            (total,), (torch.ones_like(total),), False, False, (), allow_unreachable=True, accumulate_grad=True
        )
    return Bytes(saved, alive.peak)


def _key(tensor: Tensor) -> int:
    """Return a number that identifies a tensor's storage."""
    return tensor.untyped_storage()._cdata


class _AliveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations allocate, until they are freed."""

    def __init__(self, inputs: set[int], gradients: Sequence[Tensor]) -> None:
        super().__init__()
        self.known = inputs | {_key(gradient) for gradient in gradients}
        self.now = self.peak = sum(gradient.untyped_storage().nbytes() for gradient in gradients)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and _key(tensor) not in self.known:
                storage = tensor.untyped_storage()
                self.known.add(_key(tensor))
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, _key(tensor), storage.nbytes()).atexit = False
        return out

    def _free(self, key: int, size: int) -> None:
        """Take note that a storage is freed."""
        self.known.discard(key)
        self.now -= size


class _Shapes(FakeTensorMode):
    """Computes shapes alone, and answers questions for a content, such as `batch.isnan().any()`, with False or 0."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return {torch.bool: False}.get(args[0].dtype, 0.0 if args[0].is_floating_point() else 0)
        return super().__torch_dispatch__(func, types, args, kwargs)


class _Products(TorchDispatchMode):
    """Counts the FLOPs of products and convolutions, by torch's formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(getattr(func, "_overloadpacket", None)):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


class _AsOnGpu(TorchFunctionMode):
    """Computes on a CPU as a GPU does: norms and softmaxes in fp32 under autocast; attention that keeps no scores, also with
    dropout and learnt biases; one byte for each number that dropout may drop."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            arguments = dict(zip(names, args, strict=False)) | kwargs | {"dropout_p": 0.0}
            if arguments.get("attn_mask") is not None:
                arguments["attn_mask"] = arguments["attn_mask"].detach()
            return func(**arguments)
        if func is F.dropout:
            arguments = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | kwargs
            if arguments.get("training", True) and not arguments.get("inplace") and (share := arguments.get("p", 0.5)):
                return torch.native_dropout(arguments["input"], share, True)[0]
        if func in _IN_FP32 and torch.is_autocast_enabled("cpu"):
            args = [arg.float() if isinstance(arg, Tensor) and arg.dtype in _HALF else arg for arg in args]
        return func(*args, **kwargs)
