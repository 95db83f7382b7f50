"""The loss of a batch: exact over any split, blind to padding, and equal to the formula written out."""

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.aggregation import count
from algorithms.config import AlgorithmConfig
from algorithms.finite import NonFiniteError
from algorithms.inputs import LossInputs, TokenLoss
from algorithms.objective import Denominators, ObjectiveMetrics, TokenBatch, finish_metrics, objective
from algorithms.registry import POLICY_LOSSES, Options, RegistryError, policy_loss

LOSSES = ("clip", "reinforce", "nll")
AGGREGATIONS = ("token_mean", "sequence_mean", "sequence_sum")
METHODS = ("none", "token_truncated", "sequence_truncated", "token_masked")
BOUNDS = {
    "none": {},
    "token_truncated": {"high": 1.5},
    "sequence_truncated": {"high": 1.5},
    "token_masked": {"low": 0.6, "high": 1.5},
}
KL_COEFFICIENT = 0.3


def settings_of(
    loss: str = "clip", aggregation: str = "token_mean", method: str = "token_truncated"
) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(
        {
            "loss": loss,
            "aggregation": aggregation,
            "correction": {"method": method, "options": BOUNDS[method]},
            "kl": {"coefficient": KL_COEFFICIENT, "estimator": "k3"},
            "entropy_coefficient": 0.1,
        }
    )


def random_batch(seed: int = 0, sequences: int = 5, tokens: int = 6) -> tuple[Tensor, Tensor, TokenBatch]:
    """Log-probabilities (float64, with gradient), entropy and a batch with ragged ends and an untrained middle."""
    generator = torch.Generator().manual_seed(seed)

    def near(values: Tensor, scale: float) -> Tensor:
        return values + scale * torch.randn(values.shape, generator=generator, dtype=torch.float64)

    log_probs = near(torch.full((sequences, tokens), -1.5, dtype=torch.float64), 0.5)
    lengths = torch.randint(1, tokens + 1, (sequences, 1), generator=generator)
    mask = torch.arange(tokens) < lengths
    mask[:, 1] = False
    mask[0] = torch.arange(tokens) != 1
    batch = TokenBatch(
        mask=mask,
        advantages=near(torch.zeros_like(log_probs), 1.0),
        behaviour_log_probs=near(log_probs, 0.4),
        proximal_log_probs=near(log_probs, 0.3),
        reference_log_probs=near(log_probs, 0.3),
    )
    return log_probs.requires_grad_(), near(torch.ones_like(log_probs), 0.2), batch


def part_of(batch: TokenBatch, rows: slice, tokens: slice = slice(None)) -> TokenBatch:
    """Some rows and columns of a batch."""
    parts = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    return TokenBatch(**{name: None if value is None else value[rows, tokens] for name, value in parts.items()})


def run(
    log_probs: Tensor, entropy: Tensor, batch: TokenBatch, config: AlgorithmConfig, denominators: Denominators
) -> tuple[float, Tensor, ObjectiveMetrics]:
    """Loss, gradient by log-probabilities, and metrics."""
    leaf = log_probs.detach().clone().requires_grad_()
    loss, metrics = objective(leaf, entropy, batch, config, denominators, KL_COEFFICIENT)
    loss.backward()  # type: ignore[no-untyped-call]
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad, metrics


