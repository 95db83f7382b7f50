"""Inputs and outputs of preference losses: typed tensors, shapes in brackets.

The losses are in text.py, unpaired.py, multimodal.py, dynamic.py and spans.py. Answers come from a data set or from
the policy's own groups.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Protocol, Self, TypeVar

import torch
from pydantic import Field
from torch import Tensor

from algorithms.finite import require_finite
from algorithms.registry import PREFERENCE_LOSSES, Options, PreferenceLoss

Sums = dict[str, Tensor]
"""By name, [2] float: a weighted sum over pairs (or answers) and the weight it was taken over. Add up over parts."""


class BetaOptions(Options):
    """The option of losses with an implicit reward beta log(pi / pi_reference)."""

    beta: float = Field(0.1, gt=0.0, description="Strength of the pull to the reference: the implicit reward a nat.")


class PreferenceState(Protocol):
    """What a loss remembers from step to step. Immutable: :meth:`after` returns the next one."""

    def after(self, sums: Mapping[str, Tensor]) -> Self:
        """The state after a step; `sums` are those of the whole batch, over all micro-batches and ranks."""


@dataclass(frozen=True)
class AnswerTokens:
    """Answers token by token, for losses on tokens. Rows are whole sequences; outside `mask` all is 0.

    Attributes:
        log_probs: [pairs, T] float, nats, of the policy being trained; carries the gradient.
        mask: [pairs, T] bool, the answer's tokens.
        reference_log_probs: [pairs, T] float, nats, of the frozen reference; no gradient.
        reference_kl: [pairs, T] float, nats, KL(reference || policy) of the whole distributions at each token; carries
            the gradient.
        is_corrected: [pairs, T] bool, tokens in which the chosen and the rejected answer differ.
    """

    log_probs: Tensor
    mask: Tensor
    reference_log_probs: Tensor | None = None
    reference_kl: Tensor | None = None
    is_corrected: Tensor | None = None


@dataclass(frozen=True)
class AnswerLogProbs:
    """One answer to each of many prompts.

    Attributes:
        policy: [answers] float, nats, log-probability of the answer, the sum over its tokens; carries the gradient.
        tokens: [answers] int64, tokens of the answer, at least 1.
        reference: [answers] float, nats, of the frozen reference; no gradient.
        by_token: the same token by token.
    """

    policy: Tensor
    tokens: Tensor
    reference: Tensor | None = None
    by_token: AnswerTokens | None = None

    @classmethod
    def of_tokens(cls, by_token: AnswerTokens) -> AnswerLogProbs:
        """The sums over the tokens of each row."""
        reference = by_token.reference_log_probs
        return cls(
            (by_token.log_probs * by_token.mask).sum(-1),
            by_token.mask.sum(-1),
            None if reference is None else (reference * by_token.mask).sum(-1),
            by_token,
        )

    @property
    def token_mean(self) -> Tensor:
        """[answers] float, nats, the policy's mean log-probability a token."""
        return self.policy / self.tokens

    @property
    def log_ratio(self) -> Tensor:
        """[answers] float, nats, log pi(y|x) - log pi_reference(y|x).

        Raises:
            ValueError: there are no log-probabilities of the reference.
        """
        if self.reference is None:
            raise ValueError("this loss needs a reference: give `reference` log-probabilities of every answer")
        return self.policy - self.reference

    def check(self, name: str, answers: int, index_name: str) -> None:
        """Raise unless the shapes agree, every number is finite and every answer has a token.

        Args:
            name: whose answers these are ("chosen"), for errors.
            answers: how many there should be.
            index_name: what an index means ("pair"), for errors.
        """
        for values, field in ((self.policy, "policy"), (self.reference, "reference"), (self.tokens, "tokens")):
            if values is not None and values.shape != (answers,):
                raise ValueError(
                    f"{name}.{field} has the shape {list(values.shape)}; with {answers} {index_name}s it should be "
                    f"[{answers}]"
                )
        if self.policy.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name}.policy is {self.policy.dtype}, too coarse for long sums: add the tokens' "
                "log-probabilities up in float32"
            )
        require_finite(f"the policy's log-probability ({name})", self.policy, index_name=index_name)
        if self.reference is not None:
            require_finite(f"the reference's log-probability ({name})", self.reference, index_name=index_name)
        if bool((self.tokens < 1).any()):
            first = int((self.tokens < 1).nonzero()[0])
            raise ValueError(
                f"{name}.tokens of {index_name} {first} is {int(self.tokens[first])}: an answer has at least one "
                "token. Leave empty answers out"
            )
        if self.by_token is not None:
            self._check_tokens(self.by_token, name, answers, index_name)

    def _check_tokens(self, by_token: AnswerTokens, name: str, answers: int, index_name: str) -> None:
        shape = by_token.mask.shape
        for field in fields(by_token):
            values = getattr(by_token, field.name)
            if values is None:
                continue
            if values.shape != shape or len(shape) != 2 or shape[0] != answers:
                raise ValueError(
                    f"{name}.by_token.{field.name} has the shape {list(values.shape)}; it should be [{answers}, T] "
                    f"with the mask's T, which is {list(shape)[-1]}"
                )
            if values.dtype.is_floating_point:
                require_finite(
                    f"{name}.by_token.{field.name}", values, by_token.mask, index_name=f"({index_name}, token)"
                )


