"""Advantage estimators against verl's, where that package is installed.

Run it in an environment that has verl (0.9.1 was compared); elsewhere it is skipped. Where the two differ:
- A group of one has no baseline: verl's grpo, dr_grpo, rloo, opo, reinforce_plus_plus_baseline and the optimal token
  baselines return its reward as it stands, ours 0. Its rloo_vectorized agrees with ours.
- grpo divides what rounding leaves of large equal rewards by their deviation; ours are exactly 0.
- reinforce_plus_plus_baseline and gdpo are normalised over tokens in verl, over samples here: over tokens the mean
  isn't 0 where lengths go with rewards, and a group that teaches nothing gets an advantage.
- gpg counts rewards that aren't 0 for alpha, ours samples of groups whose rewards differ, which no shift changes.
- remax credits a token with the rewards from it on, ours each token with all of the completion's; both are unbiased,
  and the same where the only reward is the completion's.
- The optimal token baseline is 0 in verl where one sample goes on alone; ours is the sample's own return, as its
  `handle_zero_tail=False`. What tools wrote counts as places in `optimal_token_baseline`, not in
  `tir_optimal_token_baseline` and ours.
- grpo_passk (our grpo_winner) refuses a group of one, ours gives it 0.
grpo_pass_at_k, maxrl and reinforce have no counterpart there.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from algorithms import returns as _returns  # noqa: F401  registered by being imported
from algorithms.estimation import estimate_advantages
from algorithms.inputs import AdvantageInputs
from algorithms.values import lambda_returns

core = pytest.importorskip("verl.trainer.ppo.core_algos", exc_type=ImportError)

SEEDS = range(6)
SIZES = (4, 2, 7, 3)
WIDTH = 12
VOCABULARY = 9


@dataclass(frozen=True)
class Rollouts:
    """The same batch as ours (completion tokens end to end) and as verl's (padded rows, floats for masks)."""

    ours: AdvantageInputs
    is_token: Tensor
    distributions: Tensor

    @property
    def mask(self) -> Tensor:
        return self.padded(self.ours.mask.double())

    @property
    def index(self) -> np.ndarray:
        return self.ours.group.numpy()

    def padded(self, tokens: Tensor) -> Tensor:
        return tokens.new_zeros(self.is_token.shape).masked_scatter(self.is_token, tokens)

    def packed(self, rows: Tensor) -> Tensor:
        return rows[self.is_token]

    @property
    def rewards(self) -> Tensor:
        """[B, T], each sample's reward at its last action, over the token rewards."""
        rows = torch.zeros_like(self.mask) if self.ours.token_rewards is None else self.padded(self.ours.token_rewards)
        last = (self.mask * torch.arange(WIDTH)).argmax(-1, keepdim=True)
        return rows.scatter_add(1, last, self.ours.rewards[:, None]) * self.mask


def make_rollouts(seed: int, *, sizes: tuple[int, ...] = SIZES, has_gaps: bool = True) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    group = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    group = group[torch.randperm(len(group), generator=generator)]
    samples = len(group)
    lengths = torch.randint(3, WIDTH + 1, (samples,), generator=generator)
    is_token = torch.arange(WIDTH) < lengths[:, None]
    tokens = int(lengths.sum())
    mask = torch.rand(tokens, generator=generator) < 0.7 if has_gaps else torch.ones(tokens, dtype=torch.bool)
    mask[lengths.cumsum(0) - lengths] = True
    distributions = torch.randn(tokens, VOCABULARY, generator=generator, dtype=torch.float64).log_softmax(-1)
    chosen = torch.randint(VOCABULARY, (tokens, 1), generator=generator)
    inputs = AdvantageInputs(
        rewards=torch.randn(samples, generator=generator, dtype=torch.float64),
        group=group,
        lengths=lengths,
        mask=mask,
        greedy_rewards=torch.randn(samples, generator=generator, dtype=torch.float64),
        values=torch.randn(tokens, generator=generator, dtype=torch.float64),
        log_probs=distributions.gather(1, chosen).squeeze(1),
        collision=distributions.exp().square().sum(-1),
    )
    return Rollouts(inputs, is_token, distributions)


