"""Inner products and combinations of gradients in shards: whole and in pieces, on one rank and on two."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.finite import NonFiniteError
from algorithms.gradients.gradient_weights import GradientInputs, combine, gradient_weights, gram_matrix

SHAPES = ((3, 4), (5,), (), (0,), (2, 1, 3))


def random_gradients(objectives: int, seed: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator).to(dtype) for shape in SHAPES] for _ in range(objectives)]


def as_rows(gradients: list[list[Tensor]]) -> Tensor:
    return torch.stack([torch.cat([each.reshape(-1).double() for each in one]) for one in gradients])


def test_the_gram_matrix_is_the_one_worked_by_hand() -> None:
    # g1 = (1, 2 | 3), g2 = (0, -1 | 2): <g1, g1> = 14, <g1, g2> = -2 + 6 = 4, <g2, g2> = 5.
    gradients = [
        [torch.tensor([1.0, 2.0]), torch.tensor([[3.0]])],
        [torch.tensor([0.0, -1.0]), torch.tensor([[2.0]])],
    ]
    gram = gram_matrix(gradients)
    assert gram.dtype == torch.float64
    assert gram.tolist() == [[14.0, 4.0], [4.0, 5.0]]


@given(objectives=st.integers(1, 4), seed=st.integers(0, 99), block=st.sampled_from([1, 3, 5, 1 << 20]))
@settings(max_examples=30, deadline=None)
def test_blocks_change_neither_the_gram_matrix_nor_the_combination(objectives: int, seed: int, block: int) -> None:
    gradients = random_gradients(objectives, seed)
    flat = as_rows(gradients)
    torch.testing.assert_close(gram_matrix(gradients, block=block), flat @ flat.T)
    weights = torch.randn(objectives, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = weights @ flat
    torch.testing.assert_close(
        as_rows([list(combine(gradients, weights, block=block))])[0], expected, atol=1e-6, rtol=0
    )


def test_the_combination_is_written_over_the_first_gradient_alone() -> None:
    gradients = random_gradients(3, 0)
    before = as_rows(gradients)
    kept = [each.data_ptr() for each in gradients[0]]
    result = combine(gradients, torch.tensor([0.5, -1.0, 2.0]))
    assert [each.data_ptr() for each in result] == kept
    torch.testing.assert_close(as_rows(gradients)[1:], before[1:])
    torch.testing.assert_close(as_rows(gradients)[0], 0.5 * before[0] - before[1] + 2 * before[2], atol=1e-6, rtol=0)


def test_tensors_that_are_not_contiguous_are_combined_in_place_too() -> None:
    storage = torch.arange(12.0).reshape(3, 4)
    gradients = [[storage.T], [torch.ones(4, 3)]]
    assert gram_matrix(gradients).tolist() == [[506.0, 66.0], [66.0, 12.0]]
    combine(gradients, torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(storage, 2 * torch.arange(12.0).reshape(3, 4) + 1)


def test_large_weights_that_nearly_cancel_leave_no_noise() -> None:
    # 1e9 (g1 + g2) in float32 would err by 1e9 · 6e-8: more than the result itself.
    first = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    second = -first + 2**-20 * first.sign() * first.abs().clamp_min(0.5)
    expected = 1e9 * (first.double() + second.double())
    combine([[first], [second]], torch.tensor([1e9, 1e9], dtype=torch.float64))
    torch.testing.assert_close(first.double(), expected, rtol=1e-6, atol=0)


def test_bfloat16_gradients_are_summed_in_float64_and_rounded_once() -> None:
    gradients = random_gradients(3, 1, torch.bfloat16)
    flat = as_rows(gradients)
    torch.testing.assert_close(gram_matrix(gradients), flat @ flat.T)
    weights = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    combine(gradients, weights)
    assert torch.equal(as_rows(gradients)[0], (weights @ flat).to(torch.bfloat16).double())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_gradient_that_is_not_finite_names_its_objective(bad: float) -> None:
    gradients = random_gradients(3, 0)
    gradients[2][1][3] = bad
    with pytest.raises(NonFiniteError, match="squared norm of the gradient of objective 2"):
        gram_matrix(gradients)


def test_a_weight_that_is_not_finite_names_its_objective() -> None:
    with pytest.raises(NonFiniteError, match="weight of objective 1 is nan"):
        combine(random_gradients(2, 0), torch.tensor([1.0, math.nan]))


def test_gradients_that_do_not_match_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one objective"):
        gram_matrix([])
    with pytest.raises(ValueError, match=r"objective 1 must have the tensors of objective 0, \[\[2\]\], got \[\[3\]\]"):
        gram_matrix([[torch.zeros(2)], [torch.zeros(3)]])
    with pytest.raises(ValueError, match="is_replicated must have 1 entries"):
        gram_matrix([[torch.zeros(2)]], is_replicated=[True, False])
    with pytest.raises(ValueError, match=r"weights must be \[2\]"):
        combine(random_gradients(2, 0), torch.ones(3))


RANK = """
import json, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from algorithms.finite import NonFiniteError
from algorithms.gradients.gradient_weights import GradientInputs, combine, gradient_weights, gram_matrix

