"""Turn the epochs of a run's options into optimizer steps."""

import math

from mmcontrast.data import MixtureOrder, StreamOrder, TrainingOrder
from mmcontrast.errors import UserError
from mmcontrast.training.options import TrainOptions


def in_steps(options: TrainOptions, order: TrainingOrder) -> TrainOptions:
    """Return the options with `steps`, `evaluate_every` and `checkpoint_every` as numbers, which the order of the data makes of
    epochs: round(epochs · steps of an epoch), at least 1. `epochs` stays beside them.

    Raises:
        UserError: for data that have no epoch.
    """
    changed: dict[str, int] = {}
    if options.epochs is not None:
        steps = options.epochs * steps_per_epoch(order, f"train.epochs={options.epochs:g}", "set train.steps instead")
        changed["steps"] = max(1, math.floor(steps + 0.5))
    for option in ("evaluate_every", "checkpoint_every"):
        if getattr(options, option) is None:
            changed[option] = steps_per_epoch(order, f"train.{option}=null (each epoch)", "set it to a number of steps")
    return options.model_copy(update=changed)


def steps_per_epoch(order: TrainingOrder, wanted: str, remedy: str) -> int:
    """Return the steps in which every sample is seen once, except for a remainder of a batch or so; of several sources, whose
    shares hold only over thousands of samples, the steps that show as many samples as there are.

    Args:
        wanted, remedy: which option asks, and what to do if there is no such number; for the error.

    Raises:
        UserError: for a sequential order, and sources whose weights are not their sizes.
    """
    if isinstance(order, StreamOrder):
        raise UserError(f"{wanted}: data.sequential draws shards with replacement, so there are no epochs; {remedy}")
    if not isinstance(order, MixtureOrder):
        return order.steps_per_epoch
    sizes = [source.samples for source in order.orders]
    if not all(math.isclose(weight, size / sum(sizes)) for weight, size in zip(order.weights, sizes, strict=True)):
        raise UserError(
            f"{wanted}: the sources of data.train have weights, so each walks its own epochs; {remedy}, or drop the weights"
        )
    return max(1, sum(sizes) // order.batch_size)
