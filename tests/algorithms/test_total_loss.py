"""The loss of a batch: exact over any split, blind to padding, and equal to the formula written out."""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.aggregation import Denominators, count
from algorithms.config import AlgorithmConfig
from algorithms.finite import NonFiniteError
from algorithms.inputs import BatchTokens, LossInputs, TokenLoss
from algorithms.kl import kl_estimator
from algorithms.objective_metrics import ObjectiveMetrics
from algorithms.registry import KL_ESTIMATORS, POLICY_LOSSES, Options, RegistryError, policy_loss
from algorithms.total_loss import TokenBatch, finish_metrics, total_loss

LOSSES = ("clip", "reinforce", "nll")
AGGREGATIONS: dict[str, dict[str, Any]] = {
    "token_mean": {},
    "sequence_mean": {},
    "sequence_sum": {},
    "constant_length": {"length": 4},
}
METHODS: dict[str, dict[str, Any]] = {
    "none": {},
    "token_truncated": {"high": 1.5},
    "sequence_truncated": {"high": 1.5},
    "token_masked": {"low": 0.6, "high": 1.5},
    "sequence_masked": {"low": 0.4, "high": 1.9},
    "geometric_masked": {"low": 0.9, "high": 1.3, "truncate": 1.2},
}
ESTIMATORS = ("k1", "k2", "k3", "k3_unbiased", "abs", "full")
VETO = 0.45
EMPTY = ("mask", "marks")
"""Fields of a random batch that hold no numbers."""
KL_COEFFICIENT = 0.3


