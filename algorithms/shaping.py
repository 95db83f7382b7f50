"""Adjusts rewards by the completion's length and repetitions, and selects tokens and groups to train on. Weights by
difficulty are in estimation.py."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from algorithms.finite import require_finite
from algorithms.registry import REWARD_SHAPES, Options, method


@dataclass(frozen=True)
class ShapingInputs:
    """Combined rewards of a batch, and the completions they are for.

    Attributes:
        rewards: [samples] float64.
        lengths: [samples] int64, tokens of each completion.
        is_truncated: [samples] bool, stopped by the limit on tokens.
        token_ids: [tokens] int64, the tokens that the policy chose, of all samples end to end.
        sample: [tokens] int64, the sample each belongs to, in order.
        max_tokens: the limit on tokens of a completion.
    """

    rewards: Tensor
    lengths: Tensor
    is_truncated: Tensor
    token_ids: Tensor
    sample: Tensor
    max_tokens: int


def shape_rewards(name: str, inputs: ShapingInputs, options: Mapping[str, Any] | None = None) -> Tensor:
    """The rewards after the shape called `name`.

    Args:
        name: a registered reward shape.
        inputs: the rewards and their completions.
        options: of the method, by name.
    Returns:
        [samples] float64, finite.
    Raises:
        RegistryError: no such shape, or no such option.
        NonFiniteError: a reward is NaN or infinite, before or after; names the sample.
        ValueError: shapes differ, or an option is out of the bounds that `max_tokens` sets.
    """
    shape = REWARD_SHAPES.get(name)
    method_options = shape.read_options(options or {}, "algorithm.shaping.*.options")
    _check(inputs)
    rewards = shape.function(inputs, method_options)
    require_finite(f"the reward shaped by {name!r}", rewards, index_name="sample")
    return rewards


class OverlongOptions(Options):
    """Where the penalty begins, and its full size."""

    cache_tokens: int = Field(
        ge=1, description="Tokens before the limit over which the penalty grows to its full size."
    )
    penalty: float = Field(1.0, gt=0.0, description="Its full size.")


@method(
    REWARD_SHAPES,
    "overlong",
    options=OverlongOptions,
    formula="r − penalty · clip((L − (L_max − L_cache)) / L_cache, 0, 1)",
    source="DAPO, arXiv 2503.14476, eq. 13",
    use_when="Completions reach the token limit and should end a little before it.",
)
def overlong(inputs: ShapingInputs, options: OverlongOptions) -> Tensor:
    """Reward less a penalty that grows over the last tokens before the limit (DAPO, arXiv 2503.14476, eq. 13).

    0 up to L_max - L_cache tokens, then linear, and the full penalty from L_max on.

    Returns:
        [samples] float.
    Raises:
        ValueError: `cache_tokens` is above the limit on tokens.
    """
    if options.cache_tokens > inputs.max_tokens:
        raise ValueError(
            f"cache_tokens = {options.cache_tokens} of the shape overlong is above the limit of {inputs.max_tokens} "
            "tokens a completion, so that every completion would be penalised. Lower it."
        )
    over = (inputs.lengths - (inputs.max_tokens - options.cache_tokens)).to(inputs.rewards)
    return inputs.rewards - options.penalty * (over / options.cache_tokens).clamp(0.0, 1.0)


class CosineLengthOptions(Options):
    """Rewards of right and wrong completions at length 0 and at the limit."""

    correct_from: float = Field(0.5, description="Reward from which a completion counts as right.")
    correct_at_zero: float = Field(2.0, description="Reward of a right completion of no length.")
    correct_at_limit: float = Field(1.0, description="Reward of a right completion at the limit.")
    wrong_at_zero: float = Field(-10.0, description="Reward of a wrong completion of no length.")
    wrong_at_limit: float = Field(0.0, description="Reward of a wrong completion at the limit.")
    truncated: float = Field(-10.0, description="Reward of a completion that the limit stopped, right or wrong.")


@method(
    REWARD_SHAPES,
    "cosine_length",
    options=CosineLengthOptions,
    formula="r = r_L + (r₀ − r_L)(1 + cos(π L / L_max)) / 2, by right and wrong",
    source="Yeo et al., arXiv 2502.03373, the cosine reward",
    use_when="A right-or-wrong reward, where right completions should be short and wrong ones long.",
)
def cosine_length(inputs: ShapingInputs, options: CosineLengthOptions) -> Tensor:
    """A reward by length in place of the right-or-wrong one (Yeo et al., arXiv 2502.03373).

    r_L + (r_0 - r_L) (1 + cos(pi L / L_max)) / 2: r_0 at no length, r_L at the limit, as in the authors' code, one
    pair for right and one for wrong completions. Truncated completions get a reward of their own. Shapes that come
    after it see its rewards, no longer the right-or-wrong ones.

    Returns:
        [samples] float.
    """
    is_correct = inputs.rewards >= options.correct_from
    progress = inputs.lengths.to(inputs.rewards).clamp(max=inputs.max_tokens) / inputs.max_tokens
    height = (1 + (math.pi * progress).cos()) / 2
    correct = options.correct_at_limit + (options.correct_at_zero - options.correct_at_limit) * height
    wrong = options.wrong_at_limit + (options.wrong_at_zero - options.wrong_at_limit) * height
    return correct.where(is_correct, wrong).masked_fill(inputs.is_truncated, options.truncated)


class RepetitionOptions(Options):
    """What counts as a repetition, and its penalty."""

    ngram_tokens: int = Field(40, ge=1, description="Tokens of a sequence that counts as repeated.")
    penalty: float = Field(1.0, gt=0.0, description="Penalty of a completion of repetitions alone.")
    spared_from: float | None = Field(
        None, description="Reward from which a completion has no penalty; none for no such reward."
    )


@method(
    REWARD_SHAPES,
    "repetition",
    options=RepetitionOptions,
    formula="r − penalty · (1 − distinct n-grams / n-grams)",
    source="Yeo et al., arXiv 2502.03373, the n-gram repetition penalty",
    use_when="Completions fill their length with repetitions, as they may under a length reward.",
)
def repetition(inputs: ShapingInputs, options: RepetitionOptions) -> Tensor:
    """Reward less a penalty times the share of n-grams that have occurred before in the completion.

    One figure a completion, 1 - distinct / all n-grams, as the authors' code has it beside a penalty by token (Yeo et
    al., arXiv 2502.03373); theirs divides by zero for a completion shorter than an n-gram. N-grams are of tokens. Two
    are taken for the same if a 64-bit hash of them is.

    Returns:
        [samples] float. A completion shorter than an n-gram loses nothing.
    """
    share = repeated_share(inputs.token_ids, inputs.sample, len(inputs.rewards), options.ngram_tokens)
    lost = options.penalty * share.to(inputs.rewards)
    if options.spared_from is not None:
        lost = lost.masked_fill(inputs.rewards >= options.spared_from, 0.0)
    return inputs.rewards - lost


def repeated_share(token_ids: Tensor, sample: Tensor, samples: int, ngram_tokens: int) -> Tensor:
    """Share of each completion's n-grams that aren't the first of their kind in it.

    Args:
        token_ids: [tokens] int64, all completions end to end.
        sample: [tokens] int64, the completion each belongs to, in order.
        samples: how many there are.
        ngram_tokens: n.
    Returns:
        [samples] float64, from 0 (also for a completion shorter than n) to below 1.
    """
    shares = torch.zeros(samples, dtype=torch.float64, device=token_ids.device)
    count = len(token_ids) - ngram_tokens + 1
    if count <= 0:
        return shares
    is_within = sample[:count] == sample[ngram_tokens - 1 :]
    owner = sample[:count][is_within]
    keys = _paired(_mixed(owner), _ngram_hashes(token_ids, ngram_tokens)[is_within])
    keys, order = keys.sort()
    is_repeated = torch.zeros_like(keys, dtype=torch.bool)
    is_repeated[1:] = keys[1:] == keys[:-1]
    repeated = shares.index_add(0, owner[order], is_repeated.to(shares))
    return repeated / shares.index_add(0, owner, torch.ones_like(owner, dtype=shares.dtype)).clamp(min=1)


def overlong_filter(mask: Tensor, sample: Tensor, is_truncated: Tensor) -> Tensor:
    """The trained tokens without those of truncated completions (DAPO, arXiv 2503.14476, section 3.4).

    Their rewards still count in the group they are compared with; only their own tokens aren't learned from.

    Args:
        mask: [tokens] bool, the trained tokens.
        sample: [tokens] int64, the sample each belongs to.
        is_truncated: [samples] bool.
    Returns:
        [tokens] bool.
    """
    return mask & ~is_truncated[sample]


def informative_groups(rewards: Tensor, group: Tensor, *, tolerance: float = 1e-9) -> Tensor:
    """Whether a group's rewards differ, so that its advantages are not all zero (DAPO, arXiv 2503.14476, eq. 11).

    Args:
        rewards: [samples] float, finite.
        group: [samples] int64, the prompt each sample answers.
        tolerance: a spread up to this is rounding.
    Returns:
        [groups] bool, in the order of their sorted ids; False for a group of one.
    Raises:
        NonFiniteError: a reward is NaN or infinite; names the sample.
    """
    require_finite("the reward", rewards, index_name="sample")
    groups, index = group.unique(return_inverse=True)
    unseen = rewards.new_full((len(groups),), torch.inf)
    lowest = unseen.scatter_reduce(0, index, rewards, "amin")
    return (-unseen).scatter_reduce(0, index, rewards, "amax") - lowest > tolerance


def _ngram_hashes(token_ids: Tensor, n: int) -> Tensor:
    """[tokens - n + 1] int64, equal for equal n-grams.

    Two n-grams are equal where their first and their last 2^k tokens are, with 2^k up to n: the hash of 2^k tokens is
    made by doubling, and n-grams of two such parts, which may overlap.
    """
    hashes, length = _mixed(token_ids), 1
    while 2 * length <= n:
        hashes, length = _paired(hashes[:-length], hashes[length:]), 2 * length
    rest = n - length
    return hashes if rest == 0 else _paired(hashes[:-rest], hashes[rest:])


def _paired(first: Tensor, second: Tensor) -> Tensor:
    return _mixed(first * 0x5851F42D4C957F2D + second)


def _mixed(values: Tensor) -> Tensor:
    """int64 to int64, one to one, so that close values end up far apart; products wrap around."""
    values = (values ^ (values >> 30 & 0x3FFFFFFFF)) * -0x40A7B892E31B1A47
    values = (values ^ (values >> 27 & 0x1FFFFFFFFF)) * -0x6B2FB644ECCEEE15
    return values ^ (values >> 31 & 0x1FFFFFFFF)


def _check(inputs: ShapingInputs) -> None:
    shapes = [list(t.shape) for t in (inputs.rewards, inputs.lengths, inputs.is_truncated)]
    if inputs.rewards.dim() != 1 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"rewards, lengths and is_truncated must be [samples] all, got {', '.join(map(str, shapes))}")
    if inputs.token_ids.dim() != 1 or inputs.token_ids.shape != inputs.sample.shape:
        raise ValueError(
            f"token_ids and sample must be [tokens] both, got {list(inputs.token_ids.shape)} and "
            f"{list(inputs.sample.shape)}"
        )
    if not inputs.rewards.is_floating_point():
        raise ValueError(f"rewards must be floating point, got {inputs.rewards.dtype}")
    if inputs.max_tokens < 1:
        raise ValueError(f"max_tokens must be at least 1, got {inputs.max_tokens}")
    require_finite("the reward", inputs.rewards, index_name="sample")