rank, store, out = int(sys.argv[1]), sys.argv[2], sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timedelta(seconds=60))
generator = torch.Generator().manual_seed(11)
whole = torch.randn(3, 40, generator=generator)
same = torch.randn(3, 6, generator=generator)
shards = [[one[rank * 25 : 25 + rank * 15], each] for one, each in zip(whole, same)]
gram = gram_matrix(shards, group=dist.group.WORLD, is_replicated=[False, True])
names = ("mgda", "pcgrad", "cagrad", "nash_mtl", "imtl_g")
weights = {name: gradient_weights(name, GradientInputs(gram, step=3)).tolist() for name in names}
combined = combine(shards, torch.tensor(weights["mgda"]))
shards[1][0][0] = float("nan") if rank == 1 else 1.0
try:
    gram_matrix(shards, group=dist.group.WORLD, is_replicated=[False, True])
    error = ""
except NonFiniteError as caught:
    error = str(caught)
result = {"gram": gram.tolist(), "weights": weights, "combined": [each.tolist() for each in combined], "error": error}
open(out, "w").write(json.dumps(result))
dist.destroy_process_group()
"""


def test_two_ranks_with_half_the_gradients_each_find_the_weights_of_one_with_all(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    outs = [tmp_path / f"rank{rank}.json" for rank in range(2)]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path / "store"), str(out)],
            cwd=root,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    first, second = (json.loads(out.read_text()) for out in outs)
    generator = torch.Generator().manual_seed(11)
    whole, same = torch.randn(3, 40, generator=generator), torch.randn(3, 6, generator=generator)
    gradients = [[one, each] for one, each in zip(whole, same, strict=True)]
    gram = gram_matrix(gradients)
    # The same bits on both ranks, and one rank's sum but for the order of additions.
    assert first["gram"] == second["gram"]
    assert first["weights"] == second["weights"]
    torch.testing.assert_close(torch.tensor(first["gram"], dtype=torch.float64), gram, rtol=1e-12, atol=1e-12)
    for name, weights in first["weights"].items():
        alone = gradient_weights(name, GradientInputs(gram, step=3))
        torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), alone, rtol=1e-8, atol=1e-9)
    # Shards of the combination are the combination's shards, and the replicated part is the same everywhere.
    expected = combine(gradients, gradient_weights("mgda", GradientInputs(gram)))
    together = torch.tensor(first["combined"][0] + second["combined"][0])
    torch.testing.assert_close(together, expected[0])
    torch.testing.assert_close(torch.tensor(first["combined"][1]), expected[1])
    assert first["combined"][1] == second["combined"][1]
    # A NaN on one rank is an error on both, so that neither waits for the other.
    assert "gradient of objective 1 is nan" in first["error"]
    assert first["error"] == second["error"]