def settings_of(
    loss: str = "clip",
    aggregation: str = "token_mean",
    method: str = "token_truncated",
    *,
    estimator: str = "k3",
    veto: float | None = None,
) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate(
        {
            "loss": loss,
            "aggregation": aggregation,
            "aggregation_options": AGGREGATIONS[aggregation],
            "correction": {"method": method, "options": METHODS[method], "veto": veto},
            "kl": {"coefficient": KL_COEFFICIENT, "estimator": estimator},
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
    return on_each(batch, lambda value: value[rows, tokens])


def on_each(batch: TokenBatch, change: Callable[[Tensor], Tensor]) -> TokenBatch:
    """A batch with all its tensors changed."""
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    changed = {name: change(value) for name, value in fields.items() if value is not None}
    return dataclasses.replace(batch, **changed)


def run(
    log_probs: Tensor,
    entropy: Tensor,
    batch: TokenBatch,
    config: AlgorithmConfig,
    denominators: Denominators,
    full_kl: Tensor | None = None,
) -> tuple[float, Tensor, ObjectiveMetrics]:
    """Loss, gradient by log-probabilities, and metrics."""
    leaf = log_probs.detach().clone().requires_grad_()
    loss, metrics = total_loss(leaf, entropy, batch, config, denominators, KL_COEFFICIENT, full_kl)
    loss.backward()
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad, metrics


def weights_written_out(gaps: list[float], method: str, veto: float | None) -> list[float]:
    """Importance weights of a sequence's tokens from log proximal - log behaviour of each."""
    switches = METHODS[method]
    low, high, product = switches.get("low", 0.0), switches.get("high", math.inf), math.exp(sum(gaps))
    is_vetoed = veto is not None and any(math.exp(gap) < veto for gap in gaps)
    is_near = low <= math.exp(sum(gaps) / len(gaps)) <= high
    weights = []
    for own in map(math.exp, gaps):
        weight = {
            "none": 1.0,
            "token_truncated": min(own, high),
            "sequence_truncated": min(product, high),
            "token_masked": own if low <= own <= high else 0.0,
            "sequence_masked": product if low <= product <= high else 0.0,
            "geometric_masked": min(own, switches.get("truncate", 1.0)) if is_near else 0.0,
        }[method]
        weights.append(0.0 if is_vetoed else weight)
    return weights


def kl_written_out(difference: float, exact: float, estimator: str) -> float:
    """KL of a token, with difference = log reference - log pi."""
    k3 = math.exp(difference) - 1 - difference
    values = {"k1": -difference, "k2": difference**2 / 2, "k3": k3, "k3_unbiased": k3, "abs": abs(difference)}
    return (values | {"full": exact})[estimator]


def written_out(
    log_probs: Tensor, entropy: Tensor, batch: TokenBatch, config: AlgorithmConfig, full_kl: Tensor
) -> float:
    """The objective as the papers write it, a token at a time."""
    log_probs = log_probs.detach()
    assert batch.proximal_log_probs is not None
    assert batch.reference_log_probs is not None
    tokens, sequences = count(batch.mask)
    total = 0.0
    for i in range(len(batch.mask)):
        places = batch.mask[i].nonzero().flatten().tolist()
        gaps = [float(batch.proximal_log_probs[i, t] - batch.behaviour_log_probs[i, t]) for t in places]
        weights = [1.0] * len(places)
        if config.loss != "nll" and places:
            weights = weights_written_out(gaps, config.correction.method, config.correction.veto)
        for t, weight in zip(places, weights, strict=True):
            log_prob, advantage = float(log_probs[i, t]), float(batch.advantages[i, t])
            ratio = math.exp(log_prob - float(batch.proximal_log_probs[i, t]))
            if config.loss == "clip":
                value = -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage)
            else:
                value = -log_prob * (advantage if config.loss == "reinforce" else 1.0)
            difference = float(batch.reference_log_probs[i, t]) - log_prob
            kl = kl_written_out(difference, float(full_kl[i, t]), config.kl.estimator)
            by_token = weight * value + KL_COEFFICIENT * kl - config.entropy_coefficient * float(entropy[i, t])
            total += {
                "token_mean": by_token / tokens,
                "sequence_mean": by_token / len(places) / sequences,
                "sequence_sum": by_token / sequences,
                "constant_length": by_token / 4 / sequences,
            }[config.aggregation]
    return total


@pytest.mark.parametrize(
    ("loss", "aggregation", "method", "veto"), [*itertools.product(LOSSES, AGGREGATIONS, METHODS, (None, VETO))]
)
def test_the_loss_is_the_formula_written_out(loss: str, aggregation: str, method: str, veto: float | None) -> None:
    config = settings_of(loss, aggregation, method, veto=veto)
    for seed in range(3):
        log_probs, entropy, batch = random_batch(seed)
        value, _, _ = run(log_probs, entropy, batch, config, Denominators(*count(batch.mask)))
        assert value == pytest.approx(written_out(log_probs, entropy, batch, config, entropy), abs=1e-12)


@pytest.mark.parametrize(("estimator", "aggregation"), [*itertools.product(ESTIMATORS, AGGREGATIONS)])
def test_the_loss_with_each_kl_is_the_formula_written_out(estimator: str, aggregation: str) -> None:
    config = settings_of("clip", aggregation, estimator=estimator)
    log_probs, entropy, batch = random_batch(7)
    full_kl = entropy / 3
    value, _, metrics = run(log_probs, entropy, batch, config, Denominators(*count(batch.mask)), full_kl)
    assert value == pytest.approx(written_out(log_probs, entropy, batch, config, full_kl), abs=1e-12)
    assert float(metrics.sums["kl_reference"]) != 0.0


@pytest.mark.parametrize(("loss", "aggregation"), [*itertools.product(LOSSES, AGGREGATIONS)])
def test_the_gradient_is_that_of_finite_differences(loss: str, aggregation: str) -> None:
    log_probs, entropy, batch = random_batch(3)
    config, denominators = settings_of(loss, aggregation), Denominators(*count(batch.mask))

    def loss_of(leaf: Tensor, entropy_leaf: Tensor) -> Tensor:
        return total_loss(leaf, entropy_leaf, batch, config, denominators, KL_COEFFICIENT)[0]

    assert torch.autograd.gradcheck(loss_of, (log_probs, entropy.requires_grad_()))


def test_the_exact_kl_carries_its_gradient_into_the_loss() -> None:
    log_probs, entropy, batch = random_batch(8)
    config, denominators = settings_of(estimator="full"), Denominators(*count(batch.mask))
    full_kl = (entropy / 2).requires_grad_()
    loss, _ = total_loss(log_probs, entropy.detach(), batch, config, denominators, KL_COEFFICIENT, full_kl)
    loss.backward()
    assert full_kl.grad is not None
    torch.testing.assert_close(
        full_kl.grad, batch.mask * torch.tensor(KL_COEFFICIENT / denominators.tokens, dtype=torch.float64)
    )


def as_floats(values: dict[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


@pytest.mark.parametrize(("aggregation", "method"), [*itertools.product(AGGREGATIONS, METHODS)])
@given(seed=st.integers(0, 1000), cut=st.integers(1, 4))
@settings(max_examples=10)
def test_parts_of_a_batch_add_up_to_the_whole(aggregation: str, method: str, seed: int, cut: int) -> None:
    config = settings_of("clip", aggregation, method, veto=VETO)
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


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_of_two_micro_batches_and_a_filler_report_what_one_rank_reports(method: str) -> None:
    config = settings_of("clip", "sequence_mean", method, veto=VETO)
    log_probs, entropy, batch = random_batch(9, sequences=6)
    denominators = Denominators(*count(batch.mask))
    loss, gradient, metrics = run(log_probs, entropy, batch, config, denominators)
    filler = (log_probs[:1], entropy[:1], dataclasses.replace(part_of(batch, slice(1)), mask=batch.mask[:1] & False))
    rows = [slice(0, 2), slice(2, 3), slice(3, 6)]
    parts = [run(log_probs[r], entropy[r], part_of(batch, r), config, denominators) for r in rows]
    parts.append(run(*filler, config, denominators))
    assert (parts[-1][1] == 0).all()
    ranks = [parts[:2], parts[2:]]
    sums = [{n: sum(float(part[2].sums[n]) for part in rank) for n in metrics.sums} for rank in ranks]
    maxima = {n: max(float(part[2].maxima[n]) for part in parts) for n in metrics.maxima}
    found = finish_metrics({n: sums[0][n] + sums[1][n] for n in metrics.sums}, maxima)
    assert found == pytest.approx(finish_metrics(as_floats(metrics.sums), as_floats(metrics.maxima)), abs=1e-12)
    assert sum(part[0] for part in parts) == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(torch.cat([part[1] for part in parts[:3]]), gradient)


@pytest.mark.parametrize("method", ["none", "token_truncated", "token_masked"])
@pytest.mark.parametrize("loss", LOSSES)
def test_tokens_end_to_end_give_what_padded_rows_give(loss: str, method: str) -> None:
    # Where nothing is summed over a sequence, rows don't matter: one row of all tokens is the same batch.
    config = settings_of(loss, "token_mean", method)
    log_probs, entropy, batch = random_batch(10)
    packed = on_each(batch, lambda value: value[batch.mask][None])
    denominators = Denominators(*count(batch.mask))
    value, gradient, _ = run(log_probs, entropy, batch, config, denominators)
    packed_value, packed_gradient, _ = run(
        log_probs[batch.mask][None], entropy[batch.mask][None], packed, config, denominators
    )
    assert packed_value == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(packed_gradient[0], gradient[batch.mask])


@pytest.mark.parametrize("method", METHODS)
def test_the_order_of_the_sequences_changes_nothing(method: str) -> None:
    config = settings_of("clip", "sequence_mean", method, veto=VETO)
    log_probs, entropy, batch = random_batch(11)
    denominators = Denominators(*count(batch.mask))
    order = torch.tensor([3, 0, 4, 1, 2])
    shuffled = on_each(batch, lambda value: value[order])
    value, gradient, _ = run(log_probs, entropy, batch, config, denominators)
    other, other_gradient, _ = run(log_probs[order], entropy[order], shuffled, config, denominators)
    assert other == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(other_gradient, gradient[order])


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("loss", LOSSES)
def test_whatever_stands_outside_the_mask_changes_nothing(loss: str, garbage: float) -> None:
    config = settings_of(loss, "sequence_mean", "sequence_truncated")
    log_probs, entropy, batch = random_batch(4)
    denominators = Denominators(*count(batch.mask))
    fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
    dirty = {name: value.masked_fill(~batch.mask, garbage) for name, value in fields.items() if name not in EMPTY}
    clean_loss, clean_gradient, clean = run(log_probs, entropy, batch, config, denominators)
    loss_value, gradient, metrics = run(
        log_probs.detach().masked_fill(~batch.mask, garbage),
        entropy.masked_fill(~batch.mask, garbage),
        dataclasses.replace(batch, **dirty),
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
    wide = on_each(batch, lambda value: pad(value, (0, 3)))
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
        total_loss(**outputs, batch=batch, config=settings_of(), denominators=Denominators(9, 5), kl_coefficient=0.0)


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
    _, metrics = total_loss(log_probs, None, batch, config, Denominators(2, 1), 0.0)
    found = finish_metrics(as_floats(metrics.sums), as_floats(metrics.maxima))
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
        "rejected_share": 0.0,
        "mismatch_kl": ((2 - 1 - log2) + (0.5 - 1 + log2)) / 2,
        "mismatch_kl_k1": 0.0,
        # One sequence, of mean weight 1, touched and kept.
        "sequence_weight_mean": 1.0,
        "effective_sequence_share": 1.0,
        "corrected_sequences_share": 1.0,
        "rejected_sequences_share": 0.0,
        "vetoed_sequences_share": 0.0,
        "advantage_mean": -1.0,
        "advantage_abs": 2.0,
        "max_ratio": 1.5,
        "max_logprob_gap": log2,
    }
    assert found == pytest.approx(expected, rel=1e-5, abs=1e-7)


@pytest.mark.parametrize("nothing", [None, torch.full((1, 2), math.nan)], ids=["no columns", "columns of NaN"])
def test_supervised_fine_tuning_needs_no_sampler(nothing: Tensor | None) -> None:
    log_probs = torch.tensor([[-1.0, -3.0]], requires_grad=True)
    batch = TokenBatch(torch.ones(1, 2, dtype=torch.bool), advantages=nothing, behaviour_log_probs=nothing)
    loss, metrics = total_loss(log_probs, None, batch, AlgorithmConfig(loss="nll"), Denominators(2, 1), 0.0)
    assert float(loss.detach()) == 2.0
    assert float(metrics.sums["mismatch_kl"]) == 0.0
    assert float(metrics.sums["importance_weight_mean"]) == 1.0


def test_a_loss_that_learns_from_rollouts_needs_their_columns() -> None:
    batch = TokenBatch(torch.ones(1, 2, dtype=torch.bool), advantages=torch.ones(1, 2))
    with pytest.raises(ValueError, match="learns from rollouts, but the batch has no advantages or behaviour"):
        total_loss(torch.zeros(1, 2), None, batch, AlgorithmConfig(), Denominators(2, 1), 0.0)


def test_bfloat16_log_probs_are_summed_in_float32() -> None:
    log_probs, _, batch = random_batch()
    loss, _ = total_loss(log_probs.bfloat16(), None, batch, AlgorithmConfig(), Denominators(10, 5), 0.0)
    assert loss.dtype == torch.float32


def test_a_kl_placed_in_the_reward_stays_out_of_the_loss_but_is_reported() -> None:
    log_probs, entropy, batch = random_batch()
    denominators = Denominators(*count(batch.mask))
    config = AlgorithmConfig.model_validate({"kl": {"coefficient": 0.3, "placement": "reward", "estimator": "k1"}})
    loss, metrics = total_loss(log_probs, entropy, batch, config, denominators, kl_coefficient=0.3)
    without, _ = total_loss(log_probs, entropy, batch, AlgorithmConfig(), denominators, kl_coefficient=0.0)
    assert torch.equal(loss, without)
    assert float(metrics.sums["kl_loss"]) == 0.0
    assert float(metrics.sums["kl_reference"]) != 0.0


def test_a_users_kl_that_is_not_zero_for_equal_models_counts_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(KL_ESTIMATORS, "_entries", dict(KL_ESTIMATORS._entries))

    @kl_estimator("one_more")
    def one_more(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
        return (log_probs - reference_log_probs).square() / 2 + 1

    # Three trained tokens of six, (1 + 1 + 3) / 3 nats by the estimator; the padding would add three more.
    log_probs = torch.tensor([[-1.0, -1.0, 0.0], [-3.0, 0.0, 0.0]])
    reference = torch.tensor([[-1.0, -1.0, 0.0], [-1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, False], [True, False, False]])
    batch = TokenBatch(mask, torch.zeros(2, 3), behaviour_log_probs=log_probs, reference_log_probs=reference)
    config = AlgorithmConfig.model_validate({"kl": {"coefficient": 0.3, "estimator": "one_more"}})
    _, metrics = total_loss(log_probs, None, batch, config, Denominators(3, 2), kl_coefficient=0.3)
    assert float(metrics.sums["kl_reference"]) == pytest.approx(5 / 3)
    assert float(metrics.sums["kl_loss"]) == pytest.approx(0.3 * 5 / 3)


def test_a_kl_in_the_loss_without_a_reference_is_refused() -> None:
    log_probs, entropy, batch = random_batch()
    with pytest.raises(ValueError, match=r"weight 0\.3 in the loss by k3, but the batch has no reference_log_probs"):
        run(
            log_probs,
            entropy,
            dataclasses.replace(batch, reference_log_probs=None),
            settings_of(),
            Denominators(9, 5),
        )


def test_an_exact_kl_that_was_not_computed_is_refused_and_one_of_no_weight_is_left_out() -> None:
    log_probs, entropy, batch = random_batch()
    config, denominators = settings_of(estimator="full"), Denominators(*count(batch.mask))
    with pytest.raises(ValueError, match=r"in the loss by full, but no full_kl was given"):
        run(log_probs, entropy, batch, config, denominators)
    _, metrics = total_loss(log_probs, entropy, batch, config, denominators, kl_coefficient=0.0)
    assert "kl_reference" not in metrics.sums


def test_an_exact_kl_that_is_not_finite_is_refused() -> None:
    log_probs, entropy, batch = random_batch()
    full_kl = entropy.masked_fill(torch.arange(6) == 2, math.inf)
    with pytest.raises(NonFiniteError, match=r"full_kl of \(sequence, token\) \(0, 2\)"):
        run(log_probs, entropy, batch, settings_of(estimator="full"), Denominators(9, 5), full_kl)


def test_an_entropy_bonus_without_entropy_is_refused() -> None:
    log_probs, _, batch = random_batch()
    with pytest.raises(ValueError, match="no entropy was given"):
        total_loss(log_probs, None, batch, settings_of(), Denominators(9, 5), 0.0)


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


@pytest.fixture
def own_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses added in a test go with it."""
    monkeypatch.setattr(POLICY_LOSSES, "_entries", dict(POLICY_LOSSES._entries))


class PowerOptions(Options):
    power: float = 2.0


@pytest.mark.usefixtures("own_losses")
def test_a_users_own_loss_is_used_by_name_with_its_switches() -> None:
    @policy_loss("power", options=PowerOptions)
    def power(inputs: LossInputs, options: PowerOptions) -> TokenLoss:
        return TokenLoss(inputs.log_probs.abs().pow(options.power))

    log_probs = torch.tensor([[-2.0, -4.0]])
    batch = TokenBatch(torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2), behaviour_log_probs=log_probs)
    for options, expected in (({}, 10.0), ({"power": 1.0}, 3.0)):
        config = AlgorithmConfig(loss="power", loss_options=options)
        assert float(total_loss(log_probs, None, batch, config, Denominators(2, 1), 0.0)[0]) == expected
    config = AlgorithmConfig(loss="power", loss_options={"powr": 1.0})
    with pytest.raises(RegistryError, match=r"algorithm\.loss_options\.powr is not an option of 'power'"):
        total_loss(log_probs, None, batch, config, Denominators(2, 1), 0.0)


@pytest.mark.usefixtures("own_losses")
def test_a_loss_that_weighs_by_the_behaviour_policy_itself_is_not_corrected_but_the_mismatch_is_seen() -> None:
    @policy_loss("own_weights", corrects_mismatch=True)
    def own_weights(inputs: LossInputs, options: Options) -> TokenLoss:
        return TokenLoss(-inputs.advantages * inputs.log_probs)

    log_probs, entropy, batch = random_batch(12)
    denominators = Denominators(*count(batch.mask))
    value, _, metrics = run(log_probs, entropy, batch, settings_of("own_weights", veto=VETO), denominators)
    plain, _, _ = run(log_probs, entropy, batch, settings_of("reinforce", method="none"), denominators)
    assert value == plain
    assert float(metrics.sums["importance_weight_mean"]) == pytest.approx(1.0)
    assert float(metrics.sums["corrected_share"]) == 0.0
    assert float(metrics.sums["mismatch_kl"]) > 0.0


@pytest.mark.usefixtures("own_losses")
def test_what_a_loss_prepared_of_the_whole_batch_reaches_it_and_must_be_there() -> None:
    def prepare(tokens: BatchTokens, options: Options) -> Tensor:
        return tokens.advantages - tokens.advantages[tokens.mask].mean()

    @policy_loss("centred", prepare=prepare)
    def centred(inputs: LossInputs, options: Options) -> TokenLoss:
        assert inputs.marks is not None
        return TokenLoss(-inputs.marks * inputs.log_probs)

    log_probs, config = torch.tensor([[-1.0, -2.0], [-4.0, math.nan]]), AlgorithmConfig(loss="centred")
    mask = torch.tensor([[True, True], [True, False]])
    advantages = torch.tensor([[1.0, 2.0], [6.0, math.nan]])
    sample, packed = torch.tensor([0, 0, 1]), advantages[mask]
    tokens = BatchTokens(sample, torch.ones(3, dtype=torch.bool), packed, log_probs[mask], log_probs[mask])
    marks = torch.full((2, 2), math.nan).masked_scatter(mask, prepare(tokens, Options()))
    batch = TokenBatch(mask, advantages, log_probs, marks=marks)
    denominators = Denominators(3, 2)
    # Centred advantages -2, -1, 3: the losses are -2, -2 and 12.
    assert float(total_loss(log_probs, None, batch, config, denominators, 0.0)[0]) == pytest.approx(8 / 3)
    rows = [part_of(batch, slice(0, 1)), part_of(batch, slice(1, 2))]
    losses = [total_loss(log_probs[i : i + 1], None, rows[i], config, denominators, 0.0)[0] for i in range(2)]
    assert float(sum(losses)) == pytest.approx(8 / 3)
    with pytest.raises(ValueError, match="the loss 'centred' needs marks"):
        total_loss(log_probs, None, dataclasses.replace(batch, marks=None), config, denominators, 0.0)


@pytest.mark.usefixtures("own_losses")
@pytest.mark.parametrize(
    ("made", "error", "message"),
    [
        (lambda x: x / 0.0, NonFiniteError, r"the loss 'broken' of \(sequence, token\) \(0, 0\) is -inf"),
        (lambda x: x[:, :1], ValueError, r"the loss 'broken' is \[1, 1\], but the mask is \[1, 2\]"),
    ],
)
def test_a_users_loss_that_is_not_finite_or_of_another_shape_is_refused_by_name(
    made: Callable[[Tensor], Tensor], error: type[Exception], message: str
) -> None:
    @policy_loss("broken")
    def broken(inputs: LossInputs, options: Options) -> TokenLoss:
        return TokenLoss(made(inputs.log_probs))

    log_probs = torch.tensor([[-2.0, -4.0]])
    batch = TokenBatch(torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2), behaviour_log_probs=log_probs)
    with pytest.raises(error, match=message):
        total_loss(log_probs, None, batch, AlgorithmConfig(loss="broken"), Denominators(2, 1), 0.0)
