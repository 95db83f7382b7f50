"""Policy losses, preference losses and reward shapes against trl's, where that package is installed.

Run it in an environment that has trl (1.16 was compared); elsewhere it is skipped. trl's losses are methods of its
trainers; they are called here on the settings they read, with log-probabilities in place of a model's. Where they
differ:
- `grpo`, `sapo`, `dr_grpo` and GMPO divide by all rows, ours by those with a trained token.
- `delta` is the bound of dual_clip where it is above 1 + epsilon_high; below, it cuts good tokens instead of bad ones.
- cispo's epsilon_high is the greatest weight itself, our `high` what it may be above 1.
- `use_bias_correction_kl` weighs the KL by the ratio and differentiates both; k3_unbiased is that at a ratio of 1, so
  that they agree before the first update.
- The entropy bonus is a mean over tokens whatever the aggregation; ours is aggregated as the loss is.
- DPO's ipo takes mean log-probabilities a token, ours the paper's sums unless `is_length_averaged`.
- bco_pair has no reward shift, and is a sum over both answers where ours is a mean.
- ORPO's odds ratio is NaN where both answers are certain; ours is cut just below.
- The cosine reward has nothing of its own for a truncated completion, ours `truncated`.
trl's advantages are made inside a trainer's rollout and can't be called. Its other losses (vespo, luspo, hinge, exo,
nca, sppo, aot, apo, discopop) have no counterpart here.
"""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from algorithms import choices  # noqa: F401  registers the built-in methods
from algorithms.aggregation import Denominators, count
from algorithms.config import AlgorithmConfig, CorrectionConfig, KLConfig
from algorithms.log_probs import statistics_of_logits
from algorithms.preferences.inputs import AnswerLogProbs, PreferenceInputs
from algorithms.preferences.text import preference_outcome
from algorithms.shaping import ShapingInputs, shape_rewards
from algorithms.total_loss import TokenBatch, total_loss

trainers = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError)
geometric = pytest.importorskip("trl.experimental.gmpo", exc_type=ImportError)
preferences = pytest.importorskip("trl.trainer.dpo_trainer", exc_type=ImportError)
contrastive = pytest.importorskip("trl.experimental.cpo", exc_type=ImportError)
odds = pytest.importorskip("trl.experimental.orpo", exc_type=ImportError)
rewards = pytest.importorskip("trl.rewards", exc_type=ImportError)
utilities = pytest.importorskip("trl.trainer.utils", exc_type=ImportError)

SEEDS = range(6)
ROWS, WIDTH, PAIRS = 6, 12, 8
ONE_PROCESS = SimpleNamespace(
    device=torch.device("cpu"),
    num_processes=1,
    sync_gradients=False,
    gather=lambda values: values,
    gather_for_metrics=lambda values: values,
    reduce=lambda values, reduction: values,
)


@dataclass(frozen=True)
class Rows:
    """A micro-batch: log-probabilities that take a gradient, entropies, and what is known of each token."""

    log_probs: Tensor
    entropy: Tensor
    batch: TokenBatch


def make_rows(seed: int, *, is_by_sequence: bool = False, spread: float = 0.5, empty_rows: int = 0) -> Rows:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    mask = torch.rand(ROWS, WIDTH, generator=generator) < torch.linspace(0.3, 0.95, ROWS)[:, None]
    mask[:, 0] = True
    mask[:empty_rows] = False
    proximal = -normal(ROWS, WIDTH).abs()
    current = (proximal + spread * normal(ROWS, WIDTH)).requires_grad_()
    reference = proximal + 0.3 * normal(ROWS, WIDTH)
    advantages = normal(ROWS, 1).expand(-1, WIDTH) if is_by_sequence else normal(ROWS, WIDTH)
    batch = TokenBatch(mask, advantages, proximal, proximal, reference)
    return Rows(current, normal(ROWS, WIDTH).abs().requires_grad_(), batch)


def our_loss(rows: Rows, **settings: Any) -> Tensor:
    config = AlgorithmConfig(correction=CorrectionConfig(method="none"), **settings)
    sizes = Denominators(*map(float, count(rows.batch.mask)))
    loss, _ = total_loss(rows.log_probs, rows.entropy, rows.batch, config, sizes, config.kl.coefficient)
    return loss


