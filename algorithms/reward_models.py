"""Reward-model losses: on pairs, on pairs with ties, on rankings, and on scores with written critiques."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from algorithms.finite import require_finite
from algorithms.preferences.inputs import (
    AnswerLogProbs,
    PreferenceOutcome,
    check_column,
    check_weights,
    weighted_sum,
)
from algorithms.preferences.pairs import PairOptions, pair_weights, pairs_from_groups
from algorithms.registry import REWARD_MODEL_LOSSES, Options, method

PAD_SCORE = -1e30
"""Score of the places that pad a short ranking; finite, so that its gradient is 0 and not NaN."""


@dataclass(frozen=True)
class PairScores:
    """Scores of pairs of answers to the same prompt.

    Attributes:
        chosen: [pairs] float, the reward model's score of the preferred answer; carries the gradient.
        rejected: [pairs] float, of the other.
        margins: [pairs] float, at least 0, how much better annotators found the chosen one, in units of score.
        is_tie: [pairs] bool, pairs without a preference; which answer is called chosen then means nothing.
        weights: [pairs] float, at least 0, how much each pair counts; None for 1 each.
        chosen_critiques, rejected_critiques: log-probabilities, by the same model, of the critiques written of each.
    """

    chosen: Tensor
    rejected: Tensor
    margins: Tensor | None = None
    is_tie: Tensor | None = None
    weights: Tensor | None = None
    chosen_critiques: AnswerLogProbs | None = None
    rejected_critiques: AnswerLogProbs | None = None

    def __post_init__(self) -> None:
        pairs = len(self.chosen)
        check_column("the chosen score", self.chosen, pairs, "pair")
        check_column("the rejected score", self.rejected, pairs, "pair")
        check_weights(self.weights, pairs, "pair")
        if self.margins is not None:
            check_column("margins", self.margins, pairs, "pair")
            if bool((self.margins < 0).any()):
                first = int((self.margins < 0).nonzero()[0])
                raise ValueError(
                    f"margins of pair {first} is {float(self.margins[first]):g}; the chosen answer is the better one, "
                    "so a margin is at least 0. Swap the answers"
                )
        if self.is_tie is not None and (self.is_tie.shape != (pairs,) or self.is_tie.dtype != torch.bool):
            raise ValueError(f"is_tie is {list(self.is_tie.shape)} {self.is_tie.dtype}; it should be [{pairs}] bool")
        for name in ("chosen_critiques", "rejected_critiques"):
            critiques: AnswerLogProbs | None = getattr(self, name)
            if critiques is not None:
                critiques.check(name, pairs, "pair")

    @property
    def pair_weights(self) -> Tensor:
        """[pairs] float, how much each pair counts."""
        return torch.ones_like(self.chosen.detach()) if self.weights is None else self.weights


@dataclass(frozen=True)
class RankedScores:
    """Scores of several answers to each prompt, which annotators ranked. The answers to a prompt stand together.

    Attributes:
        scores: [answers] float, the reward model's; carries the gradient.
        rank: [answers] int64, place among the answers to the same prompt, the best lowest; equal places are ties.
        prompt: [answers] int64, the prompt each answers; prompts may differ in answers and be in any order.
        weights: [prompts] float, at least 0, how much each prompt counts, by ascending prompt; None for 1 each.
    """

    scores: Tensor
    rank: Tensor
    prompt: Tensor
    weights: Tensor | None = None

    def __post_init__(self) -> None:
        answers = len(self.scores)
        check_column("the score", self.scores, answers, "answer")
        for name, values in (("rank", self.rank), ("prompt", self.prompt)):
            if values.shape != (answers,) or values.dtype != torch.int64:
                raise ValueError(f"{name} is {list(values.shape)} {values.dtype}; it should be [{answers}] int64")
        check_weights(self.weights, len(self.prompt.unique()), "prompt")


class BradleyTerryOptions(Options):
    """Options of the Bradley-Terry loss."""

    has_margin: bool = Field(True, description="Take the pairs' margins into account, where they are given.")
    centring: float = Field(
        0.0, ge=0.0, description="Weight of (r_c + r_r)², which keeps scores around 0; 0.01 is usual."
    )


class TieOptions(Options):
    """Options of the losses that know ties."""

    model: Literal["rao_kupper", "davidson"] = Field(
        "rao_kupper", description="Ties by a threshold that a difference must pass, or by the geometric mean."
    )
    tie_chance: float = Field(
        0.5, gt=0.0, lt=1.0, description="Probability that answers of equal score are called a tie."
    )
    centring: float = Field(0.0, ge=0.0, description="Weight of (r_c + r_r)², which keeps scores around 0.")


class RankingOptions(Options):
    """Options of the losses on rankings."""

    centring: float = Field(0.0, ge=0.0, description="Weight of the squared mean score of each prompt's answers.")


class CritiqueOptions(BradleyTerryOptions):
    """Options of the loss with critiques."""

    critique_weight: float = Field(1.0, ge=0.0, description="Weight of the critiques' loss (the paper's lambda).")


def _pair_outcome(scores: PairScores, values: Tensor, centring: float, **metrics: Tensor) -> PreferenceOutcome:
    """Adds the centring, and sums of chosen_score, rejected_score, margin, accuracy (among pairs that aren't ties; a
    draw counts a half) and squared_sum."""
    weights = scores.pair_weights
    total = scores.chosen + scores.rejected
    margins = (scores.chosen - scores.rejected).detach()
    decided = weights if scores.is_tie is None else weights * ~scores.is_tie
    if centring > 0:
        values = values + centring * total.square()
    reported = {
        "chosen_score": scores.chosen,
        "rejected_score": scores.rejected,
        "margin": margins,
        "squared_sum": total.square(),
        **metrics,
    }
    sums = {name: weighted_sum(each, weights) for name, each in reported.items()}
    sums["accuracy"] = weighted_sum((margins.sign() + 1) / 2, decided)
    return PreferenceOutcome(values, weights, sums)


def _bradley_terry_values(scores: PairScores, has_margin: bool) -> Tensor:
    difference = scores.chosen - scores.rejected
    if has_margin and scores.margins is not None:
        difference = difference - scores.margins
    if scores.is_tie is not None and bool(scores.is_tie.any()):
        raise ValueError(
            f"{int(scores.is_tie.sum())} pairs are ties, to which the Bradley-Terry model gives no probability: leave "
            "them out, or choose the loss bradley_terry_ties"
        )
    return -logsigmoid(difference)


@method(
    REWARD_MODEL_LOSSES,
    "bradley_terry",
    options=BradleyTerryOptions,
    formula="−log σ(r_c − r_r − m) + c (r_c + r_r)²",
    source="Bradley and Terry, 1952; margin: Touvron et al., arXiv 2307.09288, eq. 2; "
    "centring: Eisenstein et al., arXiv 2312.09244",
    use_when="Pairs with a clear preference, with or without grades of how clear.",
)
def bradley_terry(scores: PairScores, options: BradleyTerryOptions) -> PreferenceOutcome:
    """-log sigmoid(r_c - r_r - m) + c (r_c + r_r)^2.

    The margin m is Llama 2's (Touvron et al., arXiv 2307.09288, eq. 2). The loss without the second term is blind to a
    constant added to all scores of a prompt; the centring (Eisenstein et al., arXiv 2312.09244) fixes it near 0 by the
    pair's two scores, without a further pass.

    Returns:
        values [pairs].
    Raises:
        ValueError: a pair is a tie.
    """
    return _pair_outcome(scores, _bradley_terry_values(scores, options.has_margin), options.centring)


def tie_log_chances(difference: Tensor, options: TieOptions) -> tuple[Tensor, Tensor]:
    """Log-probabilities that the first of two answers is preferred, and that they tie.

    With p the tie's chance between equals. Rao-Kupper (1967), theta = (1 + p) / (1 - p), a = log theta:
    win = sigmoid(d - a), tie = (theta^2 - 1) sigmoid(d - a) sigmoid(-d - a).
    Davidson (1970), nu = p / (1 - p): win : tie : loss as exp(d/2) : 2 nu : exp(-d/2).

    Args:
        difference: [pairs] float, d, the first's score less the second's.
    Returns:
        [pairs] float, log-chance of a win; [pairs] float, of a tie. That of a loss is the win's at -d.
    """
    chance = torch.tensor(options.tie_chance, dtype=torch.float64)
    if options.model == "rao_kupper":
        threshold = float(torch.log1p(chance) - torch.log1p(-chance))
        win, loss = logsigmoid(difference - threshold), logsigmoid(-difference - threshold)
        return win, win + loss + float(torch.log(torch.expm1(torch.tensor(2 * threshold, dtype=torch.float64))))
    tie = torch.full_like(difference, float(torch.log(2 * chance / (1 - chance))))
    both = torch.stack([difference / 2, tie, -difference / 2]).log_softmax(0)
    return both[0], both[1]


@method(
    REWARD_MODEL_LOSSES,
    "bradley_terry_ties",
    options=TieOptions,
    formula="−log P(win) or −log P(tie): win = σ(d − a), tie = (e²ᵃ − 1) σ(d − a) σ(−d − a),  d = r_c − r_r; "
    "or win : tie : loss = e^{d/2} : 2ν : e^{−d/2}",
    source="Rao and Kupper, 1967, and Davidson, 1970; in preference learning Chen et al., arXiv 2409.17431",
    use_when="Annotators may call a tie; ties draw scores together and stay in the data.",
)
def bradley_terry_ties(scores: PairScores, options: TieOptions) -> PreferenceOutcome:
    """Negative log-probability of the annotators' verdict, a preference or a tie; see :func:`tie_log_chances`.

    Rao and Kupper (1967) or Davidson (1970), as used in preference learning by Chen et al. (arXiv 2409.17431). Without
    `is_tie` every pair is a preference.

    Returns:
        values [pairs]; finite for any finite scores. Sums also have tie_chance, the model's.
    """
    win, tie = tie_log_chances(scores.chosen - scores.rejected, options)
    values = -win if scores.is_tie is None else -torch.where(scores.is_tie, tie, win)
    return _pair_outcome(scores, values, options.centring, tie_chance=tie.exp())


def _ranking_outcome(
    ranked: RankedScores, values: Tensor, has_order: Tensor, index: Tensor, centring: float
) -> PreferenceOutcome:
    """A loss by prompt; prompts without an order to learn weigh 0. Sums also have accuracy, of ordered pairs."""
    prompts = len(values)
    weights = torch.ones_like(values.detach()) if ranked.weights is None else ranked.weights.to(values)
    weights = weights * has_order
    if centring > 0:
        counts = torch.bincount(index, minlength=prompts)
        mean = torch.zeros_like(values).index_add(0, index, ranked.scores) / counts
        values = values + centring * mean.square()
    better, worse = _ordered_pairs(ranked)
    margins = (ranked.scores[better] - ranked.scores[worse]).detach()
    by_pair = pair_weights(ranked.prompt, better).to(values) * weights[index[better]]
    return PreferenceOutcome(
        values,
        weights,
        {"margin": weighted_sum(margins, by_pair), "accuracy": weighted_sum((margins.sign() + 1) / 2, by_pair)},
    )


def _ordered_pairs(ranked: RankedScores) -> tuple[Tensor, Tensor]:
    """[pairs] int64, the better answer of each pair that isn't a tie, and [pairs] int64, the worse one."""
    return pairs_from_groups(-ranked.rank.double(), ranked.prompt, PairOptions(choice="all"))


