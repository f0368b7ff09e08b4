"""Warnings while a run trains: a loss that leaps, a logit scale that collapses or stays at its bound."""

import math
from collections.abc import Iterator

FORGET = 0.02  # of the running mean and variance of the loss, a step
SEEN, DEVIATIONS = 50, 6.0  # steps before a leap is judged, and how far it is from the mean
STEPS_AT_BOUND = 200


class Anomalies:
    """Watches the loss and the logit scale of every step, and warns of what to look at."""

    def __init__(self, max_scale: float) -> None:
        self.max_scale = max_scale
        self.mean = self.variance = 0.0
        self.seen = self.at_bound = 0

    def see(self, step: int, loss: float, scale: float) -> Iterator[str]:
        """Yield a step's warnings. A loss that stays high is warned of until the running mean has followed it, a bound once for
        every time it is reached."""
        deviation = loss - self.mean
        if self.seen >= SEEN and deviation > DEVIATIONS * math.sqrt(self.variance) and deviation > 0.01 * abs(self.mean):
            yield (
                f"the loss of step {step} is {loss:.3f}, where it was {self.mean:.3f} ± {math.sqrt(self.variance):.3f}: look at"
                " its samples (data.record_samples), or lower train.lr"
            )
        share = max(FORGET, 1 / (self.seen + 1))
        self.mean += share * deviation
        self.variance = (1 - share) * (self.variance + share * deviation * deviation)
        self.seen += 1
        collapsed, at_maximum = scale <= 1.001, scale >= 0.999 * self.max_scale
        self.at_bound = self.at_bound + 1 if collapsed or at_maximum else 0
        if self.at_bound == STEPS_AT_BOUND and collapsed:
            yield f"the logit scale has collapsed to {scale:.2f}: nothing is told apart; lower train.lr, or warm up longer"
        elif self.at_bound == STEPS_AT_BOUND:
            yield f"the logit scale has been at its bound, model.max_logit_scale={self.max_scale:g}, for {STEPS_AT_BOUND} steps"
