"""Losses of one anchor straight from the papers, the objectives and groups that they are compared on, and the comparison."""

import torch
import torch.nn.functional as F


def unit(*shape, seed, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def value_and_grads(function, *leaves):
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = function(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)]


def assert_all_close(got, want, **tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


OBJECTIVES = [
    "infonce",
    "dcl",
    "siglip",
    {"type": "hard_negative", "beta": 0.5, "alpha": 0.3},
    {"type": "hard_negative", "beta": 0.1, "alpha": 0.0, "detach_weights": True},
    {"type": "debiased", "tau_plus": 0.2},
    {"type": "debiased", "tau_plus": 0.05, "beta": 0.4},
    "multi_positive",
    {"type": "infonce", "label_smoothing": 0.2},
    {"type": "siglip", "group_positives": True},
    {"type": "hybrid", "positives_weight": 0.3, "alpha": 0.4, "beta": 0.2},
]
OF_ONE_DIRECTION = ("siglip",)


def name_of(objective):
    return objective if isinstance(objective, str) else objective["type"]


def averages_over_positives(objective):
    """Which the random products of the multilinear pairing have none of."""
    return name_of(objective) in ("multi_positive", "hybrid") or "group_positives" in objective


def textbook_anchor_loss(objective, z, i, same, scale):
    """One anchor i of scores z [m] in which `same` [m] marks its group: straight from the papers."""
    name, options = (objective, {}) if isinstance(objective, str) else (objective["type"], objective)
    negatives, n = z[~same], int((~same).sum())
    if name == "siglip":
        positives = z[same] if options.get("group_positives") else z[i : i + 1]
        return -F.logsigmoid(positives).sum() - F.logsigmoid(-negatives).sum()
    if n == 0:
        return 0.0 * z.sum()
    if name == "infonce":
        candidates, smoothing = torch.cat([z[i : i + 1], negatives]), options.get("label_smoothing", 0.0)
        return F.cross_entropy(candidates[None], torch.tensor([0]), label_smoothing=smoothing)
    if name == "dcl":
        return -z[i] + torch.logsumexp(negatives, 0)
    if name == "multi_positive":
        return -(z[same] - torch.logsumexp(z, 0)).mean()
    weights = n * torch.softmax(options.get("beta", 0.0) * negatives, 0)
    if options.get("detach_weights"):
        weights = weights.detach()
    positive, hard = z[i].exp(), (weights * negatives.exp()).sum()
    if name == "hard_negative":
        return -(positive / (options["alpha"] * positive + hard)).log()
    if name == "hybrid":
        share = options["positives_weight"]
        positive = (1 - share) * positive + share * z[same].exp().sum()
        return (options["alpha"] + hard / positive).log()
    tau = options["tau_plus"]
    estimate = torch.maximum((hard / n - tau * positive) / (1 - tau), (-scale).exp())
    return -(positive / (positive + n * estimate)).log()


IDS = {
    "all different": [[0, 1, 2, 3, 4, 5, 6]] * 3,
    "shared": [[0, 0, 1, 2, 1, 1, 3]] * 3,
    "absent": [[0, 1, -1, 3, 3, 5, 6], [0, -1, 2, 3, 3, -1, 6], [-1, 1, 2, 3, 3, -1, -1]],
    "one field wholly absent": [[0, 1, 2, 3, 3, 5, 6], [0, 1, 2, 3, 3, 5, 6], [-1] * 7],
    "a single one": [[9, -1, -1, -1, -1, -1, -1]] * 3,
    "no negatives": [[4] * 7] * 3,
}