@method(
    REWARD_MODEL_LOSSES,
    "ranking_pairs",
    options=RankingOptions,
    formula="−(1/pairs of the prompt) Σ log σ(r_better − r_worse), K(K − 1)/2 pairs of K answers",
    source="Ouyang et al., arXiv 2203.02155, eq. 1",
    use_when="Several answers to a prompt in order of preference, ties allowed.",
)
def ranking_pairs(ranked: RankedScores, options: RankingOptions) -> PreferenceOutcome:
    """Mean over all pairs of a prompt's ranking of -log sigmoid(r_better - r_worse) (InstructGPT, eq. 1).

    Ouyang et al., arXiv 2203.02155: all K choose 2 pairs of a prompt are one element of the batch, so every answer is
    scored once. Ties give no pair, and the mean is over those there are.

    Returns:
        values [prompts], by ascending prompt; weight 0 for prompts without a pair.
    """
    unique, index = ranked.prompt.unique(return_inverse=True)
    better, worse = _ordered_pairs(ranked)
    by_pair = -logsigmoid(ranked.scores[better] - ranked.scores[worse])
    by_pair = by_pair * pair_weights(ranked.prompt, better).to(by_pair)
    values = ranked.scores.new_zeros(len(unique)).index_add(0, index[better], by_pair)
    has_order = torch.bincount(index[better], minlength=len(unique)) > 0
    return _ranking_outcome(ranked, values, has_order, index, options.centring)