@pytest.fixture(params=SEEDS)
def rollouts(request: pytest.FixtureRequest) -> Rollouts:
    return make_rollouts(request.param)


def ours(name: str, rollouts: Rollouts, **options: object) -> Tensor:
    return estimate_advantages(name, rollouts.ours, options)


def theirs(name: str, rollouts: Rollouts, **arguments: Any) -> Tensor:
    """verl's advantages of our tokens, 0 outside the action mask."""
    function = core.get_adv_estimator_fn(name)
    if name not in ("gae", "reinforce_plus_plus", "remax"):
        arguments["index"] = rollouts.index
    advantages, _ = function(token_level_rewards=rollouts.rewards, response_mask=rollouts.mask, **arguments)
    return rollouts.packed(advantages * rollouts.mask).double()


@pytest.mark.parametrize(
    ("name", "peer", "arguments"),
    [
        ("grpo", "grpo", {}),
        ("dr_grpo", "grpo", {"norm_adv_by_std_in_grpo": False}),
        ("rloo", "rloo", {}),
        ("rloo", "rloo_vectorized", {}),
        ("opo", "opo", {}),
    ],
)
def test_advantages_by_sample_agree(name: str, peer: str, arguments: dict[str, Any], rollouts: Rollouts) -> None:
    torch.testing.assert_close(ours(name, rollouts), theirs(peer, rollouts, **arguments))


