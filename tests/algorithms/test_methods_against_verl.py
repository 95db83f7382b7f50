"""Policy losses, aggregation, KL, the critic's loss and rollout corrections against verl's, where it is installed.

Run it in an environment that has verl (0.9.1 was compared); elsewhere it is skipped. Advantages are compared in
test_advantages_against_verl.py. Where the two differ:
- `vanilla` always has the third bound of dual_clip; clip is it with that bound out of reach.
- `gspo` is our gspo_token, which has gspo's value and gradient with one advantage a sequence; the log-ratio is cut at
  10, ours at 20.
- dppo_tv and dppo_kl have the value -r A log pi, ours -r A, which is the objective; the gradients agree.
- clip_cov has no loss on the tokens it leaves out, ours no gradient; it takes covariances with the current policy in
  each micro-batch and spares tokens that are clipped already, ours takes them once before the update.
- kl_cov adds |log r|, ours r - 1 - log r, which estimates the KL it is named for; it too ranks by the current policy.
- geo_mean (our gmpo) divides by all rows, ours by those with a trained token.
- k3 is cut at 10 in value, ours only the log-ratio at 20.
- seq-mean-token-sum-norm divides by the padded width unless told; ours asks for the length.
- Bounds of seq_mean_k1 and token_k1 are those of pi_behaviour / pi, ours of pi / pi_behaviour.
- Rejected tokens leave verl's denominators, so that the others weigh more; ours stay in.
- `bypass_mode` weighs by the policy of the moment, ours by the one at the start of the update.
verl's dro, its batch-normalised weights and its rejection by k2 and k3 have no counterpart here; topr, m2po, decoupled
and the exact KL have none there.
"""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms import losses_behaviour, losses_covariance, losses_sequence  # noqa: F401  registered by being imported
from algorithms.aggregation import Denominators, count, token_weights
from algorithms.config import AlgorithmConfig, CorrectionConfig
from algorithms.correction import correction_sums, finish_correction, importance_correction
from algorithms.inputs import BatchTokens, LossInputs
from algorithms.kl import AdaptiveKL, kl_estimate, kl_token_rewards
from algorithms.log_probs import statistics_of_logits
from algorithms.registry import POLICY_LOSSES
from algorithms.values import value_loss

core = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)
corrections = pytest.importorskip("verl.trainer.ppo.rollout_corr_helper", exc_type=ImportError)
functional = pytest.importorskip("verl.utils.torch_functional", exc_type=ImportError)
workers = pytest.importorskip("verl.workers.config", exc_type=ImportError)

SEEDS = range(6)
WIDTH = 12


