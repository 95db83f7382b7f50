"""Credit by turn: applies the same estimators to each turn of the policy instead of whole samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from algorithms.group_statistics import Groups
from algorithms.inputs import AdvantageInputs
from algorithms.returns import Actions, discounted_sums


@dataclass(frozen=True)
class Turns:
    """The turns of a batch, as inputs of their own and the way back to its tokens.

    Attributes:
        inputs: turns in place of samples, made of actions only; a turn's group is all turns of the same number that
            answer the same prompt.
        actions: of the batch.
        turn: [actions] int64, the turn of each.
    """

    inputs: AdvantageInputs
    actions: Actions
    turn: Tensor

    def to_tokens(self, values: Tensor, like: Tensor) -> Tensor:
        """[turns] values on every token of the turn, 0 elsewhere; `like` is any [tokens] tensor."""
        return self.actions.scatter(values[self.turn], like)


def by_turn(inputs: AdvantageInputs, discount: float) -> Turns:
    """Split a batch into turns: unbroken runs of action tokens within a sample.

    A turn's own reward is the sum of the token rewards within it; a sample's last turn has the sample's reward added.
    What it is credited with is its own reward and, discounted by one factor a turn, those of the sample's later turns.
    A sample without an action has no turn.

    Args:
        inputs: the batch.
        discount: 0 for a turn's own reward alone, 1 for all that is still to come.
    """
    mask, actions = inputs.mask, Actions.of(inputs)
    opens = mask.clone()
    opens[1:] &= ~mask[:-1] | (inputs.sample[1:] != inputs.sample[:-1])
    turn = opens[actions.index].cumsum(0) - 1
    first_action = opens[actions.index].nonzero().squeeze(-1)
    owner = actions.sample[first_action]
    turns_of = torch.zeros_like(inputs.lengths).index_add_(0, owner, torch.ones_like(owner))
    end = turns_of.cumsum(0)
    places = torch.arange(len(owner), device=owner.device)
    last = end[owner] - 1
    number = places - (end - turns_of)[owner]
    rewards = torch.where(places == last, inputs.rewards[owner], 0.0).to(inputs.rewards.dtype)
    if inputs.token_rewards is not None:
        rewards = rewards.index_add(0, turn, inputs.token_rewards[actions.index].to(rewards.dtype))
    lengths = torch.zeros_like(owner).index_add_(0, turn, torch.ones_like(turn))
    most = int(turns_of.max()) if len(turns_of) else 0
    own_tokens = AdvantageInputs(
        rewards=discounted_sums(rewards, last, discount),
        group=Groups.of(inputs.group).index[owner] * most + number,
        lengths=lengths,
        mask=torch.ones_like(turn, dtype=torch.bool),
        log_probs=None if inputs.log_probs is None else inputs.log_probs[actions.index],
        collision=None if inputs.collision is None else inputs.collision[actions.index],
        answers=None if inputs.answers is None else inputs.answers[owner],
    )
    return Turns(own_tokens, actions, turn)
