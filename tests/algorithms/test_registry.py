"""Names in recipes find what was registered under them, and errors help."""

import pytest

from algorithms.advantages import estimate_advantages  # noqa: F401  registers the built-in estimators
from algorithms.losses import clip
from algorithms.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, Registry, RegistryError


def test_the_built_in_names_are_registered() -> None:
    assert {"grpo", "dr_grpo", "rloo", "reinforce"} <= set(ADVANTAGE_ESTIMATORS)
    assert {"clip", "reinforce", "nll"} <= set(POLICY_LOSSES)
    assert POLICY_LOSSES.get("clip").function is clip


def test_an_unknown_name_is_refused_with_the_nearest_spelling_and_all_names() -> None:
    with pytest.raises(RegistryError, match=r"algorithm\.advantage.*'drgrpo'.*Did you mean 'dr_grpo'.*grpo, .*rloo"):
        ADVANTAGE_ESTIMATORS.get("drgrpo")


def test_a_name_like_no_other_gets_no_suggestion() -> None:
    with pytest.raises(RegistryError) as caught:
        POLICY_LOSSES.get("zzzzzz")
    assert "Did you mean" not in str(caught.value)


def test_a_taken_name_is_refused_and_keeps_its_first_owner() -> None:
    registry: Registry[int] = Registry("number", "algorithm.number")
    registry.add("one", 1)
    with pytest.raises(RegistryError, match="'one' is registered already"):
        registry.add("one", 2)
    assert registry.get("one") == 1