def make_inputs(seed: int, *, is_by_sequence: bool = False, spread: float = 0.5, empty_rows: int = 0) -> LossInputs:
    """Rows of unequal length with gaps, and some without a trained token; the log-probabilities take a gradient."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    rows = 6
    mask = torch.rand(rows, WIDTH, generator=generator) < torch.linspace(0.3, 0.95, rows)[:, None]
    mask[:, 0] = True
    mask[:empty_rows] = False
    behaviour = -normal(rows, WIDTH).abs() - 0.01
    proximal = (behaviour + 0.3 * spread * normal(rows, WIDTH)).clamp(max=-1e-3)
    current = (proximal + spread * normal(rows, WIDTH)).clamp(max=-1e-3)
    advantages = normal(rows, 1).expand(-1, WIDTH) if is_by_sequence else normal(rows, WIDTH)
    current = (current * mask).requires_grad_()
    return LossInputs(current, proximal * mask, behaviour * mask, advantages * mask, mask)


def actor(**settings: Any) -> Any:
    return workers.ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, **settings)


def denominators(mask: Tensor) -> Denominators:
    return Denominators(*map(float, count(mask)))


def our_loss(name: str, inputs: LossInputs, aggregation: str, **options: object) -> Tensor:
    entry = POLICY_LOSSES.get(name)
    values = entry.function(inputs, entry.read_options(options)).values
    config = AlgorithmConfig(aggregation=aggregation)
    return (values * token_weights(inputs.mask, config, denominators(inputs.mask), values)).sum()


def their_loss(name: str, inputs: LossInputs, mode: str, config: Any, *, old: Tensor | None = None) -> Tensor:
    old = inputs.proximal_log_probs if old is None else old
    loss, _ = core.get_policy_loss_fn(name)(
        old, inputs.log_probs, inputs.advantages, inputs.mask.double(), mode, config
    )
    return loss


def gradient(loss: Tensor, inputs: LossInputs) -> Tensor:
    (slope,) = torch.autograd.grad(loss, inputs.log_probs, retain_graph=True)
    return slope


LOSSES = [
    ("dual_clip", {"low": 0.2, "high": 0.3, "dual": 1.5}, "vanilla", {"clip_ratio_c": 1.5}, "token"),
    ("clip", {"low": 0.2, "high": 0.3}, "vanilla", {"clip_ratio_c": 1e9}, "token"),
    ("gspo_token", {"low": 0.1, "high": 0.2}, "gspo", {}, "token"),
    ("gspo", {"low": 0.05, "high": 0.02}, "gspo", {}, "sequence"),
    ("cispo", {"low": 0.4, "high": 0.3}, "cispo", {}, "token"),
    ("sapo", {"positive": 1.0, "negative": 1.7}, "sapo", {"tau_pos": 1.0, "tau_neg": 1.7}, "token"),
    ("gpg", {}, "gpg", {}, "token"),
    ("gmpo", {"low": 0.3, "high": 0.4}, "geo_mean", {}, "sequence"),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "options", "peer", "settings", "unit"), LOSSES)
def test_policy_losses_agree_in_value_and_gradient(
    name: str, options: dict[str, float], peer: str, settings: dict[str, float], unit: str, seed: int
) -> None:
    inputs = make_inputs(seed, is_by_sequence=unit == "sequence")
    bounds = {f"clip_ratio_{side}": options[side] for side in ("low", "high") if side in options}
    found = our_loss(name, inputs, "sequence_mean", **options)
    expected = their_loss(peer, inputs, "seq-mean-token-mean", actor(**bounds, **settings))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, inputs), gradient(expected, inputs))


def test_the_bounds_bite_on_what_was_compared() -> None:
    for name, options, *_, unit in LOSSES:
        entry = POLICY_LOSSES.get(name)
        batches = [make_inputs(seed, is_by_sequence=unit == "sequence") for seed in SEEDS]
        losses = [entry.function(inputs, entry.read_options(options)) for inputs in batches]
        if "low" in options:
            for side in ("is_clipped_low", "is_clipped_high"):
                assert any((getattr(loss, side) & b.mask).any() for loss, b in zip(losses, batches, strict=True)), name


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", ["dppo_tv", "dppo_kl"])
def test_dppo_agrees_in_its_gradient_and_has_another_value(name: str, seed: int) -> None:
    """-r A log pi with the weight r held has the gradient of the objective -r A, but as a figure it says how rare the
    tokens were. Ours reports the objective.
    """
    inputs = make_inputs(seed, spread=1.0)
    config = actor(clip_ratio_low=0.1, clip_ratio_high=0.1, clip_ratio_c=2.0)
    found = our_loss(name, inputs, "token_mean", max_divergence=0.1, max_ratio=2.0)
    expected = their_loss(name, inputs, "token-mean", config, old=inputs.behaviour_log_probs)
    torch.testing.assert_close(gradient(found, inputs), gradient(expected, inputs))
    assert (gradient(found, inputs)[inputs.mask] == 0).any()
    assert (found - expected).abs() > 1e-3


def marked(name: str, inputs: LossInputs, at: Tensor, **options: object) -> LossInputs:
    """The inputs with marks of covariances under the log-probabilities `at`, for all rows as one batch."""
    entry = POLICY_LOSSES.get(name)
    assert entry.prepare is not None
    sample = torch.arange(len(inputs.mask)).repeat_interleave(WIDTH)
    tokens = BatchTokens(sample, inputs.mask.flatten(), inputs.advantages.flatten(), at.flatten(), at.flatten())
    return replace(inputs, marks=entry.prepare(tokens, entry.read_options(options)).view_as(inputs.log_probs))


@pytest.mark.parametrize("seed", SEEDS)
def test_clip_cov_agrees_in_its_gradient_where_it_leaves_out_all_that_qualify(seed: int) -> None:
    """Which are drawn is chance: with a share of 1 it's all, and before the first update none is clipped yet."""
    inputs = make_inputs(seed, spread=0.0)
    settings = workers.PolicyLossConfig(clip_cov_ratio=1.0, clip_cov_lb=0.1, clip_cov_ub=0.8)
    options = {"share": 1.0, "covariance_low": 0.1, "covariance_high": 0.8}
    inputs = marked("clip_cov", inputs, inputs.proximal_log_probs, **options)
    assert inputs.marks is not None
    assert 0 < inputs.marks.sum() < inputs.mask.sum()
    found = our_loss("clip_cov", inputs, "token_mean", **options)
    expected = their_loss("clip_cov", inputs, "token-mean", actor(policy_loss=settings))
    torch.testing.assert_close(gradient(found, inputs), gradient(expected, inputs))
    # Theirs leaves them out of the value as well, so that it jumps with the draw; ours keeps the objective's.
    missing = (inputs.marks * inputs.advantages).sum() / inputs.mask.sum()
    torch.testing.assert_close(found, expected - missing)