def written_out(log_probs: Tensor, entropy: Tensor, batch: TokenBatch, config: AlgorithmConfig) -> float:
    """The objective as the papers write it, a token at a time."""
    log_probs = log_probs.detach()
    assert batch.proximal_log_probs is not None
    assert batch.reference_log_probs is not None
    tokens, sequences = count(batch.mask)
    total = 0.0
    for i in range(len(batch.mask)):
        places = batch.mask[i].nonzero().flatten().tolist()
        gaps = {t: float(batch.proximal_log_probs[i, t] - batch.behaviour_log_probs[i, t]) for t in places}
        for t in places:
            log_prob, advantage = float(log_probs[i, t]), float(batch.advantages[i, t])
            ratio = math.exp(log_prob - float(batch.proximal_log_probs[i, t]))
            if config.loss == "clip":
                bounded = min(max(ratio, 0.8), 1.2)
                value = -min(ratio * advantage, bounded * advantage)
            else:
                value = -log_prob * (advantage if config.loss == "reinforce" else 1.0)
            weight = 1.0
            if config.loss != "nll":
                low, high = 0.6, 1.5
                own = math.exp(gaps[t])
                weight = {
                    "none": 1.0,
                    "token_truncated": min(own, high),
                    "sequence_truncated": min(math.exp(sum(gaps.values())), high),
                    "token_masked": own if low <= own <= high else 0.0,
                }[config.correction.method]
            difference = float(batch.reference_log_probs[i, t]) - log_prob
            kl = math.exp(difference) - 1 - difference
            by_token = weight * value + KL_COEFFICIENT * kl - config.entropy_coefficient * float(entropy[i, t])
            total += {
                "token_mean": by_token / tokens,
                "sequence_mean": by_token / len(places) / sequences,
                "sequence_sum": by_token / sequences,
            }[config.aggregation]
    return total


@pytest.mark.parametrize(("loss", "aggregation", "method"), [*itertools.product(LOSSES, AGGREGATIONS, METHODS)])
def test_the_loss_is_the_formula_written_out(loss: str, aggregation: str, method: str) -> None:
    config = settings_of(loss, aggregation, method)
    for seed in range(3):
        log_probs, entropy, batch = random_batch(seed)
        value, _, _ = run(log_probs, entropy, batch, config, Denominators(*count(batch.mask)))
        assert value == pytest.approx(written_out(log_probs, entropy, batch, config), abs=1e-12)


@pytest.mark.parametrize(("loss", "aggregation"), [*itertools.product(LOSSES, AGGREGATIONS)])
def test_the_gradient_is_that_of_finite_differences(loss: str, aggregation: str) -> None:
    log_probs, entropy, batch = random_batch(3)
    config, denominators = settings_of(loss, aggregation), Denominators(*count(batch.mask))

    def loss_of(leaf: Tensor, entropy_leaf: Tensor) -> Tensor:
        return objective(leaf, entropy_leaf, batch, config, denominators, KL_COEFFICIENT)[0]

    assert torch.autograd.gradcheck(loss_of, (log_probs, entropy.requires_grad_()))


@pytest.mark.parametrize(("aggregation", "method"), [*itertools.product(AGGREGATIONS, METHODS)])
@given(seed=st.integers(0, 1000), cut=st.integers(1, 4))
@settings(max_examples=20)
def test_parts_of_a_batch_add_up_to_the_whole(aggregation: str, method: str, seed: int, cut: int) -> None:
    config = settings_of("clip", aggregation, method)
    log_probs, entropy, batch = random_batch(seed)
    denominators = Denominators(*count(batch.mask))
    loss, gradient, metrics = run(log_probs, entropy, batch, config, denominators)
    rows = (slice(None, cut), slice(cut, None))
    parts = [run(log_probs[r], entropy[r], part_of(batch, r), config, denominators) for r in rows]
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), gradient)
    for name, value in metrics.sums.items():
        assert sum(float(part[2].sums[name]) for part in parts) == pytest.approx(float(value), abs=1e-12), name
    for name, value in metrics.maxima.items():
        assert max(float(part[2].maxima[name]) for part in parts) == float(value), name


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("loss", LOSSES)
def test_whatever_stands_outside_the_mask_changes_nothing(loss: str, garbage: float) -> None:
    config = settings_of(loss, "sequence_mean", "sequence_truncated")
    log_probs, entropy, batch = random_batch(4)
    denominators = Denominators(*count(batch.mask))
    dirty = {f.name: getattr(batch, f.name).masked_fill(~batch.mask, garbage) for f in dataclasses.fields(batch)[1:5]}
    clean_loss, clean_gradient, clean = run(log_probs, entropy, batch, config, denominators)
    loss_value, gradient, metrics = run(
        log_probs.detach().masked_fill(~batch.mask, garbage),
        entropy.masked_fill(~batch.mask, garbage),
        TokenBatch(batch.mask, **dirty),
        config,
        denominators,
    )
    assert loss_value == clean_loss
    assert torch.equal(gradient, clean_gradient)
    assert (gradient[~batch.mask] == 0).all()
    assert metrics == clean