def their_loss(rows: Rows, trainer: Any = trainers.GRPOTrainer, **settings: Any) -> Tensor:
    """The loss of a trainer with these settings; those of its arguments are prefixed with "args_"."""
    arguments: dict[str, Any] = {"use_bias_correction_kl": False, "delta": None, "steps_per_generation": 1}
    own: dict[str, Any] = {
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "entropy_coef": 0.0,
    }
    for name, value in settings.items():
        (arguments if name.startswith("args_") else own)[name.removeprefix("args_")] = value
    state = SimpleNamespace(
        args=SimpleNamespace(**arguments),
        accelerator=ONE_PROCESS,
        model=SimpleNamespace(training=True),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        use_vllm=False,
        use_adaptive_entropy=False,
        max_completion_length=20,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=own["entropy_coef"] > 0,
        _get_per_token_logps_and_entropies=lambda *_, **__: (rows.log_probs, rows.entropy, None),
        _metrics=defaultdict(lambda: defaultdict(list)),
        **own,
    )
    batch, mask = rows.batch, rows.batch.mask.double()
    ids = torch.zeros(ROWS, WIDTH, dtype=torch.int64)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": mask[:, :1],
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": batch.advantages[:, 0] if trainer is geometric.GMPOTrainer else batch.advantages,
        "old_per_token_logps": batch.proximal_log_probs,
        "ref_per_token_logps": batch.reference_log_probs,
        "num_items_in_batch": mask.sum(),
    }
    loss: Tensor = trainer._compute_loss(state, None, inputs)
    return loss


def assert_same(rows: Rows, found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected)
    slopes = [torch.autograd.grad(loss, rows.log_probs, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(*slopes)


CLIP = {"low": 0.2, "high": 0.3}
BOUNDS = {"epsilon_low": 0.2, "epsilon_high": 0.3}
LOSSES = [
    ("clip", CLIP, "sequence_mean", {"loss_type": "grpo", **BOUNDS}),
    ("clip", CLIP, "token_mean", {"loss_type": "dapo", **BOUNDS}),
    ("clip", CLIP, "token_mean", {"loss_type": "bnpo", **BOUNDS}),
    ("clip", CLIP, "constant_length", {"loss_type": "dr_grpo", **BOUNDS}),
    ("dual_clip", {**CLIP, "dual": 1.5}, "sequence_mean", {"loss_type": "grpo", "args_delta": 1.5, **BOUNDS}),
    ("cispo", {"high": 0.4}, "token_mean", {"loss_type": "cispo", "epsilon_high": 1.4}),
    (
        "sapo",
        {"positive": 1.0, "negative": 1.7},
        "sequence_mean",
        {"loss_type": "sapo", "args_sapo_temperature_pos": 1.0, "args_sapo_temperature_neg": 1.7},
    ),
    (
        "gspo",
        {"low": 0.05, "high": 0.02},
        "sequence_mean",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon_low": 0.05, "epsilon_high": 0.02},
    ),
]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("coefficient", [0.0, 0.3])
@pytest.mark.parametrize(("name", "options", "aggregation", "settings"), LOSSES)
def test_policy_losses_with_their_aggregation_and_kl_agree(
    name: str, options: dict[str, float], aggregation: str, settings: dict[str, Any], coefficient: float, seed: int
) -> None:
    rows = make_rows(seed, is_by_sequence=name == "gspo")
    found = our_loss(
        rows,
        loss=name,
        loss_options=options,
        aggregation=aggregation,
        aggregation_options={"length": 20} if aggregation == "constant_length" else {},
        kl=KLConfig(coefficient=coefficient),
    )
    assert_same(rows, found, their_loss(rows, beta=coefficient, **settings))


@pytest.mark.parametrize("seed", SEEDS)
def test_gmpo_agrees(seed: int) -> None:
    rows = make_rows(seed, is_by_sequence=True)
    found = our_loss(rows, loss="gmpo", aggregation="sequence_mean", loss_options={"low": 0.3, "high": 0.4})
    expected = their_loss(rows, geometric.GMPOTrainer, loss_type="grpo", epsilon_low=0.3, epsilon_high=0.4)
    assert_same(rows, found, expected)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "aggregation", "settings"),
    [
        ("clip", "sequence_mean", {"loss_type": "grpo"}),
        ("clip", "constant_length", {"loss_type": "dr_grpo"}),
        ("gmpo", "sequence_mean", {"trainer": geometric.GMPOTrainer, "loss_type": "grpo"}),
    ],
)
def test_trl_counts_rows_without_a_trained_token(
    name: str, aggregation: str, settings: dict[str, Any], seed: int
) -> None:
    """Such rows are padding or were left out; with them in the mean, the others learn less the more there are."""
    rows = make_rows(seed, is_by_sequence=True, empty_rows=2)
    length = {"length": 20} if aggregation == "constant_length" else {}
    found = our_loss(
        rows,
        loss=name,
        loss_options={"low": 0.2, "high": 0.2},
        aggregation=aggregation,
        aggregation_options=length,
    )
    expected = their_loss(rows, **settings)
    mine, peer = (torch.autograd.grad(loss, rows.log_probs, retain_graph=True)[0] for loss in (found, expected))
    torch.testing.assert_close(mine * 4 / 6, peer)
    # GMPO's ratio of no token is 1, so that such rows even add their advantage to the figure.
    empty = rows.batch.advantages[:2, 0].sum() if name == "gmpo" else 0.0
    torch.testing.assert_close(found * 4 / 6 - empty / 6, expected)