@dataclass(frozen=True)
class PreferenceInputs:
    """Pairs of answers to the same prompt, one preferred.

    Attributes:
        chosen: the preferred answers.
        rejected: the others.
        weights: [pairs] float, at least 0, how much each pair counts; 0 for padding; None for 1 each.
        reward_margins: [pairs] float, by how much the chosen answer is better, from a reward model or an annotator.
        chosen_negative_image: the chosen answers read under a worse image.
        rejected_negative_image: the rejected answers read under a worse image.
        state: what the loss remembers from earlier steps; None for losses without, and to start afresh.
    """

    chosen: AnswerLogProbs
    rejected: AnswerLogProbs
    weights: Tensor | None = None
    reward_margins: Tensor | None = None
    chosen_negative_image: AnswerLogProbs | None = None
    rejected_negative_image: AnswerLogProbs | None = None
    state: PreferenceState | None = None

    def __post_init__(self) -> None:
        pairs = len(self.chosen.policy)
        for name in ("chosen", "rejected", "chosen_negative_image", "rejected_negative_image"):
            answers: AnswerLogProbs | None = getattr(self, name)
            if answers is not None:
                answers.check(name, pairs, "pair")
        check_weights(self.weights, pairs, "pair")
        if self.reward_margins is not None:
            check_column("reward_margins", self.reward_margins, pairs, "pair")

    @property
    def pair_weights(self) -> Tensor:
        """[pairs] float, how much each pair counts."""
        return torch.ones_like(self.chosen.policy.detach()) if self.weights is None else self.weights

    def answers(self, state: PreferenceState | None = None) -> UnpairedInputs:
        """Each pair as two answers with a label, all chosen ones first, for losses that take answers one by one."""
        chosen, rejected = self.chosen, self.rejected
        has_reference = chosen.reference is not None and rejected.reference is not None
        return UnpairedInputs(
            AnswerLogProbs(
                torch.cat([chosen.policy, rejected.policy]),
                torch.cat([chosen.tokens, rejected.tokens]),
                torch.cat([chosen.reference, rejected.reference]) if has_reference else None,  # type: ignore[list-item]
            ),
            torch.arange(2 * len(chosen.policy), device=chosen.policy.device) < len(chosen.policy),
            None if self.weights is None else self.weights.repeat(2),
            state=state,
        )


