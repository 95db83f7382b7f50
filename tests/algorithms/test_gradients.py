"""Gradient combinations against their definitions on explicit vectors in float64, their invariants and edge cases.

The last tests compare with the package torchjd where it is installed. It differs, for these reasons:
- MGDA stops Frank-Wolfe at a step of 1e-3 or after 100 of them, ours at rounding: its direction is never shorter.
- MGDA with a zero gradient gives zero, as ours does with `zero_gradient: stop`.
- PCGrad draws its orders from torch's global generator, ours from seed and step: the same for two objectives, which
  have no order. With a zero gradient it never divides by its norm either.
- CAGrad returns zero where |g_w| is below 1e-4, ours a step that is still best; both meet the definition above that.
- Nash-MTL scales the Gram matrix by its norm and clips the result to length 1, so only the direction compares; it stops
  at a residual of 1e-3.
- IMTL-G keeps Σ w_k = 1 where that turns the direction round, and takes the pseudo-inverse where no combination has
  equal projections; ours keeps the direction that improves all, and stays.
"""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.finite import NonFiniteError
from algorithms.gradients.gradient_weights import (
    GradientInputs,
    gradient_weights,
    project_conflicts,
)
from algorithms.registry import GRADIENT_COMBINATIONS, RegistryError

BY_GRAM = ("mgda", "pcgrad", "cagrad", "nash_mtl", "imtl_g")
SCALE_FREE = ("nash_mtl", "imtl_g")


def rows(*values: tuple[float, ...]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def weights_of(name: str, gradients: Tensor, **options: object) -> Tensor:
    return gradient_weights(name, GradientInputs(gradients @ gradients.T), options)


def direction_of(name: str, gradients: Tensor, **options: object) -> Tensor:
    return weights_of(name, gradients, **options) @ gradients


@st.composite
def jacobians(draw: st.DrawFn, most: int = 6, decades: float = 2.0) -> Tensor:
    """K gradients over n parameters, of norms some decades apart; linearly dependent where K > n."""
    count, parameters = draw(st.integers(1, most)), draw(st.integers(1, 8))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    scales = 10 ** (decades * (torch.rand(count, 1, generator=generator, dtype=torch.float64) - 0.5))
    return scales * torch.randn(count, parameters, generator=generator, dtype=torch.float64)


def simplex_grid(count: int, steps: int) -> Tensor:
    """Every point of the simplex whose coordinates are multiples of 1 / steps."""
    points = [()]
    for _ in range(count - 1):
        points = [(*p, i) for p in points for i in range(steps - sum(p) + 1)]
    return torch.tensor([(*p, steps - sum(p)) for p in points], dtype=torch.float64) / steps


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        # g1 = (2, 0), g2 = (-1, 1). d = w (2, 0) + (1 - w)(-1, 1): |d|² = (3w - 1)² + (1 - w)², least at w = 2/5.
        ("mgda", {}, [0.4, 0.6]),
        # Unit gradients meet halfway: w ∝ 1/|g1| : 1/|g2| = 1/2 : 1/√2, so 1/(1 + √2) and √2/(1 + √2).
        ("mgda", {"normalise": True}, [1 / (1 + math.sqrt(2)), math.sqrt(2) / (1 + math.sqrt(2))]),
        # <g1, g2> = -2. g1 loses -2/2 g2: g1 + g2; g2 loses -2/4 g1: g2 + g1/2. Together 1.5 g1 + 2 g2.
        ("pcgrad", {}, [1.5, 2.0]),
        ("pcgrad", {"reduction": "mean"}, [0.75, 1.0]),
        ("cagrad", {"c": 0.0}, [0.5, 0.5]),
        # 4a - 2b = 1/a and -2a + 2b = 1/b: with a = x/2 and b = y/√2, x = y by symmetry and x²(1 - 1/√2) = 1.
        ("nash_mtl", {}, [0.5 / math.sqrt(1 - math.sqrt(0.5)), math.sqrt(0.5) / math.sqrt(1 - math.sqrt(0.5))]),
        # Equal projections onto two unit vectors is their bisector: w ∝ 1/2 : 1/√2.
        ("imtl_g", {}, [1 / (1 + math.sqrt(2)), math.sqrt(2) / (1 + math.sqrt(2))]),
    ],
)
def test_weights_are_those_worked_by_hand(name: str, options: dict[str, object], expected: list[float]) -> None:
    gradients = rows((2.0, 0.0), (-1.0, 1.0))
    torch.testing.assert_close(weights_of(name, gradients, **options), torch.tensor(expected, dtype=torch.float64))