def test_longer_padding_changes_nothing() -> None:
    log_probs, entropy, batch = random_batch(5)
    config, denominators = settings_of(), Denominators(*count(batch.mask))
    pad = torch.nn.functional.pad
    wide = TokenBatch(*(pad(getattr(batch, f.name), (0, 3)) for f in dataclasses.fields(batch)[:5]))
    loss, gradient, _ = run(log_probs, entropy, batch, config, denominators)
    wide_loss, wide_gradient, _ = run(pad(log_probs.detach(), (0, 3)), pad(entropy, (0, 3)), wide, config, denominators)
    assert wide_loss == pytest.approx(loss, abs=1e-15)
    torch.testing.assert_close(wide_gradient[:, :6], gradient)


@pytest.mark.parametrize("name", ["advantages", "behaviour_log_probs", "proximal_log_probs", "reference_log_probs"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_input_that_is_not_finite_is_refused_naming_tensor_and_token(name: str, bad: float) -> None:
    log_probs, entropy, batch = random_batch()
    getattr(batch, name)[0, 2] = bad
    with pytest.raises(NonFiniteError, match=rf"{name} of \(sequence, token\) \(0, 2\)"):
        run(log_probs, entropy, batch, settings_of(), Denominators(*count(batch.mask)))


@pytest.mark.parametrize("name", ["log_probs", "entropy"])
def test_a_model_output_that_is_nan_is_refused(name: str) -> None:
    log_probs, entropy, batch = random_batch()
    outputs = {"log_probs": log_probs.detach(), "entropy": entropy}
    outputs[name][0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=name):
        objective(**outputs, batch=batch, config=settings_of(), denominators=Denominators(9, 5), kl_coefficient=0.0)


def test_without_proximal_log_probs_the_ratio_is_one_and_the_current_ones_are_corrected() -> None:
    log_probs, entropy, batch = random_batch(6)
    config, denominators = settings_of(), Denominators(*count(batch.mask))
    _, gradient, metrics = run(
        log_probs, entropy, dataclasses.replace(batch, proximal_log_probs=None), config, denominators
    )
    _, same_gradient, same = run(
        log_probs, entropy, dataclasses.replace(batch, proximal_log_probs=log_probs.detach()), config, denominators
    )
    assert torch.equal(gradient, same_gradient)
    assert metrics == same
    assert float(metrics.sums["ratio_mean"]) == pytest.approx(1.0)
    assert float(metrics.maxima["max_ratio"]) == 1.0


def test_metrics_are_those_worked_by_hand() -> None:
    # One sequence of two trained tokens and padding. proximal / behaviour: 2 and 1/2; pi / proximal: 1.5 and 0.5.
    mask = torch.tensor([[True, True, False]])
    behaviour = torch.tensor([[-2.0, -2.0, 0.0]])
    proximal = behaviour + torch.tensor([[2.0, 0.5, 1.0]]).log()
    log_probs = proximal + torch.tensor([[1.5, 0.5, 1.0]]).log()
    batch = TokenBatch(mask, torch.tensor([[1.0, -3.0, 9.0]]), behaviour, proximal)
    config = AlgorithmConfig.model_validate({"correction": {"method": "token_truncated", "options": {"high": 1.5}}})
    _, metrics = objective(log_probs, None, batch, config, Denominators(2, 1), 0.0)
    found = finish_metrics(
        {name: float(value) for name, value in metrics.sums.items()},
        {name: float(value) for name, value in metrics.maxima.items()},
    )
    log2 = math.log(2)
    expected = {
        # Weights 1.5 and 0.5; -min terms: -1.2 (clipped at 1.2) and 3 * 0.8 (clipped at 0.8).
        "loss": (1.5 * -1.2 + 0.5 * 2.4) / 2,
        "policy_loss": (1.5 * -1.2 + 0.5 * 2.4) / 2,
        "clip_low_share": 0.5,
        "clip_high_share": 0.5,
        "ratio_mean": 1.0,
        "importance_weight_mean": 1.0,
        "effective_sample_share": 1.0 / ((2.25 + 0.25) / 2),
        "corrected_share": 0.5,
        "mismatch_kl": ((2 - 1 - log2) + (0.5 - 1 + log2)) / 2,
        "advantage_mean": -1.0,
        "advantage_abs": 2.0,
        "max_ratio": 1.5,
        "max_logprob_gap": log2,
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_supervised_fine_tuning_needs_no_sampler() -> None:
    log_probs = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    nothing = torch.full((1, 2), math.nan)
    batch = TokenBatch(torch.ones(1, 2, dtype=torch.bool), advantages=nothing, behaviour_log_probs=nothing)
    loss, metrics = objective(log_probs, None, batch, AlgorithmConfig(loss="nll"), Denominators(2, 1), 0.0)
    assert float(loss) == 2.0
    assert float(metrics.sums["mismatch_kl"]) == 0.0
    assert float(metrics.sums["importance_weight_mean"]) == 1.0


def test_bfloat16_log_probs_are_summed_in_float32() -> None:
    log_probs, _, batch = random_batch()
    loss, _ = objective(log_probs.bfloat16(), None, batch, AlgorithmConfig(), Denominators(10, 5), 0.0)
    assert loss.dtype == torch.float32


def test_a_kl_placed_in_the_reward_stays_out_of_the_loss_but_is_reported() -> None:
    log_probs, entropy, batch = random_batch()
    denominators = Denominators(*count(batch.mask))
    config = AlgorithmConfig.model_validate({"kl": {"coefficient": 0.3, "placement": "reward", "estimator": "k1"}})
    loss, metrics = objective(log_probs, entropy, batch, config, denominators, kl_coefficient=0.3)
    without, _ = objective(log_probs, entropy, batch, AlgorithmConfig(), denominators, kl_coefficient=0.0)
    assert torch.equal(loss, without)
    assert float(metrics.sums["kl_loss"]) == 0.0
    assert float(metrics.sums["kl_reference"]) != 0.0


def test_a_kl_in_the_loss_without_a_reference_is_refused() -> None:
    log_probs, entropy, batch = random_batch()
    with pytest.raises(ValueError, match="no reference_log_probs"):
        run(
            log_probs,
            entropy,
            dataclasses.replace(batch, reference_log_probs=None),
            settings_of(),
            Denominators(9, 5),
        )


def test_an_entropy_bonus_without_entropy_is_refused() -> None:
    log_probs, _, batch = random_batch()
    with pytest.raises(ValueError, match="no entropy was given"):
        objective(log_probs, None, batch, settings_of(), Denominators(9, 5), 0.0)


def test_shapes_that_differ_are_refused_naming_the_tensor() -> None:
    log_probs, entropy, batch = random_batch()
    with pytest.raises(ValueError, match=r"advantages is \[5, 5\], but the mask is \[5, 6\]"):
        run(
            log_probs,
            entropy,
            dataclasses.replace(batch, advantages=batch.advantages[:, :5]),
            settings_of(),
            Denominators(9, 5),
        )


def test_an_unknown_loss_is_refused() -> None:
    log_probs, entropy, batch = random_batch()
    with pytest.raises(RegistryError, match="Did you mean 'clip'"):
        run(log_probs, entropy, batch, AlgorithmConfig(loss="clipp"), Denominators(9, 5))


def test_a_users_own_loss_is_used_by_name() -> None:
    if "squared_for_this_test" not in POLICY_LOSSES:

        @policy_loss("squared_for_this_test")
        def squared(inputs: LossInputs, options: Options) -> TokenLoss:
            return TokenLoss(inputs.log_probs.square())

    log_probs = torch.tensor([[-2.0, -4.0]])
    batch = TokenBatch(torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2), behaviour_log_probs=log_probs)
    loss, _ = objective(log_probs, None, batch, AlgorithmConfig(loss="squared_for_this_test"), Denominators(2, 1), 0.0)
    assert float(loss) == 10.0