@dataclass(frozen=True)
class UnpairedInputs:
    """Answers with a label of their own, good or bad.

    Attributes:
        answers: log-probabilities of each.
        is_desirable: [answers] bool.
        weights: [answers] float, at least 0, how much each answer counts; 0 for padding; None for 1 each.
        kl_baseline: [] float, nats, of the whole batch; see :func:`algorithms.preferences.unpaired.kl_baseline`.
        desirability: [answers] float, above 0 and below 1, the estimated chance that an answer to this prompt comes
            from the desirable ones; for losses that correct for it.
        state: what the loss remembers from earlier steps; None for losses without, and to start afresh.
    """

    answers: AnswerLogProbs
    is_desirable: Tensor
    weights: Tensor | None = None
    kl_baseline: Tensor | None = None
    desirability: Tensor | None = None
    state: PreferenceState | None = None

    def __post_init__(self) -> None:
        answers = len(self.answers.policy)
        self.answers.check("answers", answers, "answer")
        if self.is_desirable.shape != (answers,) or self.is_desirable.dtype != torch.bool:
            raise ValueError(
                f"is_desirable is {list(self.is_desirable.shape)} {self.is_desirable.dtype}; it should be [{answers}] "
                "bool"
            )
        check_weights(self.weights, answers, "answer")
        if self.kl_baseline is not None:
            require_finite("the KL baseline", self.kl_baseline.reshape(1), index_name="batch")
        if self.desirability is not None:
            check_column("desirability", self.desirability, answers, "answer")
            if bool(((self.desirability <= 0) | (self.desirability >= 1)).any()):
                raise ValueError("desirability is a probability: every value must be above 0 and below 1")

    @property
    def answer_weights(self) -> Tensor:
        """[answers] float, how much each answer counts."""
        return torch.ones_like(self.answers.policy.detach()) if self.weights is None else self.weights


@dataclass(frozen=True)
class PreferenceOutcome:
    """A preference loss by pair (or answer), before the mean over the batch.

    Attributes:
        values: [pairs] float, to be minimised.
        weights: [pairs] float, how much each counts.
        sums: metrics, and what the loss's state learns from; no gradient.
    """

    values: Tensor
    weights: Tensor
    sums: Sums

    def loss(self, total_weight: float | Tensor) -> Tensor:
        """[] float, this part's share of the batch's loss: the shares of all micro-batches and ranks add up to it.

        Args:
            total_weight: sum of the weights of the whole batch, over all micro-batches and ranks; above 0.
        """
        if float(total_weight) <= 0:
            raise ValueError(
                f"total_weight must be above 0, got {float(total_weight):g}: a batch without a pair that counts has "
                "no loss; skip it"
            )
        return (self.weights * self.values).sum() / total_weight


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """[2] float, without gradient: sum of weights times values, and of weights. An entry of :data:`Sums`."""
    weights = weights.detach()
    return torch.stack([(weights * values.detach().to(weights)).sum(), weights.sum()])


def add_sums(parts: list[Sums]) -> Sums:
    """Sums of the whole from those of its parts, which have the same names."""
    return {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}


def means(sums: Mapping[str, Tensor]) -> dict[str, float]:
    """The mean of each name; names without weight (no undesirable answer in the batch, say) are left out."""
    return {name: float(pair[0] / pair[1]) for name, pair in sums.items() if float(pair[1]) > 0}


def check_column(name: str, values: Tensor, rows: int, index_name: str) -> None:
    """Raise unless `values` is [rows] and finite."""
    if values.shape != (rows,):
        raise ValueError(f"{name} has the shape {list(values.shape)}; with {rows} {index_name}s it should be [{rows}]")
    require_finite(name, values, index_name=index_name)


def check_weights(weights: Tensor | None, rows: int, index_name: str) -> None:
    """Raise unless `weights` is None, or [rows], finite and nowhere below 0."""
    if weights is None:
        return
    check_column("weights", weights, rows, index_name)
    if bool((weights < 0).any()):
        first = int((weights < 0).nonzero()[0])
        raise ValueError(f"weights of {index_name} {first} is {float(weights[first]):g}; a weight is at least 0")


Function = TypeVar("Function", bound=Callable[..., PreferenceOutcome])


def preference_loss(
    name: str,
    *,
    options: type[Options] = Options,
    is_paired: bool = True,
    needs_reference: bool = True,
    needs_negative_image: bool = False,
    needs: frozenset[str] = frozenset(),
    initial_state: Callable[[Options], PreferenceState] | None = None,
    formula: str = "",
    source: str = "",
    use_when: str = "",
) -> Callable[[Function], Function]:
    """Register the decorated function as the preference loss `name`; see :class:`PreferenceLoss`."""
    return PREFERENCE_LOSSES.adding(
        lambda function: PreferenceLoss(
            name,
            function,
            options,
            formula,
            source,
            use_when,
            is_paired,
            needs_reference,
            needs_negative_image,
            needs,
            initial_state,
        )
    )
