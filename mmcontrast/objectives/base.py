"""The base class of objectives: the reductions that a loss needs, and a per-anchor loss of them."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from mmcontrast.score import Direction, Reduction
from mmcontrast.score.ranks import Everyone


class Objective(nn.Module):
    """A loss that maps one `Direction` to a value per anchor. It knows no rank, tile, mask, dtype or device.

    Attributes:
        reductions: those that `forward` reads from its direction.
        both_directions: average the two directions of a pair; otherwise each pair is counted once, by its rows.
        stateful: it remembers earlier calls: `contrastive_loss` needs the same instance every time.
        progress: the share of training that is done, in [0, 1], for schedules; set before each step.
        teachers: it takes teachers' embeddings beside the model's.
        false_negative_margin: reductions with `below` leave out candidates whose cosine exceeds the positive's by this.
        sample_values: names of numbers, one a sample, that the caller may give; read them as `direction.given[name]`.
        guided: compare a teacher's cosines for that.
        of_cosines: its formula is right only for scores that are logit_scale · cosine.
    """

    reductions: tuple[Reduction, ...]
    both_directions: bool = True
    teachers: bool = False
    sample_values: ClassVar[tuple[str, ...]] = ()
    false_negative_margin: float | None = None
    guided: bool = False
    of_cosines: ClassVar[bool] = False
    stateful: ClassVar[bool] = False
    progress: float = 1.0

    def __init__(self) -> None:  # no options, unless a subclass takes some
        super().__init__()

    @abstractmethod
    def forward(self, d: Direction) -> Tensor:
        """Return the loss [N], one value per anchor."""

    def anchor_scale(self, name: str, scale: Tensor, sample_ids: Tensor | None, everyone: Everyone) -> Tensor:
        """Return the scale of a direction's scores: [], or [N] for individual temperatures. `scale` [] is the model's; `name`
        the direction's, "image_to_text"; `everyone` the ranks, as of `Direction`."""
        return scale