def test_verls_clip_cov_ranks_by_the_policy_of_the_moment_and_spares_what_is_clipped() -> None:
    """Ours is settled before the update: what is left out doesn't depend on how the batch is cut into parts."""
    settings = workers.PolicyLossConfig(clip_cov_ratio=1.0, clip_cov_lb=0.1, clip_cov_ub=0.8)
    options = {"share": 1.0, "covariance_low": 0.1, "covariance_high": 0.8}
    inputs = make_inputs(0)
    inputs = marked("clip_cov", inputs, inputs.proximal_log_probs, **options)
    found = gradient(our_loss("clip_cov", inputs, "token_mean", **options), inputs)
    expected = gradient(their_loss("clip_cov", inputs, "token-mean", actor(policy_loss=settings)), inputs)
    assert ((found == 0) != (expected == 0)).any()


@pytest.mark.parametrize("seed", SEEDS)
def test_verls_kl_cov_adds_the_size_of_the_log_ratio_where_ours_adds_an_estimate_of_the_kl(seed: int) -> None:
    """|log r| isn't an estimate of KL(pi_proximal || pi) and pulls as hard on a token that has hardly moved."""
    inputs = make_inputs(seed)
    inputs = marked("kl_cov", inputs, inputs.log_probs.detach(), share=0.3)
    settings = workers.PolicyLossConfig(kl_cov_ratio=0.3, ppo_kl_coef=0.7)
    found = our_loss("kl_cov", inputs, "token_mean", share=0.3, coefficient=0.7)
    expected = their_loss("kl_cov", inputs, "token-mean", actor(policy_loss=settings))
    log_ratio = (inputs.log_probs - inputs.proximal_log_probs).detach()
    assert inputs.marks is not None
    swapped = 0.7 * inputs.marks * (log_ratio.abs() - log_ratio.expm1() + log_ratio)
    torch.testing.assert_close(found + swapped.sum() / inputs.mask.sum(), expected)
    # The unmarked tokens, and the choice of which are marked, agree.
    unmarked = inputs.marks == 0
    torch.testing.assert_close(gradient(found, inputs)[unmarked], gradient(expected, inputs)[unmarked])
    assert ((found - expected).abs() > 1e-4).all()


def test_verls_kl_cov_ranks_by_the_policy_of_the_moment() -> None:
    """As its clip_cov does. Which tokens are held back then changes within an update, with what it has just learned."""
    inputs = make_inputs(0)
    inputs = marked("kl_cov", inputs, inputs.proximal_log_probs, share=0.3)
    settings = workers.PolicyLossConfig(kl_cov_ratio=0.3, ppo_kl_coef=0.7)
    found = gradient(our_loss("kl_cov", inputs, "token_mean", share=0.3, coefficient=0.7), inputs)
    expected = gradient(their_loss("kl_cov", inputs, "token-mean", actor(policy_loss=settings)), inputs)
    assert inputs.marks is not None
    assert not torch.allclose(found[inputs.marks == 0], expected[inputs.marks == 0])


