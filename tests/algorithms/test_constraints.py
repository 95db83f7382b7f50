"""Learned multipliers: their steps by hand, their bounds, and a constrained problem with a known solution."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from algorithms.constraints import SMALLEST, ConstrainedOptions, Constraint, LagrangeMultipliers
from algorithms.finite import NonFiniteError
from algorithms.registry import REWARD_COMBINATIONS, RegistryError

SAFE = Constraint(component="safety", threshold=0.9)
SHORT = Constraint(component="length", threshold=0.25, direction="at_most")
RULES = ("projected", "softplus")


def options(**others: object) -> ConstrainedOptions:
    return ConstrainedOptions.model_validate({"constraints": (SAFE, SHORT), **others})


def test_projected_steps_by_hand() -> None:
    # safety: 0.5 + 2 * (0.9 - 0.8) = 0.7; length: 0.5 + 2 * (0.1 - 0.25) = 0.2, then -0.1, so 0.
    first = LagrangeMultipliers.of(options(initial=0.5, step_size=2.0))
    second = first.update({"safety": 0.8, "length": 0.1, "style": 3.0})
    assert second.values == pytest.approx({"safety": 0.7, "length": 0.2})
    assert second.update({"safety": 0.9, "length": 0.1}).values == pytest.approx({"safety": 0.7, "length": 0.0})
    assert first.values == {"safety": 0.5, "length": 0.5}


def test_softplus_steps_by_hand() -> None:
    # lambda = 1 is x = log(e - 1); a step of 2 * 0.1 makes it log(1 + e^0.2 (e - 1)).
    stepped = LagrangeMultipliers.of(options(rule="softplus", step_size=2.0)).update({"safety": 0.8})
    assert stepped.values == pytest.approx({"safety": math.log(1 + math.exp(0.2) * (math.e - 1)), "length": 1.0})


@pytest.mark.parametrize("rule", RULES)
@given(seen=st.lists(st.floats(-1e6, 1e6), max_size=30), ceiling=st.floats(1.0, 50.0))
@settings(max_examples=50, deadline=None)
def test_multipliers_stay_in_bounds_and_come_back_from_either_end(rule: str, seen: list[float], ceiling: float) -> None:
    multipliers = LagrangeMultipliers.of(options(rule=rule, ceiling=ceiling))
    for mean in seen:
        multipliers = multipliers.update({"safety": mean, "length": -mean})
        assert all(0 <= value <= ceiling for value in multipliers.values.values())
    lowest = 0.0 if rule == "projected" else SMALLEST
    pushed = multipliers.update({"safety": 1e9})
    assert pushed.values["safety"] == pytest.approx(lowest, rel=1e-6)
    raised = pushed
    for _ in range(200):
        raised = raised.update({"safety": 0.0})
    assert raised.values["safety"] > 1 - 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_dual_ascent_finds_the_multiplier_of_a_known_problem(rule: str) -> None:
    # Maximise -x^2 / 2 - 2x under x >= -1/2: without the constraint x = -2. With it -x - 2 + lambda = 0, so that at
    # x = -1/2 lambda = 3/2.
    constraint = Constraint(component="x", threshold=-0.5)
    multipliers = LagrangeMultipliers.of(ConstrainedOptions(constraints=(constraint,), rule=rule))
    for _ in range(400):
        multipliers = multipliers.update({"x": multipliers.values["x"] - 2.0})
    assert multipliers.values["x"] == pytest.approx(1.5, abs=1e-6)


@pytest.mark.parametrize("rule", RULES)
def test_a_constraint_that_holds_with_room_to_spare_loses_its_multiplier(rule: str) -> None:
    multipliers = LagrangeMultipliers.of(options(rule=rule))
    for _ in range(300):
        multipliers = multipliers.update({"safety": 1.0, "length": 0.25})
    assert multipliers.values["safety"] < 0.1
    assert multipliers.values["length"] == pytest.approx(1.0)


def test_a_component_that_the_batch_does_not_have_keeps_its_multiplier() -> None:
    multipliers = LagrangeMultipliers.of(options())
    assert multipliers.update({}).values == multipliers.values


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_mean_that_is_not_finite_is_refused_naming_the_component(bad: float) -> None:
    with pytest.raises(NonFiniteError, match="constrained component 'safety' is"):
        LagrangeMultipliers.of(options()).update({"safety": bad})


@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_multiplier_goes_on_as_if_it_had_never_stopped(rule: str) -> None:
    before = LagrangeMultipliers.of(options(rule=rule)).update({"safety": 0.3, "length": 0.9})
    after = LagrangeMultipliers.of(options(rule=rule)).restored(before.state())
    assert after == before
    assert after.update({"safety": 0.1}).values == before.update({"safety": 0.1}).values


def test_a_checkpoint_with_other_constraints_is_refused_naming_them() -> None:
    with pytest.raises(ValueError, match=r"are of style, but .* names safety, length"):
        LagrangeMultipliers.of(options()).restored({"style": 1.0})


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({}, "constraints of 'constrained' must be set"),
        ({"constraints": []}, "at least 1 item"),
        ({"constraints": [SAFE.model_dump(), SAFE.model_dump()]}, "safety is constrained twice"),
        ({"constraints": [SAFE.model_dump()], "initial": 20.0}, "initial = 20 is above ceiling = 10"),
    ],
)
def test_constraints_that_make_no_sense_are_refused(values: dict[str, object], reason: str) -> None:
    import algorithms.reward_combination  # noqa: F401  registers it

    with pytest.raises(RegistryError, match=reason):
        REWARD_COMBINATIONS.get("constrained").read_options(values)
