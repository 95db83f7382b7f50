"""Every policy loss against its paper written as a loop in float64: value and gradient, over random shapes.

Each loop takes one sequence of trained tokens and gives the value of each token and the gradient of their sum by each
log-probability; where a paper stops a gradient, it is the gradient the paper states.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, expm1, log
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms import losses_behaviour, losses_covariance, losses_sequence  # noqa: F401  registered by being imported
from algorithms.inputs import BatchTokens, LossInputs
from algorithms.registry import POLICY_LOSSES

Found = tuple[list[float], list[float]]


@dataclass(frozen=True)
class Sequence:
    """Its trained tokens: log-probabilities under three policies, advantages, marks; and the loss's switches."""

    current: list[float]
    proximal: list[float]
    behaviour: list[float]
    advantages: list[float]
    marks: list[float]
    options: dict[str, float]

    def by_token(self, one: Callable[["Sequence", int], tuple[float, float]]) -> Found:
        found = [one(self, t) for t in range(len(self.current))]
        return [value for value, _ in found], [slope for _, slope in found]


def surrogate(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """-min(r A, clip(r) A) and its derivative by log r."""
    bounded = min(max(ratio, 1 - low), 1 + high)
    if ratio * advantage <= bounded * advantage:
        return -ratio * advantage, -ratio * advantage
    return -bounded * advantage, 0.0


def clip(s: Sequence, t: int) -> tuple[float, float]:
    return surrogate(exp(s.current[t] - s.proximal[t]), s.advantages[t], s.options["low"], s.options["high"])


def dual_clip(s: Sequence, t: int) -> tuple[float, float]:
    value, slope = clip(s, t)
    bound = -s.options["dual"] * s.advantages[t]
    return (bound, 0.0) if s.advantages[t] < 0 and value > bound else (value, slope)


def cispo(s: Sequence, t: int) -> tuple[float, float]:
    ratio = exp(s.current[t] - s.proximal[t])
    weight = min(max(ratio, 1 - s.options["low"]), 1 + s.options["high"])
    return -weight * s.advantages[t] * s.current[t], -weight * s.advantages[t]


def sapo(s: Sequence, t: int) -> tuple[float, float]:
    ratio, advantage = exp(s.current[t] - s.proximal[t]), s.advantages[t]
    tau = s.options["positive"] if advantage > 0 else s.options["negative"]
    p = 1 / (1 + exp(-tau * (ratio - 1)))
    return -4 / tau * p * advantage, -4 * p * (1 - p) * ratio * advantage


def policy_gradient(s: Sequence, t: int) -> tuple[float, float]:
    return -s.advantages[t] * s.current[t], -s.advantages[t]


def nll(s: Sequence, t: int) -> tuple[float, float]:
    return -s.current[t], -1.0


def decoupled(s: Sequence, t: int) -> tuple[float, float]:
    value, slope = clip(s, t)
    weight = exp(s.proximal[t] - s.behaviour[t])
    return weight * value, weight * slope


def divergence_masked(s: Sequence, t: int, divergence: float) -> tuple[float, float]:
    ratio, advantage = exp(s.current[t] - s.behaviour[t]), s.advantages[t]
    if divergence > s.options["max_divergence"] and advantage * (ratio - 1) > 0:
        return 0.0, 0.0
    weight = min(ratio, s.options["max_ratio"])
    return -weight * advantage, -weight * advantage


def dppo_tv(s: Sequence, t: int) -> tuple[float, float]:
    return divergence_masked(s, t, abs(exp(s.current[t]) - exp(s.behaviour[t])))


def dppo_kl(s: Sequence, t: int) -> tuple[float, float]:
    mu = exp(s.behaviour[t])
    kl = mu * (s.behaviour[t] - s.current[t]) + (1 - mu) * log(expm1(s.behaviour[t]) / expm1(s.current[t]))
    return divergence_masked(s, t, kl)


def m2po(s: Sequence, t: int) -> tuple[float, float]:
    weight = 0.0 if s.marks[t] else exp(s.current[t] - s.behaviour[t])
    return -weight * s.advantages[t], -weight * s.advantages[t]


def clip_cov(s: Sequence, t: int) -> tuple[float, float]:
    value, slope = clip(s, t)
    return value, 0.0 if s.marks[t] else slope


def kl_cov(s: Sequence, t: int) -> tuple[float, float]:
    ratio = exp(s.current[t] - s.proximal[t])
    beta = s.options["coefficient"] if s.marks[t] else 0.0
    kl = ratio - 1 - log(ratio)
    return -ratio * s.advantages[t] + beta * kl, -ratio * s.advantages[t] + beta * (ratio - 1)


def geometric_mean(logs: list[float]) -> float:
    return exp(sum(logs) / len(logs))


def gspo(s: Sequence) -> Found:
    ratio = geometric_mean([a - b for a, b in zip(s.current, s.proximal, strict=True)])
    found = [surrogate(ratio, advantage, s.options["low"], s.options["high"]) for advantage in s.advantages]
    slope = sum(slope for _, slope in found) / len(found)
    return [value for value, _ in found], [slope] * len(found)


def gspo_token(s: Sequence) -> Found:
    ratio = geometric_mean([a - b for a, b in zip(s.current, s.proximal, strict=True)])
    found = [surrogate(ratio, advantage, s.options["low"], s.options["high"]) for advantage in s.advantages]
    return [value for value, _ in found], [slope for _, slope in found]


def gmpo(s: Sequence) -> Found:
    advantage = s.advantages[0]
    logs, is_free = [], []
    for a, b in zip(s.current, s.proximal, strict=True):
        bounded = min(a - b, s.options["high"]) if advantage > 0 else max(a - b, -s.options["low"])
        logs.append(bounded)
        is_free.append(bounded == a - b)
    value = -advantage * geometric_mean(logs)
    # Each of n tokens carries the value, and the mean log-ratio has 1/n of each free token.
    return [value] * len(logs), [value if free else 0.0 for free in is_free]


def topr(s: Sequence) -> Found:
    sign = "positive" if s.advantages[0] > 0 else "negative"
    weight = exp(sum(a - b for a, b in zip(s.current, s.behaviour, strict=True)))
    weight = min(max(weight, s.options[f"{sign}_low"]), s.options[f"{sign}_high"])
    return s.by_token(lambda s, t: (-weight * s.advantages[t] * s.current[t], -weight * s.advantages[t]))


BY_TOKEN = {
    "clip": clip,
    "dual_clip": dual_clip,
    "cispo": cispo,
    "sapo": sapo,
    "reinforce": policy_gradient,
    "gpg": policy_gradient,
    "nll": nll,
    "decoupled": decoupled,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "m2po": m2po,
    "clip_cov": clip_cov,
    "kl_cov": kl_cov,
}
BY_SEQUENCE: dict[str, Callable[[Sequence], Found]] = {
    "gspo": gspo,
    "gspo_token": gspo_token,
    "gmpo": gmpo,
    "topr": topr,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "gspo": {"low": 0.2, "high": 0.3},
    "gspo_token": {"low": 0.2, "high": 0.3},
    "cispo": {"low": 0.5, "high": 1.0},
    "dual_clip": {"dual": 1.5},
    "dppo_tv": {"max_ratio": 2.0},
    "topr": {"negative_low": 0.3, "positive_high": 1.5},
    "clip_cov": {"share": 0.3, "covariance_low": -1.0, "covariance_high": 2.0},
    "kl_cov": {"share": 0.3, "coefficient": 0.7},
}


def loop(name: str, sequence: Sequence) -> Found:
    return BY_SEQUENCE[name](sequence) if name in BY_SEQUENCE else sequence.by_token(BY_TOKEN[name])


def random_inputs(name: str, lengths: list[int], seed: int) -> LossInputs:
    """Random rows with holes and padding; advantages by sequence where the loss carries only such."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 1)

    def random() -> torch.Tensor:
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    behaviour = -0.05 - 3 * random()
    proximal = (behaviour + random() - 0.5).clamp(max=-0.01)
    current = (proximal + random() - 0.5).clamp(max=-0.01)
    advantages = 4 * random() - 2
    if POLICY_LOSSES.get(name).unit == "sequence":
        advantages = advantages[:, :1].expand(shape)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    mask[:, 1] &= random()[:, 1] < 0.7
    behaviour, proximal, current, advantages = (
        torch.where(mask, values, 0.0) for values in (behaviour, proximal, current, advantages)
    )
    entry = POLICY_LOSSES.get(name)
    marks = None
    if entry.prepare is not None:
        sample = torch.arange(shape[0])[:, None].expand(shape).flatten()
        tokens = BatchTokens(sample, *(v.flatten() for v in (mask, advantages, behaviour, proximal)))
        marks = entry.prepare(tokens, options_of(name)).view(shape).double()
    return LossInputs(current.requires_grad_(), proximal, behaviour, advantages, mask, marks)


def options_of(name: str) -> Any:
    return POLICY_LOSSES.get(name).read_options(SWITCHES.get(name, {}))


def test_every_built_in_loss_has_a_loop() -> None:
    built_in = {
        name for name in POLICY_LOSSES if POLICY_LOSSES.get(name).function.__module__.startswith("algorithms.losses")
    }
    assert built_in == BY_TOKEN.keys() | BY_SEQUENCE.keys()


def test_every_built_in_loss_says_what_it_is() -> None:
    for name in BY_TOKEN.keys() | BY_SEQUENCE.keys():
        entry = POLICY_LOSSES.get(name)
        assert entry.formula, name
        assert entry.source, name
        assert entry.use_when.endswith("."), name
        assert all(field.description for field in entry.options.model_fields.values()), name


@pytest.mark.parametrize("name", [*BY_TOKEN, *BY_SEQUENCE])
@settings(max_examples=40, deadline=None)
@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=5), seed=st.integers(0, 2**31))
def test_value_and_gradient_are_those_of_the_loop(name: str, lengths: list[int], seed: int) -> None:
    inputs = random_inputs(name, lengths, seed)
    values = POLICY_LOSSES.get(name).function(inputs, options_of(name)).values
    inside = torch.where(inputs.mask, values, 0.0)
    (slopes,) = torch.autograd.grad(inside.sum(), inputs.log_probs)
    options = options_of(name).model_dump()
    for row in range(len(lengths)):
        mask = inputs.mask[row]
        assert torch.equal(slopes[row][~mask], torch.zeros_like(slopes[row][~mask]))
        if not mask.any():
            continue
        marks = torch.zeros_like(inputs.advantages) if inputs.marks is None else inputs.marks
        parts = (inputs.log_probs, inputs.proximal_log_probs, inputs.behaviour_log_probs, inputs.advantages, marks)
        current, proximal, behaviour, advantages, marked = (part[row][mask].tolist() for part in parts)
        sequence = Sequence(current, proximal, behaviour, advantages, marked, options)
        expected_values, expected_slopes = loop(name, sequence)
        assert inside[row][mask].tolist() == pytest.approx(expected_values, abs=1e-9)
        assert slopes[row][mask].tolist() == pytest.approx(expected_slopes, abs=1e-9)


HOLDS_A_GRADIENT = {"cispo", "dppo_tv", "dppo_kl", "gspo_token", "topr", "clip_cov"}


@pytest.mark.parametrize("name", sorted((BY_TOKEN.keys() | BY_SEQUENCE.keys()) - HOLDS_A_GRADIENT))
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    inputs = random_inputs(name, [3, 5, 4], seed=1)

    def values(log_probs: torch.Tensor) -> torch.Tensor:
        moved = LossInputs(
            log_probs,
            inputs.proximal_log_probs,
            inputs.behaviour_log_probs,
            inputs.advantages,
            inputs.mask,
            inputs.marks,
        )
        found = POLICY_LOSSES.get(name).function(moved, options_of(name)).values
        return torch.where(inputs.mask, found, 0.0)

    assert torch.autograd.gradcheck(values, (inputs.log_probs,))