def test_cagrad_of_two_orthogonal_gradients_is_the_one_worked_by_hand() -> None:
    # g1 = (1, 0), g2 = (0, 1): g0 = (1/2, 1/2), already fair, so d goes on along it: d = (1 + c) g0.
    torch.testing.assert_close(direction_of("cagrad", torch.eye(2).double(), c=0.5), rows((0.75, 0.75))[0])
    # The authors' code divides by 1 + c² = 1.25.
    torch.testing.assert_close(direction_of("cagrad", torch.eye(2).double(), c=0.5, rescale=True), rows((0.6, 0.6))[0])


@given(gradients=jacobians())
@settings(max_examples=50, deadline=None)
def test_mgda_improves_every_objective_by_at_least_its_squared_length(gradients: Tensor) -> None:
    weights = weights_of("mgda", gradients)
    direction = weights @ gradients
    assert weights.min() >= 0
    assert weights.sum().item() == pytest.approx(1.0)
    slack = direction @ direction - gradients @ direction
    norms = gradients.norm(dim=1)
    assert (slack / (norms * norms.min())).max() < 1e-9


@given(gradients=jacobians(most=4))
@settings(max_examples=20, deadline=None)
def test_no_point_of_a_fine_grid_on_the_simplex_is_shorter_than_mgda(gradients: Tensor) -> None:
    direction = direction_of("mgda", gradients)
    grid = simplex_grid(len(gradients), 24)
    assert direction.norm() <= (grid @ gradients).norm(dim=1).min() + 1e-9 * gradients.norm(dim=1).min()


@given(gradients=jacobians(most=2))
@settings(max_examples=50, deadline=None)
def test_mgda_of_two_gradients_is_the_closed_form(gradients: Tensor) -> None:
    if len(gradients) == 1:
        gradients = torch.cat([gradients, gradients.flip(1) * 3])
    first, second = gradients
    difference = (first - second).square().sum()
    share = ((second - first) @ second / difference).clamp(0, 1) if difference > 0 else torch.tensor(1.0).double()
    expected = share * first + (1 - share) * second
    torch.testing.assert_close(
        direction_of("mgda", gradients), expected, rtol=1e-7, atol=1e-7 * float(gradients.norm(dim=1).min())
    )


def test_mgda_stays_at_a_pareto_stationary_point() -> None:
    # Three gradients at 120 degrees: their mean is zero.
    angles = torch.tensor([0.0, 2.0, 4.0], dtype=torch.float64) * math.pi / 3
    direction = direction_of("mgda", torch.stack([angles.cos(), angles.sin()], 1))
    assert direction.norm() < 1e-12