def test_before_the_first_update_kl_cov_agrees() -> None:
    inputs = make_inputs(0, spread=0.0)
    inputs = marked("kl_cov", inputs, inputs.proximal_log_probs, share=0.3)
    settings = workers.PolicyLossConfig(kl_cov_ratio=0.3)
    found = our_loss("kl_cov", inputs, "token_mean", share=0.3)
    expected = their_loss("kl_cov", inputs, "token-mean", actor(policy_loss=settings))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, inputs), gradient(expected, inputs))


def test_verls_gmpo_counts_rows_without_a_trained_token() -> None:
    """Such rows are padding or were left out; with them in the mean, the others learn less the more there are."""
    inputs = make_inputs(0, is_by_sequence=True, empty_rows=2)
    found = our_loss("gmpo", inputs, "sequence_mean", low=0.3, high=0.4)
    expected = their_loss("geo_mean", inputs, "", actor(clip_ratio_low=0.3, clip_ratio_high=0.4))
    torch.testing.assert_close(found * 4 / 6, expected)


def test_verls_gspo_cuts_the_sequences_ratio_at_another_place() -> None:
    """Both only keep exp from overflowing; with A < 0 the loss is unbounded above, so that they can be told apart."""
    ones = torch.ones(1, 3, dtype=torch.float64)
    inputs = LossInputs(-ones, -13 * ones, -13 * ones, -ones, ones.bool())
    found = our_loss("gspo", inputs, "sequence_mean")
    expected = their_loss("gspo", inputs, "seq-mean-token-mean", actor())
    torch.testing.assert_close(found.log(), torch.tensor(12.0).double())
    torch.testing.assert_close(expected.log(), torch.tensor(10.0).double())


AGGREGATIONS = [
    ("token_mean", {}, "token-mean"),
    ("sequence_mean", {}, "seq-mean-token-mean"),
    ("sequence_sum", {}, "seq-mean-token-sum"),
    ("constant_length", {"length": 20}, "seq-mean-token-sum-norm"),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "options", "mode"), AGGREGATIONS)
def test_aggregations_agree_whole_and_by_micro_batch(name: str, options: dict[str, Any], mode: str, seed: int) -> None:
    inputs = make_inputs(seed, empty_rows=2)
    config = AlgorithmConfig(aggregation=name, aggregation_options=options)
    sizes = denominators(inputs.mask)
    totals = {"batch_num_tokens": sizes.tokens, "global_batch_size": sizes.sequences, "loss_scale_factor": 20}
    whole = core.agg_loss(inputs.advantages, inputs.mask.double(), mode, loss_scale_factor=20)
    for rows in (slice(None), slice(0, 3), slice(3, 6)):
        values, mask = inputs.advantages[rows], inputs.mask[rows]
        found = (values * token_weights(mask, config, sizes, values)).sum()
        torch.testing.assert_close(found, core.agg_loss(values, mask.double(), mode, **totals))
        if rows == slice(None):
            torch.testing.assert_close(found, whole)


def test_verls_constant_length_is_by_default_the_width_that_a_batch_is_padded_to() -> None:
    """Which isn't constant: the same answers weigh less beside a longer one. Ours has no default."""
    values, mask = torch.ones(2, 4), torch.ones(2, 4)
    short = core.agg_loss(values, mask, "seq-mean-token-sum-norm")
    padded = [torch.nn.functional.pad(each, (0, 4)) for each in (values, mask)]
    assert core.agg_loss(*padded, "seq-mean-token-sum-norm") == short / 2


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "peer"), [("k1", "k1"), ("abs", "abs"), ("k2", "mse"), ("k3", "low_var_kl"), ("k3_unbiased", "k3+")]
)
def test_kl_estimators_agree_in_value_and_gradient(name: str, peer: str, seed: int) -> None:
    inputs = make_inputs(seed)
    found = kl_estimate(inputs.log_probs, inputs.behaviour_log_probs, name)
    expected = core.kl_penalty(inputs.log_probs, inputs.behaviour_log_probs, peer)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found.sum(), inputs), gradient(expected.sum(), inputs))