@method(
    REWARD_MODEL_LOSSES,
    "plackett_luce",
    options=RankingOptions,
    formula="−(1/(K − 1)) Σ_{k<K} [r_(k) − log Σ_{j≥k} exp r_(j)]",
    source="Plackett, 1975; Luce, 1959; for preference models Rafailov et al., arXiv 2305.18290, appendix A.3",
    use_when="Full rankings without ties, taken as one choice after another instead of as independent pairs.",
)
def plackett_luce(ranked: RankedScores, options: RankingOptions) -> PreferenceOutcome:
    """Negative log-probability of the ranking as successive choices of the best answer left, a mean over the choices.

    -1 / (K - 1) sum_k [r_(k) - log sum_{j >= k} exp r_(j)], r_(k) the score of the answer in place k (Plackett, 1975).
    The last choice has one answer and costs nothing. With two answers it is Bradley-Terry.

    Returns:
        values [prompts], by ascending prompt; weight 0 for prompts with one answer.
    Raises:
        ValueError: two answers to a prompt share a place; names the prompt.
    """
    unique, index, counts = ranked.prompt.unique(return_inverse=True, return_counts=True)
    order = ranked.rank.argsort(stable=True)
    order = order[index[order].argsort(stable=True)]
    row = index[order]
    place = torch.arange(len(order), device=order.device) - (counts.cumsum(0) - counts)[row]
    rank = ranked.rank[order]
    is_tie = (row[1:] == row[:-1]) & (rank[1:] == rank[:-1])
    if bool(is_tie.any()):
        prompt = int(unique[row[1:][is_tie][0]])
        raise ValueError(
            f"answers to prompt {prompt} share a place, to which Plackett-Luce gives no probability: break the tie, or "
            "choose the loss ranking_pairs"
        )
    longest = int(counts.max()) if len(counts) else 0
    # From worst to best, padding first: the running logsumexp of a row is then over those not better.
    column = longest - 1 - place
    scores = ranked.scores[order]
    filled = scores.new_full((len(unique), longest), PAD_SCORE).index_put((row, column), scores)
    left = filled.logcumsumexp(1)[row, column]
    values = scores.new_zeros(len(unique)).index_add(0, row, left - scores) / (counts - 1).clamp(min=1)
    return _ranking_outcome(ranked, values, counts > 1, index, options.centring)