def test_grpo_in_one_sweep_agrees_to_float32(rollouts: Rollouts) -> None:
    peer = theirs("grpo_vectorized", rollouts)
    torch.testing.assert_close(ours("grpo", rollouts), peer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divide_by", ["none", "std"])
def test_the_winners_lead_agrees(divide_by: str, rollouts: Rollouts) -> None:
    peer = theirs("grpo_passk", rollouts, config={"norm_adv_by_std_in_grpo": divide_by == "std"})
    torch.testing.assert_close(ours("grpo_winner", rollouts, divide_by=divide_by), peer)


def test_remax_agrees_where_only_the_completion_is_rewarded(rollouts: Rollouts) -> None:
    peer = theirs("remax", rollouts, reward_baselines=rollouts.ours.greedy_rewards)
    torch.testing.assert_close(ours("remax", rollouts), peer)


@pytest.mark.parametrize("discount", [1.0, 0.9])
def test_reinforce_plus_plus_agrees_over_what_tools_wrote(discount: float, rollouts: Rollouts) -> None:
    rollouts = with_token_rewards(rollouts)
    peer = theirs("reinforce_plus_plus", rollouts, config=core.AlgoConfig(gamma=discount))
    torch.testing.assert_close(ours("reinforce_plus_plus", rollouts, discount=discount), peer, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("discount", "trace_decay"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (1.0, 0.0)])
def test_gae_and_the_critics_returns_agree_over_what_tools_wrote(
    discount: float, trace_decay: float, rollouts: Rollouts
) -> None:
    rollouts = with_token_rewards(rollouts)
    assert rollouts.ours.values is not None
    advantages, returns = core.compute_gae_advantage_return(
        rollouts.rewards, rollouts.padded(rollouts.ours.values), rollouts.mask, discount, trace_decay
    )
    mine = ours("gae", rollouts, discount=discount, trace_decay=trace_decay)
    torch.testing.assert_close(mine, rollouts.packed(advantages * rollouts.mask), rtol=1e-5, atol=1e-5)
    expected = rollouts.packed(returns * rollouts.mask)
    torch.testing.assert_close(lambda_returns(rollouts.ours, discount, trace_decay), expected)


def test_the_optimal_token_baseline_of_many_turns_agrees(rollouts: Rollouts) -> None:
    peer = token_baseline("tir_optimal_token_baseline", rollouts, handle_zero_tail=False)
    torch.testing.assert_close(ours("optimal_token_baseline", rollouts), peer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_optimal_token_baseline_of_one_turn_agrees(seed: int) -> None:
    rollouts = with_token_rewards(make_rollouts(seed, has_gaps=False))
    peer = token_baseline("optimal_token_baseline", rollouts, handle_zero_tail=False)
    torch.testing.assert_close(ours("optimal_token_baseline", rollouts), peer, rtol=1e-5, atol=1e-6)


def with_token_rewards(rollouts: Rollouts) -> Rollouts:
    generator = torch.Generator().manual_seed(1)
    rewards = torch.randn(rollouts.ours.mask.shape, generator=generator, dtype=torch.float64)
    return replace(rollouts, ours=replace(rollouts.ours, token_rewards=rewards))


def with_rewards(rollouts: Rollouts, rewards: Tensor) -> Rollouts:
    return replace(rollouts, ours=replace(rollouts.ours, rewards=rewards))


def token_baseline(name: str, rollouts: Rollouts, **arguments: Any) -> Tensor:
    assert rollouts.ours.log_probs is not None
    assert rollouts.ours.collision is not None
    return theirs(
        name,
        rollouts,
        old_log_probs=rollouts.padded(rollouts.ours.log_probs),
        sum_pi_squared=rollouts.padded(rollouts.ours.collision),
        **arguments,
    )


@pytest.mark.parametrize(
    ("name", "peer"),
    [
        ("grpo", "grpo"),
        ("grpo", "grpo_vectorized"),
        ("rloo", "rloo"),
        ("opo", "opo"),
        ("optimal_token_baseline", "tir_optimal_token_baseline"),
        ("reinforce_plus_plus_baseline", "reinforce_plus_plus_baseline"),
    ],
)
def test_verl_reinforces_a_group_of_one_by_its_reward_as_it_stands(name: str, peer: str) -> None:
    """There is nothing to compare it with: without a baseline a reward of 5 pushes up whatever was sampled."""
    rollouts = make_rollouts(0, sizes=(1, 4))
    alone = (rollouts.ours.group == 0)[rollouts.ours.sample] & rollouts.ours.mask
    rollouts = with_rewards(rollouts, rollouts.ours.rewards.masked_fill(rollouts.ours.group == 0, 5.0))
    found = token_baseline(peer, rollouts) if "token" in name else theirs(peer, rollouts)
    assert found[alone].abs().min() > 1.0
    assert ours(name, rollouts)[alone].abs().max() == 0


def test_verls_vectorised_rloo_gives_a_group_of_one_nothing_as_ours() -> None:
    rollouts = make_rollouts(0, sizes=(1, 4))
    torch.testing.assert_close(ours("rloo", rollouts), theirs("rloo_vectorized", rollouts))


def test_verl_refuses_the_winner_of_a_group_of_one() -> None:
    """One failed rollout then stops a run. Its lead over no other sample is taken for 0 here, as in all estimators."""
    rollouts = make_rollouts(0, sizes=(1, 4))
    with pytest.raises(ValueError, match="at least 2"):
        theirs("grpo_passk", rollouts, config={})
    assert (ours("grpo_winner", rollouts)[(rollouts.ours.group == 0)[rollouts.ours.sample]] == 0).all()


def test_verls_grpo_makes_an_advantage_of_the_rounding_of_equal_rewards() -> None:
    """Their mean is off by a last bit, which is large beside 1e-6. Ours takes the group's minimum off first."""
    rollouts = make_rollouts(0, sizes=(7,))
    rollouts = with_rewards(rollouts, torch.full((7,), 1e9 + 0.1, dtype=torch.float64))
    assert ours("grpo", rollouts).abs().max() == 0
    assert theirs("grpo", rollouts).abs().max() > 1e-3


def test_verls_reinforce_plus_plus_baseline_gives_a_group_without_a_difference_an_advantage() -> None:
    """It subtracts the mean over tokens, which isn't 0 where long answers were good: all else is then pushed down. Over
    samples the mean is 0 group by group.
    """
    rollouts = make_rollouts(0, sizes=(4, 4), has_gaps=False)
    inputs = rollouts.ours
    rewards = torch.where(inputs.group == 0, 1.0, (inputs.lengths > 6).double())
    assert len(rewards[inputs.group == 1].unique()) == 2
    rollouts = with_rewards(rollouts, rewards)
    equal = (inputs.group == 0)[inputs.sample]
    assert theirs("reinforce_plus_plus_baseline", rollouts)[equal].abs().min() > 0.05
    assert ours("reinforce_plus_plus_baseline", rollouts)[equal].abs().max() == 0


@pytest.mark.parametrize("seed", SEEDS)
def test_the_group_baseline_of_equal_lengths_agrees_up_to_the_counts_in_the_variance(seed: int) -> None:
    """With L tokens each, theirs divides by the deviation over n L values with n L - 1 below, ours by n with n - 1."""
    rollouts = equally_long(make_rollouts(seed, has_gaps=False))
    samples, tokens = len(rollouts.ours.lengths), int(rollouts.ours.lengths.sum())
    factor = ((tokens - 1) / tokens * samples / (samples - 1)) ** 0.5
    peer = theirs("reinforce_plus_plus_baseline", rollouts)
    torch.testing.assert_close(ours("reinforce_plus_plus_baseline", rollouts) * factor, peer, rtol=1e-5, atol=1e-5)


def equally_long(rollouts: Rollouts) -> Rollouts:
    lengths = torch.full_like(rollouts.ours.lengths, 5)
    ones = torch.ones(int(lengths.sum()), dtype=torch.bool)
    inputs = AdvantageInputs(rollouts.ours.rewards, rollouts.ours.group, lengths, ones)
    return Rollouts(inputs, torch.arange(WIDTH).expand(len(lengths), -1) < 5, rollouts.distributions)


def with_components(rollouts: Rollouts, components: Tensor, weights: Tensor) -> tuple[Rollouts, dict[str, Any]]:
    """The batch with two rewards each, and what verl's gdpo takes them from."""
    inputs = replace(
        rollouts.ours,
        components=components,
        is_present=torch.ones_like(components, dtype=torch.bool),
        component_weights=weights,
    )
    config = {"gdpo_reward_keys": ["a", "b"], "gdpo_reward_weights": weights.tolist()}
    named = {"a": components[:, 0].numpy(), "b": components[:, 1].numpy()}
    batch = {"prompts": torch.zeros(len(components), 0), "attention_mask": rollouts.is_token.long()}
    return replace(rollouts, ours=inputs), {"config": config, "non_tensor_batch": named, "batch": batch}


@pytest.mark.parametrize("seed", SEEDS)
def test_gdpo_of_equal_lengths_agrees_up_to_the_counts_in_the_variance(seed: int) -> None:
    rollouts = equally_long(make_rollouts(seed, has_gaps=False))
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(len(rollouts.ours.rewards), 2, generator=generator, dtype=torch.float64)
    rollouts, arguments = with_components(rollouts, drawn, torch.tensor([1.0, 3.0], dtype=torch.float64))
    samples, tokens = len(rollouts.ours.lengths), int(rollouts.ours.lengths.sum())
    factor = ((tokens - 1) / tokens * samples / (samples - 1)) ** 0.5
    peer = theirs("gdpo", rollouts, **arguments)
    torch.testing.assert_close(ours("gdpo", rollouts) * factor, peer, rtol=1e-4, atol=1e-4)


def test_verls_gdpo_gives_a_group_without_a_difference_an_advantage() -> None:
    """As in reinforce_plus_plus_baseline: it takes the batch's mean over tokens, the paper over answers."""
    rollouts = make_rollouts(0, sizes=(4, 4), has_gaps=False)
    group, lengths = rollouts.ours.group, rollouts.ours.lengths
    rewards = torch.where(group == 0, 1.0, (lengths > 6).double())
    drawn = torch.stack([rewards, rewards], dim=1)
    rollouts, arguments = with_components(rollouts, drawn, torch.ones(2, dtype=torch.float64))
    equal = (group == 0)[rollouts.ours.sample]
    assert theirs("gdpo", rollouts, **arguments)[equal].abs().min() > 0.05
    assert ours("gdpo", rollouts)[equal].abs().max() == 0


def test_gpg_agrees_where_its_two_ways_of_counting_do(rollouts: Rollouts) -> None:
    """All rewards here differ and none is 0: both alphas are 1."""
    torch.testing.assert_close(ours("gpg", rollouts), theirs("gpg", rollouts))


def test_verls_gpg_changes_with_a_shift_of_the_rewards(rollouts: Rollouts) -> None:
    """alpha makes up for samples that teach nothing. verl counts rewards of 0 as such; but a failure beside a success
    teaches, and a group of successes alone doesn't.
    """
    inputs = rollouts.ours
    rewards = torch.where(inputs.group == 0, 1.0, (inputs.rewards > 0).double())
    first, shifted = with_rewards(rollouts, rewards), with_rewards(rollouts, rewards + 1)
    torch.testing.assert_close(ours("gpg", first), ours("gpg", shifted))
    is_nonzero = int((rewards != 0).sum())
    assert is_nonzero < len(rewards)
    torch.testing.assert_close(theirs("gpg", first), theirs("gpg", shifted) * len(rewards) / is_nonzero)


def test_verls_remax_leaves_the_rewards_before_a_token_out_of_its_advantage(rollouts: Rollouts) -> None:
    """What came before a token can't depend on it, so both are unbiased. Ours, as in the paper, rewards completions: at
    each sample's first action the two are the same, and differ later by what was rewarded before.
    """
    rollouts = with_token_rewards(rollouts)
    peer = rollouts.padded(theirs("remax", rollouts, reward_baselines=rollouts.ours.greedy_rewards))
    mine = rollouts.padded(ours("remax", rollouts))
    assert rollouts.ours.token_rewards is not None
    rewarded = rollouts.padded(rollouts.ours.token_rewards) * rollouts.mask
    torch.testing.assert_close((mine - peer), (rewarded.cumsum(-1) - rewarded) * rollouts.mask)


def test_verls_token_baseline_reinforces_equal_rewards_for_being_long() -> None:
    """Where one sample goes on alone its baseline is 0 by default, so the longest is reinforced by its whole reward."""
    rollouts = make_rollouts(0, sizes=(4,), has_gaps=False)
    rollouts = with_rewards(rollouts, torch.ones(4, dtype=torch.float64))
    assert len(rollouts.ours.lengths.sort().values[-2:].unique()) == 2
    for name in ("optimal_token_baseline", "tir_optimal_token_baseline"):
        assert token_baseline(name, rollouts).max() == 1.0
        assert token_baseline(name, rollouts, handle_zero_tail=False).abs().max() < 1e-6
    assert ours("optimal_token_baseline", rollouts).abs().max() == 0


def test_verls_token_baseline_of_one_turn_counts_what_tools_wrote_as_places(rollouts: Rollouts) -> None:
    """It compares tokens at the same distance from the start; with tool outputs of different lengths between, those
    aren't the same step of the policy. Its form for many turns counts as ours does.
    """
    peer = token_baseline("optimal_token_baseline", rollouts, handle_zero_tail=False)
    assert (ours("optimal_token_baseline", rollouts) - peer).abs().max() > 0.01