def test_trls_delta_below_the_upper_bound_cuts_good_tokens_instead_of_bad_ones() -> None:
    """It caps the ratio before PPO's minimum, which for A < 0 then takes the other, at most 1 + epsilon_high. Dual-clip
    PPO caps the loss after the minimum, and only where A < 0; with delta above 1 + epsilon_high that is the same.
    """
    rows = make_rows(0)
    options = {"low": 0.2, "high": 0.5, "dual": 1.1}
    settings = {"loss_type": "bnpo", "args_delta": 1.1, "epsilon_low": 0.2, "epsilon_high": 0.5}
    mine, peer = (
        torch.autograd.grad(loss, rows.log_probs, retain_graph=True)[0]
        for loss in (our_loss(rows, loss="dual_clip", loss_options=options), their_loss(rows, **settings))
    )
    assert rows.batch.proximal_log_probs is not None
    ratio = (rows.log_probs - rows.batch.proximal_log_probs).exp()
    is_between, is_worse = rows.batch.mask & (ratio > 1.1) & (ratio < 1.5), rows.batch.advantages < 0
    for is_chosen in (is_between & is_worse, is_between & ~is_worse):
        assert is_chosen.any()
        assert ((mine == 0) == is_worse)[is_chosen].all()
        assert ((peer == 0) == ~is_worse)[is_chosen].all()


def test_trls_cispo_takes_the_greatest_weight_itself() -> None:
    """The paper bounds the weight at 1 + epsilon_high: the default 0.2 of trl's setting would be a weight of 0.2."""
    rows = make_rows(0, spread=0.0)
    found = our_loss(rows, loss="cispo", loss_options={"high": 0.2})
    assert_same(rows, found * 0.2, their_loss(rows, loss_type="cispo", epsilon_high=0.2))


@pytest.mark.parametrize("seed", SEEDS)
def test_trls_corrected_kl_has_our_gradient_before_the_first_update_only(seed: int) -> None:
    """grad(r k3) is -r d grad log pi, k3_unbiased's -d grad log pi: r is the importance weight of a sample that has
    become stale within the update. Ours leaves that out, as it does for every other KL.
    """
    for spread in (0.0, 0.5):
        rows = make_rows(seed, spread=spread)
        found = our_loss(rows, kl=KLConfig(coefficient=0.3, estimator="k3_unbiased")) - our_loss(rows)
        settings = {"loss_type": "bnpo", "args_use_bias_correction_kl": True}
        expected = their_loss(rows, beta=0.3, **settings) - their_loss(rows, **settings)
        mine, peer = (torch.autograd.grad(loss, rows.log_probs)[0] for loss in (found, expected))
        assert rows.batch.proximal_log_probs is not None
        ratio = (rows.log_probs - rows.batch.proximal_log_probs).exp().detach()
        torch.testing.assert_close(mine * ratio, peer)
        assert torch.allclose(mine, peer) == (spread == 0.0)


@pytest.mark.parametrize("seed", SEEDS)
def test_trls_entropy_bonus_is_a_mean_over_tokens_whatever_the_aggregation(seed: int) -> None:
    """Then the bonus of a token beside its loss depends on the length of its answer. Ours weighs both alike."""
    rows = make_rows(seed)
    for loss_type, aggregation in (("bnpo", "token_mean"), ("grpo", "sequence_mean")):
        found = our_loss(rows, aggregation=aggregation, entropy_coefficient=0.1)
        expected = their_loss(rows, loss_type=loss_type, entropy_coef=0.1)
        assert torch.allclose(found, expected) == (aggregation == "token_mean")