def test_normalised_mgda_points_to_the_nearest_point_of_unit_gradients() -> None:
    gradients = torch.randn(4, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * rows(
        (1.0,), (100.0,), (0.01,), (3.0,)
    )
    ours = direction_of("mgda", gradients, normalise=True)
    unit = direction_of("mgda", gradients / gradients.norm(dim=1, keepdim=True))
    torch.testing.assert_close(ours / ours.norm(), unit / unit.norm())
    assert weights_of("mgda", gradients, normalise=True).sum().item() == pytest.approx(1.0)


def pcgrad_by_the_paper(gradients: Tensor, orders: Tensor) -> Tensor:
    """Algorithm 1 of arXiv 2001.06782 on the vectors themselves."""
    projected = []
    for i, order in enumerate(orders.tolist()):
        current = gradients[i].clone()
        for j in order:
            if j != i and float(current @ gradients[j]) < 0:
                current = current - (current @ gradients[j]) / (gradients[j] @ gradients[j]) * gradients[j]
        projected.append(current)
    return torch.stack(projected)


@given(gradients=jacobians(), seed=st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_pcgrad_is_the_papers_loop_over_vectors(gradients: Tensor, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    orders = torch.stack([torch.randperm(len(gradients), generator=generator) for _ in gradients])
    ours = project_conflicts(gradients @ gradients.T, orders) @ gradients
    scale = float(gradients.norm(dim=1).max())
    torch.testing.assert_close(ours, pcgrad_by_the_paper(gradients, orders), rtol=1e-8, atol=1e-9 * scale)


def test_pcgrad_never_projects_a_gradient_from_itself() -> None:
    # At 0°, 170° and 185°: the first is turned to 80° by the second and to 95° by the third, away from itself.
    angles = torch.deg2rad(torch.tensor([0.0, 170.0, 185.0], dtype=torch.float64))
    gradients = torch.stack([angles.cos(), angles.sin()], 1)
    orders = torch.tensor([[1, 2, 0], [1, 0, 2], [2, 1, 0]])
    projected = project_conflicts(gradients @ gradients.T, orders) @ gradients
    assert float(projected[0] @ gradients[0]) < 0
    torch.testing.assert_close(projected, pcgrad_by_the_paper(gradients, orders))


def test_pcgrad_draws_the_same_order_for_the_same_step_and_others_for_others() -> None:
    gram = torch.tensor([[1.0, -0.7, -0.2], [-0.7, 1.0, -0.4], [-0.2, -0.4, 1.0]], dtype=torch.float64)
    runs = [tuple(gradient_weights("pcgrad", GradientInputs(gram, step), {"seed": 7}).tolist()) for step in range(20)]
    assert runs == [
        tuple(gradient_weights("pcgrad", GradientInputs(gram, step), {"seed": 7}).tolist()) for step in range(20)
    ]
    assert len(set(runs)) > 1


def test_pcgrad_without_conflict_is_the_sum() -> None:
    gradients = rows((1.0, 0.0), (1.0, 2.0), (0.0, 3.0))
    assert weights_of("pcgrad", gradients).tolist() == [1.0, 1.0, 1.0]


def test_permuting_objectives_and_orders_permutes_pcgrad() -> None:
    gradients = torch.randn(4, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    gram = gradients @ gradients.T
    orders = torch.tensor([[1, 2, 3, 0], [3, 2, 1, 0], [0, 3, 1, 2], [2, 1, 0, 3]])
    moved = torch.tensor([2, 0, 3, 1])
    place = torch.argsort(moved)
    # Gradient a of the permuted problem is gradient moved[a], and j is called place[j].
    permuted = project_conflicts(gram[moved][:, moved], place[orders[moved]])
    torch.testing.assert_close(permuted, project_conflicts(gram, orders)[moved][:, moved])


@given(gradients=jacobians(), c=st.sampled_from([0.05, 0.4, 0.9, 0.99]))
@settings(max_examples=50, deadline=None)
def test_cagrad_keeps_its_constraint_and_meets_its_dual(gradients: Tensor, c: float) -> None:
    mean = gradients.mean(0)
    weights = weights_of("cagrad", gradients, c=c)
    direction = weights @ gradients
    radius = c * mean.norm()
    assert (direction - mean).norm() <= radius * (1 + 1e-9)
    assert weights.min() > 0
    # Any point of the simplex bounds the best worst case from above; this one leaves no room.
    share = weights - 1 / len(gradients)
    share = share / share.sum()
    bound = share @ gradients @ mean + radius * (share @ gradients).norm()
    scale = float((gradients @ mean).abs().max() + radius * gradients.norm(dim=1).max())
    assert float((gradients @ direction).min()) >= float(bound) - 1e-8 * scale


@pytest.mark.parametrize("seed", range(6))
def test_no_step_within_cagrads_ball_has_a_better_worst_objective(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    mean, c = gradients.mean(0), 0.6
    angles = torch.linspace(0, 2 * math.pi, 721, dtype=torch.float64)
    lengths = torch.linspace(0, 1, 81, dtype=torch.float64)
    ball = torch.stack([angles.cos(), angles.sin()], 1)[:, None] * lengths[:, None] * c * mean.norm() + mean
    worst = (ball.reshape(-1, 2) @ gradients.T).min(1).values.max()
    ours = float((gradients @ direction_of("cagrad", gradients, c=c)).min())
    assert float(worst) <= ours + 1e-9
    assert ours == pytest.approx(float(worst), abs=2e-3 * float(mean.norm() * gradients.norm(dim=1).max()))


def test_cagrad_where_two_oppose_still_takes_a_best_step() -> None:
    # The worst objective can't gain: its best is 0, reached by any step along the third within the ball.
    gradients = rows((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0))
    direction = direction_of("cagrad", gradients, c=0.4)
    assert abs(float(direction[0])) < 1e-9
    assert 0.2 - 1e-9 <= float(direction[1]) <= 1.4 / 3 + 1e-9


@given(gradients=jacobians())
@settings(max_examples=50, deadline=None)
def test_nash_mtl_solves_its_equation_or_stays_where_there_is_no_solution(gradients: Tensor) -> None:
    weights = weights_of("nash_mtl", gradients)
    if weights.sum() == 0:
        unit = gradients / gradients.norm(dim=1, keepdim=True)
        assert direction_of("mgda", unit).norm() <= 1e-6
        return
    assert weights.min() > 0
    direction = weights @ gradients
    # The error of the Gram matrix is multiplied by the weights where gradients nearly oppose.
    tolerance = 1e-9 + 1e-14 * float((weights * gradients.norm(dim=1)).max()) ** 2
    torch.testing.assert_close(
        weights * (gradients @ direction), torch.ones_like(weights), rtol=tolerance, atol=tolerance
    )
    assert float(direction @ direction) == pytest.approx(len(gradients), rel=10 * tolerance)


def test_nash_mtl_maximises_the_product_of_gains() -> None:
    gradients = torch.randn(3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    best = direction_of("nash_mtl", gradients)
    product = (gradients @ best).log().sum()
    others = best + 0.3 * torch.randn(500, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    others = others / others.norm(dim=1, keepdim=True) * best.norm()
    gains = others @ gradients.T
    gains = gains[(gains > 0).all(1)]
    assert len(gains) > 50
    assert gains.log().sum(1).max() <= product


@given(gradients=jacobians(most=5))
@settings(max_examples=50, deadline=None)
def test_imtl_g_has_equal_projections_onto_unit_gradients_and_worsens_none(gradients: Tensor) -> None:
    weights = weights_of("imtl_g", gradients)
    projections = gradients @ (weights @ gradients) / gradients.norm(dim=1)
    scale = float((weights.abs() * gradients.norm(dim=1)).max())
    assert float(projections.max() - projections.min()) <= 1e-5 * scale
    assert float(projections.min()) >= -1e-5 * scale
    assert abs(float(weights.sum())) <= 1 + 1e-9


def test_imtl_g_is_the_papers_closed_form() -> None:
    gradients = torch.randn(3, 6, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    unit = gradients / gradients.norm(dim=1, keepdim=True)
    # The paper's solution for the weights of objectives 2 to K: g1 Uᵀ (D Uᵀ)⁻¹, U = u1 - u_k, D = g1 - g_k.
    across, apart = unit[0] - unit[1:], gradients[0] - gradients[1:]
    others = gradients[0] @ across.T @ torch.linalg.inv(apart @ across.T)
    expected = torch.cat([1 - others.sum()[None], others])
    torch.testing.assert_close(weights_of("imtl_g", gradients), expected)


def test_imtl_g_improves_all_where_the_papers_scale_would_worsen_all() -> None:
    # Cosines 0.9 to the first and 0.65 between the others: C u = 1 has u1 < 0, and a small g1 makes Σ u_k / |g_k| < 0.
    cosines = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, 0.65], [0.9, 0.65, 1.0]], dtype=torch.float64)
    norms = torch.tensor([0.01, 1.0, 1.0], dtype=torch.float64)
    gram = cosines * torch.outer(norms, norms)
    weights = gradient_weights("imtl_g", GradientInputs(gram))
    assert float(weights.sum()) == pytest.approx(-1.0)
    assert (gram @ weights > 0).all()


@pytest.mark.parametrize("name", [name for name in BY_GRAM if name != "pcgrad"])
@given(gradients=jacobians(decades=1.0), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_the_order_of_objectives_does_not_matter(name: str, gradients: Tensor, seed: int) -> None:
    order = torch.randperm(len(gradients), generator=torch.Generator().manual_seed(seed))
    before, after = direction_of(name, gradients), direction_of(name, gradients[order])
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(1 + before.norm()))


@pytest.mark.parametrize("name", SCALE_FREE)
@given(gradients=jacobians(most=4, decades=0.5), factor=st.sampled_from([1e-3, 7.0, 1e4]))
@settings(max_examples=30, deadline=None)
def test_scaling_one_objective_leaves_the_direction(name: str, gradients: Tensor, factor: float) -> None:
    scaled = torch.cat([gradients[:1] * factor, gradients[1:]])
    before, after = direction_of(name, gradients), direction_of(name, scaled)
    if before.norm() == 0 or after.norm() == 0:
        assert before.norm() == after.norm()
        return
    before, after = before / before.norm(), after / after.norm()
    condition = float(torch.linalg.cond(gradients))
    torch.testing.assert_close(after, before, rtol=0, atol=1e-9 * min(condition**2, 1e9))


@pytest.mark.parametrize("name", BY_GRAM)
@given(gradients=jacobians(decades=1.0), factor=st.sampled_from([1e-6, 1e5]))
@settings(max_examples=30, deadline=None)
def test_scaling_all_objectives_scales_the_direction(name: str, gradients: Tensor, factor: float) -> None:
    weights, scaled = weights_of(name, gradients), weights_of(name, gradients * factor)
    # Nash-MTL's step has length √K whatever the gradients.
    expected = weights / factor if name == "nash_mtl" else weights
    torch.testing.assert_close(scaled @ gradients, expected @ gradients, rtol=1e-4, atol=1e-4 * float(expected.max()))


@pytest.mark.parametrize("name", BY_GRAM)
def test_a_single_objective_keeps_its_direction(name: str) -> None:
    direction = direction_of(name, rows((3.0, -4.0)))
    torch.testing.assert_close(direction / direction.norm(), rows((0.6, -0.8))[0])
    # A factor of 1 but for CAGrad, whose best step is at the far end of its ball, and Nash-MTL, whose length is √K.
    expected = {"cagrad": 5 * 1.4, "nash_mtl": 1.0}.get(name, 5.0)
    assert float(direction.norm()) == pytest.approx(expected)


@pytest.mark.parametrize("name", BY_GRAM)
def test_an_objective_without_gradient_does_not_disturb_the_others(name: str) -> None:
    gradients = rows((1.0, 2.0), (0.0, 0.0), (2.0, -0.5))
    options = {"c": 0.4} if name == "cagrad" else {}
    direction = direction_of(name, gradients, **options)
    assert torch.isfinite(direction).all()
    assert (gradients[[0, 2]] @ direction > 0).all()
    if name != "cagrad":
        # CAGrad's mean is over all objectives.
        torch.testing.assert_close(direction, direction_of(name, gradients[[0, 2]], **options))


def test_mgda_stops_at_a_zero_gradient_where_asked() -> None:
    weights = weights_of("mgda", rows((1.0, 2.0), (0.0, 0.0)), zero_gradient="stop")
    assert weights.tolist() == [0.0, 1.0]


EDGES = {
    "all zero": rows((0.0, 0.0), (0.0, 0.0)),
    "the same": rows((1.0, 2.0), (1.0, 2.0), (1.0, 2.0)),
    "parallel": rows((1.0, 2.0), (3.0, 6.0)),
    "opposed": rows((1.0, 2.0), (-2.0, -4.0)),
    "two opposed": rows((1.0, 0.0), (-1.0, 0.0), (0.0, 1.0)),
    "cancelling": rows((1.0, 0.0), (-0.5, 0.8), (-0.5, -0.8)),
    "far apart": rows((1e-8, 1e-8), (1e8, -1e8), (0.0, 1.0)),
    "far apart and opposed": rows((1e-8, 0.0), (-1e8, 0.0)),
    "far apart and nearly opposed": rows((1e8, 0.0), (-1e8, 1e-8), (1e-8, 0.0)),
    "tiny": rows((1e-150, 0.0), (0.0, 1e-150)),
    "more than parameters": torch.linspace(-1, 2, 12, dtype=torch.float64)[:, None],
}


@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("name", BY_GRAM)
def test_no_edge_case_gives_nan_or_infinity(name: str, edge: str) -> None:
    gradients = EDGES[edge]
    weights = weights_of(name, gradients)
    assert torch.isfinite(weights).all()
    assert torch.isfinite(weights @ gradients).all()


@pytest.mark.parametrize("name", ["mgda", "nash_mtl", "imtl_g"])
@pytest.mark.parametrize("edge", ["all zero", "opposed", "cancelling"])
def test_where_no_step_improves_all_there_is_none(name: str, edge: str) -> None:
    gradients = EDGES[edge]
    assert float(direction_of(name, gradients).norm()) <= 1e-7 * float(gradients.norm())


def test_mgda_serves_the_small_objective_among_badly_scaled_ones() -> None:
    # <g1, g2> > |g1|²: g1 itself is the shortest.
    assert weights_of("mgda", rows((1e-8, 0.0), (1e8, 1e8))).tolist() == pytest.approx([1.0, 0.0])
    # Orthogonal: w1 : w2 = |g2|² : |g1|², 1 : 1e-32.
    assert weights_of("mgda", rows((1e-8, 0.0), (0.0, 1e8))).tolist() == pytest.approx([1.0, 1e-32], abs=1e-15)


@pytest.mark.parametrize("name", BY_GRAM)
def test_descent_on_two_quadratics_ends_on_the_pareto_set(name: str) -> None:
    # ℓ1 = |x - a|²/2, ℓ2 = 2|x - b|²: their Pareto set is the segment from a to b.
    first, second = rows((1.0, 0.0))[0], rows((-1.0, 0.5))[0]
    point = rows((0.5, 3.0))[0]
    for step in range(300):
        gradients = torch.stack([point - first, 4 * (point - second)])
        direction = direction_of(name, gradients)
        if name == "nash_mtl":
            # Its length is always √2, so the step must shrink.
            direction = direction / (step + 1)
        point = point - 0.05 * direction * (10 if name == "nash_mtl" else 1)
    along = second - first
    share = ((point - first) @ along / (along @ along)).clamp(0, 1)
    assert float((point - first - share * along).norm()) < 5e-2


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_its_objective(bad: float) -> None:
    gram = torch.eye(3)
    gram[1, 1] = bad
    gram[0, 1] = gram[1, 0] = math.nan
    with pytest.raises(NonFiniteError, match="squared norm of the gradient of objective 1"):
        GradientInputs(gram)


@pytest.mark.parametrize(
    ("gram", "message"),
    [
        (torch.zeros(2, 3), r"\[objectives, objectives\].*\[2, 3\]"),
        (torch.zeros(0, 0), "at least 1"),
        (torch.tensor([[1.0, 0.5], [0.2, 1.0]]), "symmetric"),
        (torch.tensor([[1.0, 0.0], [0.0, -1.0]]), "squared norms on its diagonal"),
    ],
)
def test_what_is_no_gram_matrix_is_refused(gram: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GradientInputs(gram)


def test_combinations_are_registered_with_what_a_reader_needs() -> None:
    assert set(GRADIENT_COMBINATIONS) >= {*BY_GRAM, "famo"}
    for name in GRADIENT_COMBINATIONS:
        entry = GRADIENT_COMBINATIONS.get(name)
        assert all([entry.formula, entry.source, entry.use_when])
        assert all(field.description for field in entry.options.model_fields.values())
    with pytest.raises(RegistryError, match=r"algorithm\.gradient_options\.seeds.*Did you mean seed"):
        gradient_weights("pcgrad", GradientInputs(torch.eye(2)), {"seeds": 1})
    with pytest.raises(RegistryError, match=r"algorithm\.gradient_options\.c = 1"):
        gradient_weights("cagrad", GradientInputs(torch.eye(2)), {"c": 1.0})


def unit_vector(vector: Tensor) -> Tensor:
    return vector / vector.norm()


@pytest.mark.parametrize("seed", range(8))
def test_directions_agree_with_torchjd_where_it_meets_the_definition(seed: int) -> None:
    peer = pytest.importorskip("torchjd.aggregation")
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(2 + seed % 4, 7, generator=generator, dtype=torch.float64) + 0.3
    gram = gradients @ gradients.T
    theirs = peer.MGDAWeighting(epsilon=1e-9, max_iters=20000)(gram) @ gradients
    ours = direction_of("mgda", gradients)
    assert ours.norm() <= theirs.norm() + 1e-12
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.02 * float(theirs.norm()))
    torch.testing.assert_close(unit_vector(direction_of("imtl_g", gradients)), unit_vector(peer.IMTLG()(gradients)))
    torch.testing.assert_close(direction_of("pcgrad", gradients[:2]), peer.PCGrad()(gradients[:2]))


@pytest.mark.parametrize("seed", range(8))
def test_optimised_directions_agree_with_torchjd(seed: int) -> None:
    peer = pytest.importorskip("torchjd.aggregation")
    pytest.importorskip("cvxpy")
    pytest.importorskip("ecos")
    generator = torch.Generator().manual_seed(seed)
    gradients = torch.randn(2 + seed % 4, 7, generator=generator, dtype=torch.float64) + 0.3
    torch.testing.assert_close(
        direction_of("cagrad", gradients, c=0.5), peer.CAGrad(c=0.5)(gradients), rtol=1e-4, atol=1e-4
    )
    theirs = peer.NashMTL(n_tasks=len(gradients), optim_niter=100)(gradients)
    torch.testing.assert_close(unit_vector(direction_of("nash_mtl", gradients)), unit_vector(theirs), rtol=0, atol=5e-3)


def test_torchjd_differs_where_the_docstring_says() -> None:
    peer = pytest.importorskip("torchjd.aggregation")
    one_is_zero, opposed = rows((1.0, 2.0), (0.0, 0.0)), EDGES["two opposed"]
    assert peer.MGDA()(one_is_zero).norm() == 0 < direction_of("mgda", one_is_zero).norm()
    assert peer.IMTLG()(opposed).norm() > 0.9
    assert direction_of("imtl_g", opposed).norm() == 0
    cosines = torch.tensor([[1.0, 0.9, 0.9], [0.9, 1.0, 0.65], [0.9, 0.65, 1.0]], dtype=torch.float64)
    norms = torch.tensor([0.01, 1.0, 1.0], dtype=torch.float64)
    gram = cosines * torch.outer(norms, norms)
    assert (gram @ peer.IMTLGWeighting()(gram) < 0).all()
    pytest.importorskip("cvxpy")
    assert peer.CAGrad(c=0.4)(opposed).norm() == 0 < direction_of("cagrad", opposed).norm()
