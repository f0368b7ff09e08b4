"""Low-rank adaptation of any tower: W + s·B·A replaces chosen weights W, which stay frozen (arXiv:2106.09685).

The sum is a torch parametrization, so all code that reads the weight gets it: fused attention, compiled and sharded blocks, and
the fast paths of evaluation. A plain linear layer does not compute the sum: W·x + s·B·(A·x) needs no gradient of W. Weights are
chosen by the type of their module and by their block, not by name.
"""

import math
from collections.abc import Iterator
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from mmcontrast.errors import UserError
from mmcontrast.libraries import tell
from mmcontrast.models.base import Tower

ATTENTION = ("attention", "attn")  # in the class name of an attention module
MULTIHEAD_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of nn.MultiheadAttention, or None


class LowRank(nn.Module):
    """The parametrization W → W + scale · up · down, in at least fp32.

    Args:
        weight: [out, in] (transposed for transformers' Conv1D: the sum is the same).
        rank: r of down [r, in], initialized as torch does a linear layer, and up [out, r], zero.
        scale: s, usually alpha / r.
        dropout: of the update's input in training, where a linear layer computes the update separately.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, dropout: float = 0.0) -> None:
        super().__init__()
        rows, columns = weight.shape
        self.scale, self.dropout = scale, dropout
        dtype = torch.promote_types(weight.dtype, torch.float32)
        self.down = nn.Parameter(torch.empty(rank, columns, dtype=dtype, device=weight.device))
        self.up = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight.to(self.up.dtype), self.up, self.down, alpha=self.scale)


def add_lora(tower: Tower, rank: int, alpha: float | None = None, targets: str = "all", dropout: float = 0.0) -> list[str]:
    """Freeze a tower, and add trainable low-rank updates to the weights of its blocks and attention pools.

    Args:
        alpha: the update's scale is alpha / rank; default: rank.
        targets: "all" linear layers, or those of "attention".
        dropout: of the updates' inputs in training. Weights that other code reads, such as those of fused attention, have none.

    Returns:
        the names of the adapted weights, within the tower.

    Raises:
        UserError: for a tower without such weights; for a rank that is not below their size; for a dropout that would apply
            nowhere.
    """
    chosen = list(adaptable(tower, targets))
    if not chosen:
        raise UserError(
            f"no block of a {type(tower.network).__name__} has linear layers of {targets}: LoRA has nothing to adapt"
        )
    if dropout and (fused := [module for _, module, _ in chosen if not _is_plain(module)]):
        reason = (
            f"{len(fused)} of {len(chosen)} adapted weights of a {type(tower.network).__name__} are read by fused attention or"
            " another layer, where no update has an input of its own"
        )
        if len(fused) == len(chosen):
            raise UserError(f"dropout={dropout:g}: {reason}: leave it out, or choose targets: all")
        tell(f"model.lora.dropout: {reason}: they learn without it")
    tower.requires_grad_(False)
    names = []
    for prefix, module, name in chosen:
        weight = getattr(module, name)
        if rank > min(weight.shape):
            raise UserError(f"rank {rank} is beyond {prefix}.{name} of {list(weight.shape)}: at most {min(weight.shape)}")
        low_rank = LowRank(weight, rank, (alpha or rank) / rank, dropout)
        plain = _is_plain(module)
        parametrize.register_parametrization(module, name, low_rank, unsafe=True)  # same shape; only the dtype may be wider
        if plain:
            module.forward = MethodType(_linear_forward, module)  # code that reads the weight still gets the sum
        names.append(f"{prefix}.{name}")
    return names


def _is_plain(module: nn.Module) -> bool:
    """Return whether a module is a linear layer whose weight no other code reads."""
    return type(module).forward is nn.Linear.forward and not isinstance(module, NonDynamicallyQuantizableLinear)


def _linear_forward(self: nn.Linear, batch: Tensor) -> Tensor:
    """Run an adapted linear layer without adding up its weights."""
    weight: Any = self.parametrizations.weight  # type: ignore[union-attr]
    low_rank = weight[0]
    dropped = F.dropout(batch, low_rank.dropout, self.training) if low_rank.dropout else batch
    update = F.linear(F.linear(dropped, low_rank.down), low_rank.up)
    return F.linear(batch, weight.original, self.bias) + low_rank.scale * update


def adaptable(tower: Tower, targets: str) -> Iterator[tuple[str, nn.Module, str]]:
    """Yield (name of the module, module, name of its weight) of the linear maps in blocks and attention pools."""
    modules = dict(tower.named_modules())
    blocks = set(tower.blocks())
    containers = [*blocks, *(name for name, module in modules.items() if _is_pool(module))]
    for name, module in modules.items():
        if not any(name == container or name.startswith(f"{container}.") for container in containers):
            continue
        ancestors = [name.rsplit(".", k)[0] for k in range(name.count(".") + 1)]
        within = [modules[ancestor] for ancestor in ancestors if ancestor not in blocks]  # a block has more than attention
        if targets == "attention" and not any(map(_is_attention, within)):
            continue
        weights = MULTIHEAD_WEIGHTS if isinstance(module, nn.MultiheadAttention) else ("weight",) if _is_linear(module) else ()
        for weight in weights:
            if getattr(module, weight, None) is not None:
                yield name, module, weight


def _is_linear(module: nn.Module) -> bool:
    """Return whether a module is a linear layer; transformers' Conv1D is one, transposed."""
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_attention(module: nn.Module) -> bool:
    """Return whether a module is an attention layer, by its class."""
    return isinstance(module, nn.MultiheadAttention) or any(word in type(module).__name__.lower() for word in ATTENTION)


def _is_pool(module: nn.Module) -> bool:
    """Return whether a module pools by attention, as open_clip's AttentionalPooler, timm's AttentionPoolLatent, SigLIP's
    heads."""
    return "pool" in type(module).__name__.lower() and any(map(_is_attention, module.modules()))


def merge_lora(model: nn.Module) -> None:
    """Replace adapted weights by their sums, under their old names."""
    for module in model.modules():
        for name in list(getattr(module, "parametrizations", ())) if parametrize.is_parametrized(module) else ():
            if isinstance(module.parametrizations[name][0], LowRank):  # type: ignore[index]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                module.__dict__.pop("forward", None)
