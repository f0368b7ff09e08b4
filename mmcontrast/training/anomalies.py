"""What looks wrong while it happens: a loss that leaps, a logit scale that collapses or stays at its bound."""

import math
from collections.abc import Iterator

FORGET = 0.02  # of the running mean and variance of the loss, a step
SEEN, DEVIATIONS = 50, 6.0  # steps before a leap is judged, and how far it is from the mean
STEPS_AT_BOUND = 200


class Anomalies:
    """Sees every step's loss and logit scale, and says what to look at."""

    def __init__(self, max_scale: float) -> None:
        self.max_scale = max_scale
        self.mean = self.variance = 0.0
        self.seen = self.at_bound = 0

    def see(self, step: int, loss: float, scale: float) -> Iterator[str]:
        """Warnings. A loss that stays high is told of until it is expected; a bound once for every time it is reached."""
        apart = loss - self.mean
        if self.seen >= SEEN and apart > DEVIATIONS * math.sqrt(self.variance) and apart > 0.01 * abs(self.mean):
            yield (
                f"the loss of step {step} is {loss:.3f}, where it was {self.mean:.3f} ± {math.sqrt(self.variance):.3f}: look at"
                " its samples (data.record_samples), or lower train.lr"
            )
        share = max(FORGET, 1 / (self.seen + 1))
        self.mean += share * apart
        self.variance = (1 - share) * (self.variance + share * apart * apart)
        self.seen += 1
        low, high = scale <= 1.001, scale >= 0.999 * self.max_scale
        self.at_bound = self.at_bound + 1 if low or high else 0
        if self.at_bound == STEPS_AT_BOUND and low:
            yield f"the logit scale has collapsed to {scale:.2f}: nothing is told apart; lower train.lr, or warm up longer"
        elif self.at_bound == STEPS_AT_BOUND:
            yield f"the logit scale has been at its bound, model.max_logit_scale={self.max_scale:g}, for {STEPS_AT_BOUND} steps"
