"""What an objective is: the reductions it needs, and a per-anchor loss of them."""

from abc import abstractmethod
from typing import ClassVar

from torch import Tensor, nn

from mmcontrast.score import Direction, Reduction


class Objective(nn.Module):
    """Maps one `Direction` to a loss per anchor. It knows no rank, tile, mask, dtype or device.

    Attributes:
        reductions: what `forward` reads from its direction.
        both_directions: average the two directions of a pair; otherwise each pair is counted once, by its rows.
        stateful: it remembers earlier calls: `contrastive_loss` wants the same instance every time.
        progress: the share of training that is done, in [0, 1], for schedules; whoever trains sets it before each step.
        teachers: it takes teachers' embeddings, beside its own.
        false_negative_margin: reductions with `below` leave out candidates whose cosine is so much above the positive's.
        sample_values: names of numbers, one a sample, that the caller may give; read them as `direction.given[name]`.
        guided: the cosines that are compared are a teacher's.
        of_cosines: its formula takes scores for logit_scale · cosine, so that it is wrong for others.
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
        """[N], one value per anchor."""

    def anchor_scale(self, name: str, scale: Tensor, sample_ids: Tensor | None) -> Tensor:
        """What multiplies the scores of a direction's anchors: [] or, of temperatures of their own, [N]. `scale` [] is the
        model's; `name` the direction's, "image_to_text"."""
        return scale