def test_verls_k3_is_flat_above_ten() -> None:
    """exp(3) - 1 - 3 = 16.1 is no longer estimated, and nothing pulls back just where it is needed most."""
    far, reference = torch.tensor([-4.0], requires_grad=True), torch.tensor([-1.0])
    theirs_far, ours_far = core.kl_penalty(far, reference, "k3"), kl_estimate(far, reference, "k3")
    assert theirs_far.item() == 10.0
    assert ours_far.item() == pytest.approx(16.0855, abs=1e-3)
    assert torch.autograd.grad(theirs_far, far)[0] == 0
    assert torch.autograd.grad(ours_far, far)[0] < -15


@pytest.mark.parametrize("seed", SEEDS)
def test_the_kl_in_the_reward_agrees(seed: int) -> None:
    batch = make_inputs(seed)
    expected = core.compute_rewards(batch.advantages, batch.proximal_log_probs, batch.behaviour_log_probs, 0.3)
    found = batch.advantages + kl_token_rewards(batch.proximal_log_probs, batch.behaviour_log_probs, 0.3)
    torch.testing.assert_close(found, expected)


def test_the_adaptive_weight_of_the_kl_agrees_update_by_update() -> None:
    theirs_kl, ours_kl = core.AdaptiveKLController(0.2, 0.05, 10), AdaptiveKL(0.2, 0.05, 10)
    for observed in (0.01, 0.05, 0.055, 0.3, 0.049):
        theirs_kl.update(observed, 1)
        ours_kl = ours_kl.update(observed)
        assert ours_kl.coefficient == pytest.approx(theirs_kl.value)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_critics_loss_agrees_in_value_and_gradient(seed: int) -> None:
    inputs = make_inputs(seed, spread=2.0)
    values, old, returns = inputs.log_probs, inputs.proximal_log_probs, inputs.advantages
    expected, share = core.compute_value_loss(values, returns, old, inputs.mask.double(), 0.5)
    loss = value_loss(values, old, returns, inputs.mask, clip=0.5)
    found = loss.values.sum() / inputs.mask.sum()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradient(found, inputs), gradient(expected, inputs))
    assert loss.is_clipped.sum() / inputs.mask.sum() == pytest.approx(float(share))
    assert share > 0


CORRECTIONS = [
    ("token_truncated", {"high": 1.2}, {"rollout_is": "token", "rollout_is_threshold": 1.2}),
    ("sequence_truncated", {"high": 1.2}, {"rollout_is": "sequence", "rollout_is_threshold": 1.2}),
    ("token_masked", {"low": 0.8, "high": 1.2}, {"rollout_is": "token", "rollout_is_threshold": "0.8_1.2"}),
    ("sequence_masked", {"low": 0.7, "high": 1.4}, {"rollout_is": "sequence", "rollout_is_threshold": "0.7_1.4"}),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("name", "options", "settings"), CORRECTIONS)
def test_importance_weights_and_their_effective_sample_size_agree(
    name: str, options: dict[str, float], settings: dict[str, Any], seed: int
) -> None:
    batch = make_inputs(seed, spread=1.5)
    config = CorrectionConfig(method=name, options=options)
    found = importance_correction(batch.proximal_log_probs, batch.behaviour_log_probs, batch.mask, config)
    log_ratio = batch.proximal_log_probs - batch.behaviour_log_probs
    weights, metrics = corrections.compute_rollout_correction_weights(log_ratio, batch.mask.double(), **settings)
    torch.testing.assert_close(found.weights, weights)
    assert found.is_touched.any()
    sums = correction_sums(found, batch.mask, denominators(batch.mask))
    finished = finish_correction({key: float(value) for key, value in sums.items()})
    assert finished["importance_weight_mean"] == pytest.approx(weights.sum().item() / batch.mask.sum().item())
    if name.endswith("truncated"):
        share = metrics["rollout_is_eff_sample_size"]
        assert finished["effective_sample_share"] == pytest.approx(share, rel=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "peer", "half_width"), [("geometric_masked", "seq_mean_k1", 1.01), ("token_masked", "token_k1", 1.2)]
)
def test_rejection_agrees_where_the_bounds_are_each_others_inverse(
    name: str, peer: str, half_width: float, seed: int
) -> None:
    batch = make_inputs(seed, spread=1.0)
    low, high = 1 / half_width, half_width
    found = rejected(batch, name, low, high)
    log_ratio = batch.proximal_log_probs - batch.behaviour_log_probs
    kept, _ = corrections.compute_rollout_rejection_mask(log_ratio, batch.mask.double(), peer, f"{low}_{high}")
    assert torch.equal(batch.mask & ~found, kept.bool())
    assert found.sum() > 0