@dataclass(frozen=True)
class Pairs:
    """Chosen and rejected answers as ours, and as rows of token log-probabilities, chosen first."""

    inputs: PreferenceInputs
    by_token: Tensor
    mask: Tensor


def make_pairs(seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, WIDTH, (2 * PAIRS,), generator=generator)
    mask = torch.arange(WIDTH) < tokens[:, None]
    by_token = -torch.rand(2 * PAIRS, WIDTH, generator=generator, dtype=torch.float64) * 3 * mask
    reference = by_token.sum(-1) + torch.randn(2 * PAIRS, generator=generator, dtype=torch.float64)
    chosen, rejected = (
        AnswerLogProbs(by_token[side].sum(-1), tokens[side], reference[side])
        for side in (slice(0, PAIRS), slice(PAIRS, None))
    )
    return Pairs(PreferenceInputs(chosen, rejected), by_token, mask)


@pytest.fixture(params=SEEDS)
def pairs(request: pytest.FixtureRequest) -> Pairs:
    return make_pairs(request.param)


def our_preference(name: str, pairs: Pairs, **options: object) -> Tensor:
    outcome = preference_outcome(name, pairs.inputs, options)
    return outcome.loss(len(outcome.values))


def their_preference(name: str, pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> Tensor:
    state = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ONE_PROCESS,
        aux_loss_enabled=False,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[name],
        loss_weights=[1.0],
        beta=beta,
        label_smoothing=label_smoothing,
        use_weighting=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    nothing = torch.zeros_like(pairs.by_token)
    outputs = SimpleNamespace(
        log_probs=pairs.by_token, entropy=nothing, mean_logits=nothing, is_top1=torch.zeros_like(pairs.mask)
    )
    # A first token that is part of the prompt: nothing foretells it.
    completion_mask = torch.nn.functional.pad(pairs.mask.long(), (1, 0))
    inputs = {
        "input_ids": torch.zeros_like(completion_mask),
        "attention_mask": torch.ones_like(completion_mask),
        "completion_mask": completion_mask,
        "ref_chosen_logps": pairs.inputs.chosen.reference,
        "ref_rejected_logps": pairs.inputs.rejected.reference,
    }
    loss: Tensor = preferences.DPOTrainer._compute_loss(state, lambda **_: outputs, inputs, False)
    return loss


def test_dpo_agrees(pairs: Pairs) -> None:
    torch.testing.assert_close(our_preference("dpo", pairs, beta=0.2), their_preference("sigmoid", pairs, beta=0.2))


def test_robust_dpo_agrees(pairs: Pairs) -> None:
    expected = their_preference("robust", pairs, beta=0.2, label_smoothing=0.3)
    torch.testing.assert_close(our_preference("robust_dpo", pairs, beta=0.2, flip_rate=0.3), expected)


def test_trls_ipo_takes_mean_log_probabilities_a_token(pairs: Pairs) -> None:
    """The paper's eq. 17 has those of whole answers, for which alone its optimum holds; ours can do either."""
    expected = their_preference("ipo", pairs, beta=0.2)
    torch.testing.assert_close(our_preference("ipo", pairs, beta=0.2, is_length_averaged=True), expected)
    assert (our_preference("ipo", pairs, beta=0.2) - expected).abs() > 0.01


def test_trls_bco_is_a_sum_over_both_answers_without_a_shift(pairs: Pairs) -> None:
    """So it is twice ours before the first step; the paper's shift is the moving mean of the rewards."""
    expected = their_preference("bco_pair", pairs, beta=0.2)
    torch.testing.assert_close(2 * our_preference("bco", pairs, beta=0.2), expected)


def contrastive_loss(chosen: Tensor, rejected: Tensor, loss_type: str, **settings: float) -> Tensor:
    state = SimpleNamespace(accelerator=ONE_PROCESS, alpha=0.0, loss_type=loss_type, **settings)
    losses, *_ = contrastive.CPOTrainer.cpo_loss(state, chosen, rejected)
    mean: Tensor = losses.mean()
    return mean


def test_simpo_agrees(pairs: Pairs) -> None:
    means = pairs.inputs.chosen.token_mean, pairs.inputs.rejected.token_mean
    expected = contrastive_loss(*means, "simpo", beta=1.5, simpo_gamma=0.7, label_smoothing=0.0)
    torch.testing.assert_close(our_preference("simpo", pairs, beta=1.5, gamma=0.7), expected)


def test_cdpo_agrees_with_smoothed_labels(pairs: Pairs) -> None:
    ratios = pairs.inputs.chosen.log_ratio, pairs.inputs.rejected.log_ratio
    expected = contrastive_loss(*ratios, "sigmoid", beta=0.2, label_smoothing=0.3)
    torch.testing.assert_close(our_preference("cdpo", pairs, beta=0.2, flip_rate=0.3), expected)


def odds_ratio_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    state = SimpleNamespace(accelerator=ONE_PROCESS, beta=beta)
    losses, *_ = odds.ORPOTrainer.odds_ratio_loss(state, chosen, rejected)
    mean: Tensor = -losses.mean()
    return mean


def test_orpos_odds_ratio_agrees(pairs: Pairs) -> None:
    expected = odds_ratio_loss(pairs.inputs.chosen.token_mean, pairs.inputs.rejected.token_mean, 0.3)
    found = our_preference("orpo", pairs, odds_weight=0.3) - our_preference("orpo", pairs, odds_weight=0.0)
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


def test_trls_odds_ratio_is_nan_where_both_answers_are_certain() -> None:
    """Infinite odds over infinite odds. Ours cuts the probability just below certainty."""
    certain = AnswerLogProbs(torch.zeros(1), torch.ones(1, dtype=torch.int64))
    assert not torch.isfinite(odds_ratio_loss(certain.token_mean, certain.token_mean, 0.3))
    outcome = preference_outcome("orpo", PreferenceInputs(certain, certain), {"odds_weight": 0.3})
    assert torch.isfinite(outcome.loss(1))


def completions(seed: int) -> tuple[list[list[int]], ShapingInputs]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 31, (16,), generator=generator)
    ids = torch.randint(3, (int(lengths.sum()),), generator=generator)
    is_right = (torch.rand(16, generator=generator) < 0.5).double()
    sample = torch.repeat_interleave(torch.arange(16), lengths)
    none = torch.zeros(16, dtype=torch.bool)
    lists = [part.tolist() for part in ids.split(lengths.tolist())]
    return lists, ShapingInputs(is_right, lengths, none, ids, sample, max_tokens=25)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_penalties_of_length_and_repetition_agree(seed: int) -> None:
    lists, inputs = completions(seed)
    overlong = torch.tensor(rewards.get_soft_overlong_punishment(25, 10)(lists), dtype=torch.float64)
    found = shape_rewards("overlong", inputs, {"cache_tokens": 10}) - inputs.rewards
    torch.testing.assert_close(found, overlong)
    repeated = torch.tensor(rewards.get_repetition_penalty_reward(3, -0.7)(lists), dtype=torch.float64)
    found = shape_rewards("repetition", inputs, {"ngram_tokens": 3, "penalty": 0.7}) - inputs.rewards
    torch.testing.assert_close(found, repeated)
    assert overlong.min() == -1
    assert repeated.min() < -0.1


