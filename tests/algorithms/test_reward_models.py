"""Losses of reward models against closed forms, float64 loops from the papers, finite differences and invariants."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.finite import NonFiniteError
from algorithms.preferences.inputs import AnswerLogProbs, add_sums, means
from algorithms.registry import REWARD_MODEL_LOSSES, Options, RegistryError
from algorithms.reward_models import (
    PairScores,
    RankedScores,
    TieOptions,
    reward_model_outcome,
    tie_log_chances,
)

PAIRWISE = ["bradley_terry", "bradley_terry_ties", "critique"]
RANKED = ["ranking_pairs", "plackett_luce"]
MODELS = ["rao_kupper", "davidson"]


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def critiques(policy: Tensor, tokens: int) -> AnswerLogProbs:
    return AnswerLogProbs(policy, torch.full(policy.shape, tokens, dtype=torch.int64))


def random_scores(count: int, seed: int, *, ties: bool = False) -> PairScores:
    generator = torch.Generator().manual_seed(seed)

    def draw() -> Tensor:
        return 4 * torch.rand(count, generator=generator, dtype=torch.float64) - 2

    return PairScores(
        draw(),
        draw(),
        draw().abs(),
        draw() > 0 if ties else None,
        draw().abs() + 0.1,
        critiques(-draw().abs(), 3),
        critiques(-draw().abs(), 5),
    )


def ranking(groups: list[list[int]], seed: int) -> RankedScores:
    """Random scores for prompts 0, 3, 6, ... with these ranks, shuffled."""
    generator = torch.Generator().manual_seed(seed)
    rank = torch.tensor([place for ranks in groups for place in ranks], dtype=torch.int64)
    prompt = torch.tensor([3 * index for index, ranks in enumerate(groups) for _ in ranks], dtype=torch.int64)
    order = torch.randperm(len(rank), generator=generator)
    scores = 4 * torch.rand(len(rank), generator=generator, dtype=torch.float64) - 2
    return RankedScores(scores, rank[order], prompt[order])


def values(name: str, inputs: PairScores | RankedScores, **options: object) -> Tensor:
    return reward_model_outcome(name, inputs, options).values


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def test_bradley_terry_is_that_worked_by_hand() -> None:
    # Scores 2 and 0.5, margin 0.5: log(1 + e^-1) = 0.3132617; centring 0.1 * 2.5^2 = 0.625 more; without the margin
    # log(1 + e^-1.5) = 0.2014133.
    scores = PairScores(tensor(2.0), tensor(0.5), tensor(0.5))
    torch.testing.assert_close(values("bradley_terry", scores), tensor(0.3132616875))
    torch.testing.assert_close(values("bradley_terry", scores, centring=0.1), tensor(0.9382616875))
    torch.testing.assert_close(values("bradley_terry", scores, has_margin=False), tensor(0.2014132780))


def test_ties_are_those_worked_by_hand() -> None:
    # Chance of a tie between equals 1/2. Rao-Kupper: theta = 3; scores log 6 and log 2 are strengths 6 and 2:
    # win 6 / (6 + 3 * 2) = 1/2, tie (9 - 1) * 12 / ((6 + 6) * (18 + 2)) = 0.4, loss 2 / (2 + 18) = 0.1.
    # Davidson: nu = 1; strengths 4 and 1: 4 + 1 + 2 * sqrt(4) = 9: win 4/9, tie 4/9, loss 1/9.
    for model, first, second, chances in (
        ("rao_kupper", 6.0, 2.0, (0.5, 0.4, 0.1)),
        ("davidson", 4.0, 1.0, (4 / 9, 4 / 9, 1 / 9)),
    ):
        high, low = tensor(math.log(first)), tensor(math.log(second))
        tied = PairScores(high, low, is_tie=torch.tensor([True]))
        torch.testing.assert_close(
            values("bradley_terry_ties", PairScores(high, low), model=model).exp(), tensor(1 / chances[0])
        )
        torch.testing.assert_close(values("bradley_terry_ties", tied, model=model).exp(), tensor(1 / chances[1]))
        torch.testing.assert_close(
            values("bradley_terry_ties", PairScores(low, high), model=model).exp(), tensor(1 / chances[2])
        )


@pytest.mark.parametrize("model", MODELS)
@settings(max_examples=50, deadline=None)
@given(difference=st.floats(-30, 30), chance=st.floats(0.01, 0.95))
def test_chances_of_win_tie_and_loss_add_up_to_one(model: str, difference: float, chance: float) -> None:
    options = TieOptions.model_validate({"model": model, "tie_chance": chance})
    win, tie = tie_log_chances(tensor(difference), options)
    loss, tie_back = tie_log_chances(tensor(-difference), options)
    torch.testing.assert_close(win.exp() + tie.exp() + loss.exp(), tensor(1.0))
    torch.testing.assert_close(tie, tie_back)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("chance", [0.05, 0.5, 0.9])
def test_equals_tie_with_the_chance_that_was_set(model: str, chance: float) -> None:
    _, tie = tie_log_chances(tensor(0.0), TieOptions.model_validate({"model": model, "tie_chance": chance}))
    torch.testing.assert_close(tie.exp(), tensor(chance))


@pytest.mark.parametrize("model", MODELS)
def test_where_ties_are_all_but_impossible_it_is_bradley_terry(model: str) -> None:
    scores = replace(random_scores(5, 1), margins=None)
    with_ties = values("bradley_terry_ties", scores, model=model, tie_chance=1e-12)
    torch.testing.assert_close(with_ties, values("bradley_terry", scores))


@pytest.mark.parametrize("model", MODELS)
def test_a_tie_pulls_scores_together(model: str) -> None:
    high, low = tensor(3.0).requires_grad_(), tensor(-1.0).requires_grad_()
    scores = PairScores(high, low, is_tie=torch.tensor([True]))
    values("bradley_terry_ties", scores, model=model).sum().backward()
    assert high.grad is not None
    assert low.grad is not None
    assert high.grad > 0 > low.grad


def test_a_tie_is_refused_where_it_has_no_chance() -> None:
    scores = PairScores(tensor(1.0, 2.0), tensor(0.0, 0.0), is_tie=torch.tensor([False, True]))
    with pytest.raises(ValueError, match=r"1 pairs are ties.*bradley_terry_ties"):
        values("bradley_terry", scores)


def test_the_critiques_loss_is_that_worked_by_hand() -> None:
    # Equal scores: log 2. Critiques of -6 nats over 3 tokens and -4 over 4: (2 + 1) / 2, times 0.5: 0.75.
    scores = PairScores(
        tensor(1.0),
        tensor(1.0),
        chosen_critiques=critiques(tensor(-6.0), 3),
        rejected_critiques=critiques(tensor(-4.0), 4),
    )
    torch.testing.assert_close(values("critique", scores, critique_weight=0.5), tensor(math.log(2) + 0.75))


def test_critiques_without_weight_leave_bradley_terry() -> None:
    scores = random_scores(6, 2)
    torch.testing.assert_close(
        values("critique", scores, critique_weight=0.0, centring=0.1), values("bradley_terry", scores, centring=0.1)
    )


def test_critiques_that_were_not_given_are_asked_for() -> None:
    with pytest.raises(ValueError, match="needs chosen_critiques and rejected_critiques"):
        values("critique", PairScores(tensor(1.0), tensor(0.0)))


def test_the_pairs_of_a_ranking_are_those_worked_by_hand() -> None:
    # Scores 2, 1, 0 in the order first, last, middle: pairs 2-1, 2-0, 0-1 with -log sigmoid(1), (2), (-1).
    ranked = RankedScores(tensor(2.0, 1.0, 0.0), torch.tensor([0, 2, 1]), torch.zeros(3, dtype=torch.int64))
    expected = (minus_log_sigmoid(1) + minus_log_sigmoid(2) + minus_log_sigmoid(-1)) / 3
    torch.testing.assert_close(values("ranking_pairs", ranked), tensor(expected))


def test_plackett_luce_is_that_worked_by_hand() -> None:
    # Strengths 1, 2, 3 in this order of preference: chance 1/6 * 2/5 = 1/15; a mean over two choices.
    ranked = RankedScores(tensor(1.0, 2.0, 3.0).log(), torch.tensor([10, 20, 30]), torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(values("plackett_luce", ranked), tensor(math.log(15) / 2))


def test_the_chances_of_all_rankings_add_up_to_one() -> None:
    scores = tensor(0.3, -1.0, 2.0, 0.5)
    total = sum(
        float((-3 * values("plackett_luce", RankedScores(scores, torch.tensor(places), torch.zeros(4).long()))).exp())
        for places in itertools.permutations(range(4))
    )
    assert total == pytest.approx(1.0)


def ranked_loop(name: str, ranked: RankedScores, centring: float) -> list[float]:
    results = []
    for prompt in sorted(set(ranked.prompt.tolist())):
        members = sorted(
            (int(ranked.rank[i]), float(ranked.scores[i]))
            for i in range(len(ranked.scores))
            if ranked.prompt[i] == prompt
        )
        if name == "ranking_pairs":
            terms = [minus_log_sigmoid(a[1] - b[1]) for a, b in itertools.combinations(members, 2) if a[0] < b[0]]
        else:
            terms = [
                math.log(sum(math.exp(score) for _, score in members[k:])) - members[k][1]
                for k in range(len(members) - 1)
            ]
        mean = sum(score for _, score in members) / len(members)
        results.append((sum(terms) / len(terms) if terms else 0.0) + centring * mean**2)
    return results


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 6), min_size=1, max_size=6), seed=st.integers(0, 2**31))
def test_plackett_luce_is_a_loop_over_choices(sizes: list[int], seed: int) -> None:
    ranked = ranking([list(range(size)) for size in sizes], seed)
    torch.testing.assert_close(
        values("plackett_luce", ranked, centring=0.1), tensor(*ranked_loop("plackett_luce", ranked, 0.1))
    )


@settings(max_examples=50, deadline=None)
@given(
    groups=st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=6), min_size=1, max_size=5),
    seed=st.integers(0, 2**31),
)
def test_ranking_pairs_is_a_loop_over_pairs_and_ties_give_none(groups: list[list[int]], seed: int) -> None:
    ranked = ranking(groups, seed)
    outcome = reward_model_outcome("ranking_pairs", ranked, {"centring": 0.1})
    torch.testing.assert_close(outcome.values, tensor(*ranked_loop("ranking_pairs", ranked, 0.1)))
    assert outcome.weights.tolist() == [float(len(set(ranks)) > 1) for ranks in groups]


@pytest.mark.parametrize("name", RANKED)
def test_a_ranking_of_two_is_bradley_terry(name: str) -> None:
    ranked = RankedScores(tensor(0.3, 1.5), torch.tensor([1, 0]), torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(values(name, ranked), values("bradley_terry", PairScores(tensor(1.5), tensor(0.3))))


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("model", MODELS)
def test_gradients_of_pairwise_losses_are_those_of_finite_differences(name: str, model: str) -> None:
    base = random_scores(4, 3, ties=name == "bradley_terry_ties")
    options = {"centring": 0.05, "model": model} if name == "bradley_terry_ties" else {"centring": 0.05}

    def of(chosen: Tensor, rejected: Tensor, critique: Tensor) -> Tensor:
        return values(
            name,
            replace(base, chosen=chosen, rejected=rejected, chosen_critiques=critiques(critique, 3)),
            **options,
        )

    assert torch.autograd.gradcheck(
        of,
        (base.chosen.requires_grad_(), base.rejected.requires_grad_(), tensor(-1.0, -2.0, -3.0, -4.0).requires_grad_()),
    )


@pytest.mark.parametrize("name", RANKED)
def test_gradients_of_rankings_are_those_of_finite_differences(name: str) -> None:
    ranked = ranking([[0, 1, 2, 3], [0], [1, 0], [2, 0, 1]], 4)
    assert torch.autograd.gradcheck(
        lambda scores: values(name, replace(ranked, scores=scores), centring=0.05), (ranked.scores.requires_grad_(),)
    )


@pytest.mark.parametrize("name", PAIRWISE)
def test_a_constant_added_to_all_scores_changes_nothing_but_the_centring(name: str) -> None:
    scores = random_scores(5, 5)
    moved = replace(scores, chosen=scores.chosen + 7.0, rejected=scores.rejected + 7.0)
    torch.testing.assert_close(values(name, moved), values(name, scores))
    assert (values(name, moved, centring=0.1) > values(name, scores, centring=0.1)).all()


@pytest.mark.parametrize("name", RANKED)
@settings(max_examples=20, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 2**31))
def test_a_constant_added_to_a_prompts_scores_changes_nothing(name: str, shift: float, seed: int) -> None:
    ranked = ranking([[0, 1, 2], [1, 0], [3, 1, 0, 2]], seed)
    moved = replace(ranked, scores=ranked.scores + shift * ranked.prompt)
    torch.testing.assert_close(values(name, moved), values(name, ranked))


@pytest.mark.parametrize("name", RANKED)
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31))
def test_the_order_in_which_answers_are_given_changes_nothing(name: str, seed: int) -> None:
    ranked = ranking([[0, 1, 2], [1, 0], [3, 1, 0, 2]], seed)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(seed))
    moved = RankedScores(ranked.scores[order], ranked.rank[order], ranked.prompt[order])
    torch.testing.assert_close(values(name, moved), values(name, ranked))


@pytest.mark.parametrize("size", [1e4, 1e20])
@pytest.mark.parametrize("model", MODELS)
def test_extreme_scores_do_not_overflow(size: float, model: str) -> None:
    high = torch.tensor([size, -size, size, size], requires_grad=True)
    low = torch.tensor([-size, size, size, -size], requires_grad=True)
    is_tie = torch.tensor([False, False, True, True])
    untied = PairScores(high, low)
    for loss in (
        values("bradley_terry", untied),
        values("bradley_terry_ties", replace(untied, is_tie=is_tie), model=model),
        values("plackett_luce", RankedScores(high, torch.tensor([0, 1, 2, 3]), torch.zeros(4, dtype=torch.int64))),
    ):
        gradients = torch.autograd.grad(loss.sum(), (high, low), allow_unused=True)
        assert torch.isfinite(loss).all()
        assert all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None)


def test_centring_leads_scores_to_a_sum_of_zero() -> None:
    scores = tensor(5.0, 4.0).requires_grad_()
    for _ in range(2000):
        pair = PairScores(scores[:1], scores[1:])
        (gradient,) = torch.autograd.grad(values("bradley_terry", pair, centring=0.1).sum(), scores)
        scores = (scores - 0.5 * gradient).detach().requires_grad_()
    assert float(scores.detach().sum()) == pytest.approx(0.0, abs=1e-6)
    assert scores[0] > scores[1]


def part(scores: PairScores, where: slice) -> PairScores:
    assert scores.margins is not None
    assert scores.chosen_critiques is not None
    assert scores.rejected_critiques is not None
    return PairScores(
        scores.chosen[where],
        scores.rejected[where],
        scores.margins[where],
        None if scores.is_tie is None else scores.is_tie[where],
        scores.pair_weights[where],
        critiques(scores.chosen_critiques.policy[where], 3),
        critiques(scores.rejected_critiques.policy[where], 5),
    )


@pytest.mark.parametrize("name", PAIRWISE)
def test_micro_batches_of_pairs_add_up_to_the_whole_batch(name: str) -> None:
    scores = random_scores(6, 8, ties=name == "bradley_terry_ties")
    whole = reward_model_outcome(name, scores, {"centring": 0.1})
    pieces = [
        reward_model_outcome(name, part(scores, where), {"centring": 0.1}) for where in (slice(None, 2), slice(2, None))
    ]
    total = whole.weights.sum()
    torch.testing.assert_close(sum(piece.loss(total) for piece in pieces), whole.loss(total))
    torch.testing.assert_close(add_sums([piece.sums for piece in pieces]), whole.sums)


@pytest.mark.parametrize("name", RANKED)
def test_micro_batches_of_prompts_add_up_to_the_whole_batch(name: str) -> None:
    ranked = ranking([[0, 1, 2], [1, 0], [0], [3, 1, 0, 2]], 6)
    whole = reward_model_outcome(name, ranked, {"centring": 0.1})
    pieces = [
        reward_model_outcome(
            name, RankedScores(ranked.scores[where], ranked.rank[where], ranked.prompt[where]), {"centring": 0.1}
        )
        for where in (ranked.prompt < 6, ranked.prompt >= 6)
    ]
    torch.testing.assert_close(sum(piece.loss(3.0) for piece in pieces), whole.loss(3.0))
    torch.testing.assert_close(add_sums([piece.sums for piece in pieces]), whole.sums)


def test_accuracy_counts_decided_pairs_and_a_draw_by_half() -> None:
    scores = PairScores(
        tensor(2.0, 0.0, 1.0, 9.0), tensor(1.0, 1.0, 1.0, 0.0), is_tie=torch.tensor([False, False, False, True])
    )
    found = means(reward_model_outcome("bradley_terry_ties", scores, {}).sums)
    assert found["accuracy"] == pytest.approx(0.5)
    assert found["margin"] == pytest.approx((1 - 1 + 0 + 9) / 4)


def test_rankings_report_each_prompt_alike() -> None:
    # Prompt 0: one pair, right. Prompt 1: three pairs, all wrong.
    ranked = RankedScores(tensor(1.0, 0.0, 0.0, 1.0, 2.0), torch.tensor([0, 1, 0, 1, 2]), torch.tensor([0, 0, 1, 1, 1]))
    assert means(reward_model_outcome("ranking_pairs", ranked, {}).sums)["accuracy"] == pytest.approx(0.5)


def test_answers_that_share_a_place_are_refused_by_plackett_luce() -> None:
    ranked = RankedScores(tensor(1.0, 0.0, 2.0), torch.tensor([0, 1, 1]), torch.tensor([4, 4, 4]))
    with pytest.raises(ValueError, match=r"answers to prompt 4 share a place.*ranking_pairs"):
        values("plackett_luce", ranked)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chosen": tensor(1.0, math.nan)}, "the chosen score of pair 1 is nan"),
        ({"rejected": tensor(math.inf, 0.0)}, "the rejected score of pair 0 is inf"),
        ({"margins": tensor(0.0, math.nan)}, "margins of pair 1 is nan"),
        ({"weights": tensor(math.nan, 1.0)}, "weights of pair 0 is nan"),
        ({"chosen_critiques": critiques(tensor(0.0, math.nan), 2)}, r"\(chosen_critiques\) of pair 1"),
    ],
)
def test_inputs_that_are_not_finite_are_refused_by_name(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(NonFiniteError, match=message):
        replace(PairScores(tensor(1.0, 1.0), tensor(0.0, 0.0)), **change)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"margins": tensor(0.0, -1.0)}, "margins of pair 1 is -1.*Swap the answers"),
        ({"rejected": tensor(0.0)}, r"the rejected score has the shape \[1\]"),
        ({"is_tie": torch.tensor([0, 1])}, r"is_tie is \[2\] torch\.int64; it should be \[2\] bool"),
        ({"weights": tensor(1.0, -1.0)}, "weights of pair 1 is -1"),
    ],
)
def test_inputs_that_make_no_sense_are_refused(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(PairScores(tensor(1.0, 1.0), tensor(0.0, 0.0)), **change)  # type: ignore[arg-type]


def test_a_ranking_that_is_not_finite_or_of_another_shape_is_refused() -> None:
    index = torch.zeros(2, dtype=torch.int64)
    with pytest.raises(NonFiniteError, match="the score of answer 1"):
        RankedScores(tensor(0.0, math.nan), index, index)
    with pytest.raises(ValueError, match=r"rank is \[2\] torch\.float64; it should be \[2\] int64"):
        RankedScores(tensor(0.0, 1.0), index.double(), index)


def test_options_out_of_bounds_are_refused() -> None:
    with pytest.raises(RegistryError, match="tie_chance"):
        values("bradley_terry_ties", PairScores(tensor(1.0), tensor(0.0)), tie_chance=1.0)


def test_every_reward_model_loss_tells_its_formula_source_and_use() -> None:
    assert set(REWARD_MODEL_LOSSES.names()) >= {*PAIRWISE, *RANKED}
    for name in [*PAIRWISE, *RANKED]:
        entry = REWARD_MODEL_LOSSES.get(name)
        assert entry.formula
        assert entry.source
        assert entry.use_when
        assert issubclass(entry.options, Options)
        assert all(field.description for field in entry.options.model_fields.values())