def rejected(batch: LossInputs, name: str, low: float, high: float) -> Tensor:
    config = CorrectionConfig(method=name, options={"low": low, "high": high})
    return importance_correction(batch.proximal_log_probs, batch.behaviour_log_probs, batch.mask, config).is_rejected


def test_verls_rejection_by_k1_bounds_the_inverse_ratio() -> None:
    """k1 is log pi_behaviour - log pi, so "0.5_3" leaves out ratios pi / pi_behaviour above 2 and below 1/3."""
    log_ratio = torch.tensor([[0.8, -0.8]], dtype=torch.float64)
    ones = torch.ones(1, 2, dtype=torch.float64)
    kept, _ = corrections.compute_rollout_rejection_mask(log_ratio, ones, "token_k1", "0.5_3")
    assert kept.tolist() == [[0.0, 1.0]]
    batch = LossInputs(log_ratio, log_ratio, 0 * ones, ones, ones.bool())
    assert rejected(batch, "token_masked", 0.5, 3.0).tolist() == [[False, True]]
    assert rejected(batch, "token_masked", 1 / 3, 2.0).tolist() == [[True, False]]


def test_what_verl_rejects_leaves_its_denominator_and_the_others_weigh_more() -> None:
    """A gradient for 4 of 5 tokens then has the size of one for 5. Ours counts the batch that was sampled, so that a
    token's weight doesn't depend on what else was rejected.
    """
    log_ratio = torch.tensor([[0.0, 0.0, 0.0, 0.0, 3.0]], dtype=torch.float64)
    ones = torch.ones(1, 5, dtype=torch.float64)
    kept, _ = corrections.compute_rollout_rejection_mask(log_ratio, ones, "token_k1", "0.5_2")
    expected = core.agg_loss(ones, kept, "token-mean")
    config = CorrectionConfig(method="token_masked", options={"low": 0.5, "high": 2.0})
    weights = importance_correction(log_ratio, 0 * ones, ones.bool(), config).weights
    found = (weights * token_weights(ones.bool(), AlgorithmConfig(), denominators(ones.bool()), ones)).sum()
    assert expected.item() == 1.0
    assert found.item() == pytest.approx(0.8)


@pytest.mark.parametrize("seed", SEEDS)
def test_verls_bypass_weighs_by_the_policy_of_the_moment(seed: int) -> None:
    """Before the first update the two are one. Later its weight moves with the policy, ours stays that of the batch;
    what happens within the update is then the loss's ratio to account for.
    """
    settings = {"loss_type": "reinforce", "rollout_is": "token", "rollout_is_threshold": 1.1}
    config = actor(policy_loss=workers.PolicyLossConfig(rollout_correction=settings))
    for spread in (0.0, 0.5):
        inputs = make_inputs(seed, spread=spread)
        behaviour = inputs.behaviour_log_probs + 0.2 * inputs.advantages * inputs.mask
        expected = gradient(their_loss("bypass_mode", inputs, "token-mean", config, old=behaviour), inputs)
        truncated = CorrectionConfig(method="token_truncated", options={"high": 1.1})
        for at in (inputs.log_probs.detach(), inputs.proximal_log_probs):
            weights = importance_correction(at, behaviour, inputs.mask, truncated).weights
            found = gradient(our_loss("reinforce", inputs, "token_mean"), inputs) * weights
            is_same = torch.allclose(found, expected)
            assert is_same == (spread == 0.0 or at is not inputs.proximal_log_probs)


@pytest.mark.parametrize("seed", SEEDS)
def test_what_logits_say_of_their_token_agrees(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(20, 50, generator=generator, dtype=torch.float64)
    tokens = torch.randint(50, (20,), generator=generator)
    found = statistics_of_logits(logits, tokens, with_entropy=True, with_collision=True)
    torch.testing.assert_close(found.log_probs, functional.logprobs_from_logits_v2(logits, tokens))
    torch.testing.assert_close(found.entropy, functional.entropy_from_logits(logits))
    torch.testing.assert_close(found.collision, functional.calculate_sum_pi_squared_from_logits(logits))
