"""Average the weights of models of one architecture: over the whole state, the logit scale by its logarithm."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmcontrast.embedder import Embedder
from mmcontrast.errors import UserError
from mmcontrast.models import ContrastiveModel

MOST_APART = 0.05  # mean difference of values of about unit variance: two ways to scale a picture differ by less


def blended(states: Sequence[Mapping[str, Tensor]], weights: Sequence[float]) -> dict[str, Tensor]:
    """Return Σ wᵢ θᵢ, computed in float64. A state with weight 1 is returned as it is.

    Statistics of batch norms are averaged like all else; integers (counters and indexes, as a batch norm's number of batches)
    are those of the state with the most weight, of equals the last.

    Args:
        states: as `state_of`; names and shapes agree.
        weights: one each, of sum 1.
    """
    assert len(states) == len(weights) and abs(sum(weights) - 1) < 1e-9
    heaviest = max(range(len(weights)), key=lambda number: (weights[number], number))
    if weights[heaviest] == 1:
        return {name: value.clone() for name, value in states[heaviest].items()}
    average = {}
    for name, value in states[heaviest].items():
        if value.is_floating_point():
            parts = [weight * state[name].double() for state, weight in zip(states, weights, strict=True)]
            average[name] = torch.stack(parts).sum(0).to(value.dtype)
        else:
            average[name] = value.clone()
    return average


def wise_ft(first: Mapping[str, Tensor], last: Mapping[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Return (1 − α) θ₀ + α θ₁ (WiSE-FT, arXiv:2109.01903)."""
    return blended([first, last], [1 - alpha, alpha])


def state_of(model: ContrastiveModel) -> dict[str, Tensor]:
    """Return all that is averaged: weights, statistics, the logit scale's logarithm, the bias; and under `rest.` the tensors of
    a library's model that no tower has, as CoCa's decoder."""
    rest = model.origin.rest if model.origin else {}
    state = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
    return state | {f"rest.{name}": value.detach().cpu().clone() for name, value in rest.items()}


@torch.no_grad()
def load_state(model: ContrastiveModel, state: Mapping[str, Tensor]) -> None:
    """Give a model the state that `state_of` or `blended` returned."""
    model.load_state_dict({name: value for name, value in state.items() if not name.startswith("rest.")})
    if model.origin and model.origin.rest:
        rest = {name.removeprefix("rest."): value for name, value in state.items() if name.startswith("rest.")}
        model.origin = replace(model.origin, rest=rest)


def check_alike(first: Embedder, other: Embedder) -> None:
    """Check that two models can be averaged.

    Raises:
        UserError: for models that compute differently: other names or shapes of weights, other modules (an activation), or
            other preprocessing.
    """
    problem = f"{other.name} is no blend partner of {first.name}"
    ours, theirs = state_of(first.model), state_of(other.model)
    for name in sorted(ours.keys() ^ theirs.keys()):
        if not name.startswith("rest."):
            raise UserError(
                f"{problem}: {name} is in {'the latter' if name in ours else 'the former'} alone: another architecture"
            )
    for name in sorted(ours.keys() & theirs.keys()):
        if ours[name].shape != theirs[name].shape:
            raise UserError(
                f"{problem}: {name} is {list(theirs[name].shape)} in the former, {list(ours[name].shape)} in the latter"
            )
    first_types, other_types = _module_types(first), _module_types(other)
    for name, kind in first_types.items():
        other_kind = other_types.get(name)
        if other_kind != kind:
            raise UserError(f"{problem}: {name or 'its towers'} is a {other_kind} in the former, a {kind} in the latter")
    for field in first.fields:
        _check_prepared(problem, field, first, other)


def _module_types(embedder: Embedder) -> dict[str, str]:
    return {name: type(module).__name__ for name, module in embedder.model.towers.named_modules()}


def _check_prepared(problem: str, field: str, first: Embedder, other: Embedder) -> None:
    """Check that two modalities of one class prepare samples equally."""
    from mmcontrast.export.samples import made_samples

    modalities = [embedder.model.modality(field) for embedder in (first, other)]
    if type(modalities[0]) is not type(modalities[1]):
        return
    for value in made_samples(first.model, [field]).values[field]:
        prepared = []
        for modality in modalities:
            raw = modality.decode(value if isinstance(value, bytes) else value.encode())
            transformed = modality.transform(raw, False)
            assert transformed is not None
            prepared.append(modality(modality.collate([transformed])))
        ours, theirs = prepared
        if ours.shape != theirs.shape or not (ours.double() - theirs.double()).nan_to_num().abs().mean() < MOST_APART:
            raise UserError(f"{problem}: field {field!r} is prepared otherwise (size, mean and std, tokenizer, or length)")