@method(
    REWARD_MODEL_LOSSES,
    "critique",
    options=CritiqueOptions,
    formula="−log σ(r_c − r_r − m) + c (r_c + r_r)² + λ (NLL_c + NLL_r)/2,  NLL a token of each critique",
    source="Ankner et al., arXiv 2408.11791, the joint loss of critiques and scores",
    use_when="A reward model that writes a critique first and scores after it.",
)
def critique(scores: PairScores, options: CritiqueOptions) -> PreferenceOutcome:
    """Bradley-Terry on the scores given after a critique, plus the critiques' negative log-likelihood.

    Critique-out-Loud (Ankner et al., arXiv 2408.11791). The critiques' loss is a mean over the tokens of each, then
    over the two of a pair, so that a long critique doesn't drown the score. `critique_weight` 0 leaves Bradley-Terry.

    Raises:
        ValueError: there are no critiques, or a pair is a tie.
    """
    if scores.chosen_critiques is None or scores.rejected_critiques is None:
        raise ValueError("the loss critique needs chosen_critiques and rejected_critiques, which weren't given")
    nll = -(scores.chosen_critiques.token_mean + scores.rejected_critiques.token_mean) / 2
    values = _bradley_terry_values(scores, options.has_margin) + options.critique_weight * nll
    return _pair_outcome(scores, values, options.centring, critique_nll=nll)


def reward_model_outcome(
    name: str, inputs: PairScores | RankedScores, options: Options | dict[str, object]
) -> PreferenceOutcome:
    """The registered reward-model loss `name` on `inputs`, with its options by name or as read before.

    Raises:
        RegistryError: no such loss, or no such option.
        NonFiniteError: a loss is NaN or infinite although its inputs are finite; names the pair or prompt.
    """
    entry = REWARD_MODEL_LOSSES.get(name)
    read = options if isinstance(options, Options) else entry.read_options(options)
    outcome: PreferenceOutcome = entry.function(inputs, read)
    require_finite(f"the loss {name}", outcome.values, index_name="row")
    return outcome
