"""Statistics of tokens made in tiles against whole float64 logits, and what must never be allocated."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from algorithms.log_probs import full_kl, statistics_of_logits, token_log_probs
from algorithms.logit_tiles import LogitTransform

BANNED = (5, 17, 200)
# 37 tokens x 301 logits take 44,548 bytes in float32, so these budgets never hold them whole.
BUDGETS = {"few tokens, few logits at a time": 400, "narrow tiles, few tokens": 2048, "all tokens side by side": 40_000}


def inputs(dtype: torch.dtype, tokens: int = 37, width: int = 16, vocabulary: int = 301, seed: int = 0) -> list[Tensor]:
    """Hidden states, weight, bias and tokens that aren't banned."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, width), (vocabulary, width), (vocabulary,))
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    chosen = torch.randint(0, vocabulary, (tokens,), generator=generator)
    chosen[torch.isin(chosen, torch.tensor(BANNED))] = 9
    return [*(part.requires_grad_() for part in parts), chosen]


def exact_log_softmax(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, temperature: float, transform: LogitTransform, banned: Any
) -> Tensor:
    """[N, V] float64 straight from the definition; a banned token has -1e30."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    logits = logits * transform.scale
    if transform.softcap is not None:
        logits = torch.tanh(logits / transform.softcap) * transform.softcap
    is_banned = torch.zeros(len(weight), dtype=torch.bool)
    is_banned[list(banned)] = True
    return (logits / temperature).masked_fill(is_banned, -1e30).log_softmax(-1)


def exact_statistics(log_softmax: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    probabilities = log_softmax.exp()
    entropy = -(probabilities * log_softmax.clamp(min=-1e6)).sum(-1)
    return log_softmax.gather(1, tokens[:, None])[:, 0], entropy, probabilities.square().sum(-1)


def compare(dtype: torch.dtype, budget_bytes: int, transform: LogitTransform, tolerance: float) -> None:
    """Values and all gradients, of log-probability and entropy together, with everything switched on."""
    hidden, weight, bias, tokens = inputs(dtype)
    found = token_log_probs(
        hidden, weight, tokens, bias=bias, temperature=0.7, transform=transform, banned_token_ids=BANNED,
        with_entropy=True, entropy_gradient=True, with_collision=True, budget_bytes=budget_bytes,
    )  # fmt: skip
    log_softmax = exact_log_softmax(hidden, weight, bias, 0.7, transform, BANNED)
    exact = exact_statistics(log_softmax, tokens)
    for part, expected in zip(found, exact, strict=True):
        assert part is not None
        torch.testing.assert_close(part.double(), expected, atol=tolerance, rtol=tolerance)
    assert found.entropy is not None
    of_log_prob = torch.linspace(-2, 2, len(tokens), dtype=torch.float64)
    of_entropy = torch.linspace(3, -1, len(tokens), dtype=torch.float64)
    leaves = (hidden, weight, bias)
    gradients = torch.autograd.grad((found.log_probs * of_log_prob + found.entropy * of_entropy).sum(), leaves)
    expected_gradients = torch.autograd.grad((exact[0] * of_log_prob + exact[1] * of_entropy).sum(), leaves)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        scale = float(expected.double().abs().max())
        torch.testing.assert_close(gradient.double(), expected.double(), atol=tolerance * scale, rtol=tolerance)


def test_two_equal_logits_among_four_give_what_was_worked_by_hand() -> None:
    # Logits (0, 0, ln 2, ln 4): probabilities 1/8, 1/8, 2/8, 4/8. The token of 2/8 has ln 1/4.
    # Entropy: 2 * 1/8 ln 8 + 1/4 ln 4 + 1/2 ln 2 = (6/8 + 2/4 + 1/2) ln 2 = 1.75 ln 2.
    # Collision: (1 + 1 + 4 + 16) / 64 = 22/64.
    weight = torch.tensor([[0.0], [0.0], [math.log(2)], [math.log(4)]])
    found = token_log_probs(
        torch.ones(1, 1), weight, torch.tensor([2]), with_entropy=True, with_collision=True, budget_bytes=8
    )
    assert found.log_probs.item() == pytest.approx(-math.log(4))
    assert found.entropy is not None
    assert found.collision is not None
    assert found.entropy.item() == pytest.approx(1.75 * math.log(2))
    assert found.collision.item() == pytest.approx(22 / 64)


def test_a_full_kl_worked_by_hand() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3.
    found = full_kl(
        torch.ones(1, 1), torch.zeros(2, 1), torch.ones(1, 1), torch.tensor([[0.0], [math.log(3)]]), budget_bytes=8
    )
    assert found.item() == pytest.approx(0.5 * math.log(4 / 3))


@pytest.mark.parametrize("transform", [LogitTransform(), LogitTransform(0.5, 3.0)], ids=["plain", "scaled and capped"])
@pytest.mark.parametrize("budget_bytes", BUDGETS.values(), ids=BUDGETS.keys())
def test_tiles_give_the_exact_values_and_gradients_up_to_rounding(budget_bytes: int, transform: LogitTransform) -> None:
    compare(torch.float64, budget_bytes, transform, tolerance=1e-11)
    compare(torch.float32, budget_bytes, transform, tolerance=2e-5)


@pytest.mark.parametrize("budget_bytes", [2048, 40_000])
def test_bfloat16_differs_by_no_more_than_the_head_itself_rounds(budget_bytes: int) -> None:
    # Logits up to 16 are rounded to 2^-8 of their size, 0.03, and divided by a temperature of 0.7.
    compare(torch.bfloat16, budget_bytes, LogitTransform(), tolerance=0.06)


def test_in_bfloat16_tiles_agree_with_whole_bfloat16_logits_to_float32_rounding() -> None:
    hidden, weight, bias, tokens = inputs(torch.bfloat16)
    found = token_log_probs(hidden, weight, tokens, bias=bias, budget_bytes=4096).log_probs
    products = torch.mm(hidden, weight.T).add_(bias)
    torch.testing.assert_close(found, statistics_of_logits(products, tokens).log_probs, atol=2e-5, rtol=0)


def test_sums_over_blocks_of_tokens_are_kept_in_float32_for_bfloat16() -> None:
    # 512 tokens, each adding the same to the head's gradient: a bfloat16 sum of 1 + 2^-9 ... stops growing at 256.
    hidden, weight = torch.ones(512, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16)
    weight.requires_grad_()
    found = token_log_probs(hidden, weight, torch.zeros(512, dtype=torch.long), budget_bytes=4 * 2 * 6)
    found.log_probs.sum().backward()
    # (1 - p) h summed: 512 * 0.5.
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [256.0, -256.0]


@settings(max_examples=50, deadline=None)
@given(
    tokens=st.integers(1, 9),
    width=st.integers(1, 5),
    vocabulary=st.integers(2, 40),
    budget_bytes=st.integers(16, 3000),
    temperature=st.floats(0.2, 3.0),
    seed=st.integers(0, 1000),
)
def test_neither_shape_nor_budget_changes_anything(
    tokens: int, width: int, vocabulary: int, budget_bytes: int, temperature: float, seed: int
) -> None:
    hidden, weight, _, _ = inputs(torch.float64, tokens, width, vocabulary, seed)
    chosen = torch.arange(tokens) % vocabulary
    banned = (vocabulary - 1,) if vocabulary > tokens else ()
    exact = exact_statistics(exact_log_softmax(hidden, weight, None, temperature, LogitTransform(), banned), chosen)
    found = token_log_probs(
        hidden, weight, chosen, temperature=temperature, banned_token_ids=banned, with_entropy=True,
        entropy_gradient=True, with_collision=True, budget_bytes=budget_bytes,
    )  # fmt: skip
    assert found.entropy is not None
    gradients = torch.autograd.grad((2 * found.log_probs - found.entropy).sum(), (hidden, weight))
    expected = torch.autograd.grad((2 * exact[0] - exact[1]).sum(), (hidden, weight))
    torch.testing.assert_close(list(found), list(exact), atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(gradients, expected, atol=1e-9, rtol=1e-9)


def test_gradients_are_those_of_finite_differences() -> None:
    hidden, weight, bias, tokens = inputs(torch.float64, tokens=3, width=2, vocabulary=11)

    def both(*leaves: Tensor) -> tuple[Tensor, ...]:
        found = token_log_probs(
            leaves[0], leaves[1], tokens % 11, bias=leaves[2], temperature=0.8, transform=LogitTransform(0.9, 2.0),
            with_entropy=True, entropy_gradient=True, budget_bytes=64,
        )  # fmt: skip
        assert found.entropy is not None
        return found.log_probs, found.entropy

    assert torch.autograd.gradcheck(both, (hidden, weight, bias))


def test_the_gradient_of_the_full_kl_is_that_of_finite_differences() -> None:
    hidden, weight, bias, _ = inputs(torch.float64, tokens=3, width=2, vocabulary=11)
    reference_hidden, reference_weight, *_ = inputs(torch.float64, tokens=3, width=4, vocabulary=11, seed=1)

    def divergence(*leaves: Tensor) -> Tensor:
        return full_kl(
            leaves[0], leaves[1], reference_hidden, reference_weight, bias=leaves[2], temperature=0.8,
            transform=LogitTransform(0.9, 2.0), reference_transform=LogitTransform(1.5), banned_token_ids=(4,),
            budget_bytes=64,
        )  # fmt: skip

    assert torch.autograd.gradcheck(divergence, (hidden, weight, bias))


@pytest.mark.parametrize("budget_bytes", [1024, 4096, 1 << 30])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 5e-5)])
def test_the_full_kl_is_the_sum_over_the_vocabulary(budget_bytes: int, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, bias, _ = inputs(dtype)
    reference_hidden, reference_weight, reference_bias, _ = inputs(dtype, width=8, seed=1)
    transform, other = LogitTransform(softcap=4.0), LogitTransform(0.5)
    found = full_kl(
        hidden, weight, reference_hidden, reference_weight, bias=bias, reference_bias=reference_bias, temperature=0.7,
        transform=transform, reference_transform=other, banned_token_ids=BANNED, budget_bytes=budget_bytes,
    )  # fmt: skip
    policy = exact_log_softmax(hidden, weight, bias, 0.7, transform, BANNED)
    reference = exact_log_softmax(reference_hidden, reference_weight, reference_bias, 0.7, other, BANNED)
    exact = (policy.exp() * (policy - reference)).sum(-1)
    torch.testing.assert_close(found.double(), exact, atol=tolerance, rtol=tolerance)
    weights = torch.linspace(-1, 1, len(hidden), dtype=torch.float64)
    gradients = torch.autograd.grad((found * weights).sum(), (hidden, weight, bias))
    expected = torch.autograd.grad((exact * weights).sum(), (hidden, weight, bias))
    for one, other in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, other, atol=10 * tolerance, rtol=10 * tolerance)


def test_the_kl_of_a_model_from_itself_is_zero_and_has_no_gradient() -> None:
    hidden, weight, _, _ = inputs(torch.float32)
    found = full_kl(hidden, weight, hidden.detach(), weight.detach(), budget_bytes=2048)
    found.sum().backward()
    assert hidden.grad is not None
    assert found.abs().max() < 1e-5
    assert hidden.grad.abs().max() < 1e-4


def test_a_shift_of_all_logits_changes_nothing() -> None:
    hidden, weight, bias, tokens = inputs(torch.float64)
    shifted = token_log_probs(hidden, weight, tokens, bias=bias + 500.0, with_entropy=True, budget_bytes=2048)
    plain = token_log_probs(hidden, weight, tokens, bias=bias, with_entropy=True, budget_bytes=2048)
    torch.testing.assert_close(list(shifted[:2]), list(plain[:2]), atol=1e-10, rtol=0)


def test_permuting_the_tokens_permutes_the_statistics() -> None:
    hidden, weight, _, tokens = inputs(torch.float64)
    order = torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))
    permuted = token_log_probs(hidden[order], weight, tokens[order], budget_bytes=2048).log_probs
    torch.testing.assert_close(permuted, token_log_probs(hidden, weight, tokens, budget_bytes=2048).log_probs[order])


def test_micro_batches_have_the_gradient_of_the_whole() -> None:
    hidden, weight, _, tokens = inputs(torch.float64)
    whole = torch.autograd.grad(token_log_probs(hidden, weight, tokens, budget_bytes=2048).log_probs.sum(), weight)[0]
    halves = [
        torch.autograd.grad(
            token_log_probs(hidden[part], weight, tokens[part], budget_bytes=2048).log_probs.sum(), weight
        )[0]
        for part in (slice(0, 20), slice(20, None))
    ]
    torch.testing.assert_close(halves[0] + halves[1], whole)


@pytest.mark.parametrize("scale", [1e4, 1e-6])
def test_great_and_small_logits_stay_finite(scale: float) -> None:
    hidden, weight, _, tokens = inputs(torch.float32)
    found = token_log_probs(
        hidden * scale, weight, tokens, with_entropy=True, entropy_gradient=True, banned_token_ids=BANNED,
        budget_bytes=2048,
    )  # fmt: skip
    assert found.entropy is not None
    gradient = torch.autograd.grad((found.log_probs + 3 * found.entropy).sum(), weight)[0]
    assert torch.isfinite(found.log_probs).all()
    assert (found.entropy > -1e-3).all()
    assert torch.isfinite(gradient).all()


def test_whole_logits_with_bans_have_a_finite_gradient_of_the_entropy() -> None:
    # A banned logit of -3.4e38 times a gradient above 1 is infinite.
    logits = torch.zeros(1, 4, requires_grad=True)
    found = statistics_of_logits(
        logits, torch.tensor([0]), banned_token_ids=(3,), with_entropy=True, entropy_gradient=True
    )
    assert found.entropy is not None
    assert found.entropy.item() == pytest.approx(math.log(3))
    assert torch.isfinite(torch.autograd.grad(5 * found.entropy.sum(), logits)[0]).all()


def test_a_vocabulary_whose_first_tiles_are_all_banned_is_no_trouble() -> None:
    hidden, weight, _, tokens = inputs(torch.float32)
    banned = tuple(range(150))
    tokens = tokens.clamp(min=200)
    found = token_log_probs(
        hidden, weight, tokens, banned_token_ids=banned, with_entropy=True, with_collision=True, budget_bytes=2048
    )
    exact = exact_statistics(exact_log_softmax(hidden, weight, None, 1.0, LogitTransform(), banned), tokens)
    for part, expected in zip(found, exact, strict=True):
        assert part is not None
        torch.testing.assert_close(part.double(), expected, atol=2e-5, rtol=2e-5)


def test_nan_in_one_row_makes_that_row_nan_and_no_other() -> None:
    hidden, weight, _, tokens = inputs(torch.float32)
    with torch.no_grad():
        hidden[3, 2] = math.nan
        found = token_log_probs(hidden, weight, tokens, with_entropy=True, budget_bytes=2048)
    for part in found[:2]:
        assert part is not None
        assert part.isnan().nonzero().flatten().tolist() == [3]


def test_what_needs_no_gradient_gets_none() -> None:
    hidden, weight, _, tokens = inputs(torch.float32)
    found = token_log_probs(hidden, weight.detach(), tokens, with_entropy=True, with_collision=True, budget_bytes=2048)
    assert found.entropy is not None
    assert found.collision is not None
    assert not found.entropy.requires_grad
    assert not found.collision.requires_grad
    found.log_probs.sum().backward()
    assert hidden.grad is not None
    with torch.no_grad():
        assert not token_log_probs(hidden, weight, tokens, budget_bytes=2048).log_probs.requires_grad


def test_a_token_outside_of_the_vocabulary_is_refused_with_the_bound() -> None:
    hidden, weight, _, tokens = inputs(torch.float32)
    with pytest.raises(ValueError, match=r"\[0, 300\]"):
        token_log_probs(hidden, weight, tokens + 290, budget_bytes=2048)


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_a_temperature_that_is_not_above_zero_is_refused(temperature: float) -> None:
    hidden, weight, _, tokens = inputs(torch.float32)
    with pytest.raises(ValueError, match="temperature above 0"):
        token_log_probs(hidden, weight, tokens, temperature=temperature)


def test_vocabularies_that_differ_have_no_kl() -> None:
    hidden, weight, _, _ = inputs(torch.float32)
    with pytest.raises(ValueError, match="must agree"):
        full_kl(hidden, weight, hidden, weight[:-1])


class LargestTensor(TorchDispatchMode):
    """Records the most elements that a tensor made by any operation has, in the backward pass too."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, Tensor):
                self.elements = max(self.elements, part.untyped_storage().nbytes() // part.element_size())
        return result


def test_no_tensor_of_tokens_by_vocabulary_is_ever_made() -> None:
    tokens, width, vocabulary, budget_bytes = 64, 8, 4096, 128 << 10
    hidden, weight, _, chosen = inputs(torch.float32, tokens, width, vocabulary)
    reference = [part.detach() for part in inputs(torch.float32, tokens, width, vocabulary, seed=1)[:2]]
    with LargestTensor() as seen:
        found = token_log_probs(
            hidden, weight, chosen, with_entropy=True, entropy_gradient=True, with_collision=True,
            transform=LogitTransform(softcap=5.0), banned_token_ids=BANNED, budget_bytes=budget_bytes,
        )  # fmt: skip
        assert found.entropy is not None
        (found.log_probs + found.entropy).sum().backward()
        full_kl(hidden, weight, *reference, budget_bytes=budget_bytes).sum().backward()
    # The head's own gradient is the largest: 4,096 x 8; whole logits would be eight times as many.
    assert 0 < seen.elements <= vocabulary * width < tokens * vocabulary