@pytest.mark.parametrize("seed", SEEDS)
def test_the_cosine_of_the_length_agrees_but_for_truncated_completions(seed: int) -> None:
    """The limit stopped those, so they have no answer to be right; the paper has a penalty of their own, as ours."""
    pytest.importorskip("math_verify")
    lists, inputs = completions(seed)
    answers = [[{"content": f"\\boxed{{{2 if right else 3}}}"}] for right in inputs.rewards.tolist()]
    peer = rewards.get_cosine_scaled_reward(25)(answers, ["2"] * 16, lists)
    options = {"correct_at_zero": 1.0, "correct_at_limit": 0.5, "wrong_at_zero": -1.0, "wrong_at_limit": -0.5}
    found = shape_rewards("cosine_length", inputs, options)
    torch.testing.assert_close(found, torch.tensor(peer, dtype=torch.float64))
    stopped = ShapingInputs(
        inputs.rewards, inputs.lengths, inputs.lengths > 25, inputs.token_ids, inputs.sample, inputs.max_tokens
    )
    apart = shape_rewards("cosine_length", stopped, {**options, "truncated": -2.0}) != found
    assert torch.equal(apart, stopped.is_truncated)
    assert apart.any()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_logits_say_of_their_token_agrees(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = 5 * torch.randn(20, 50, generator=generator, dtype=torch.float64)
    tokens = torch.randint(50, (20,), generator=generator)
    found = statistics_of_logits(logits, tokens, with_entropy=True)
    torch.testing.assert_close(found.log_probs, utilities.selective_log_softmax(logits, tokens))
    torch.testing.assert_close(found.entropy, utilities.entropy_from_logits(logits))
