"""Names in recipes find what was registered under them, and errors help."""

import pytest

from algorithms import choices  # noqa: F401  registers the built-in methods
from algorithms.inference_aware import InferenceAwareOptions
from algorithms.losses import clip
from algorithms.registry import ADVANTAGE_ESTIMATORS, POLICY_LOSSES, Method, Registry, RegistryError, method


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
    registry: Registry[Method] = Registry("number", "algorithm.number")

    @method(registry, "one")
    def first() -> int:
        return 1

    with pytest.raises(RegistryError, match=r"'one' is registered already, as .*first"):

        @method(registry, "one")
        def second() -> int:
            return 2

    assert registry.get("one").function is first


def test_an_option_that_does_not_exist_is_named_with_the_nearest_and_all_there_are() -> None:
    with pytest.raises(
        RegistryError, match=r"here\.hihg is not an option of 'clip'. Did you mean high\? It has: low, high"
    ):
        POLICY_LOSSES.get("clip").read_options({"hihg": 0.3}, "here")


def test_a_wrong_value_is_named_with_where_it_stands() -> None:
    with pytest.raises(RegistryError, match=r"here\.low = 1\.5 of 'clip'"):
        POLICY_LOSSES.get("clip").read_options({"low": 1.5}, "here")


def test_a_wrong_entry_of_a_list_is_told_once() -> None:
    terms = {"terms": [{"transform": "nonsense"}]}
    with pytest.raises(RegistryError) as caught:
        ADVANTAGE_ESTIMATORS.get("inference_aware").read_options(terms, "here")
    assert "here.terms.0" in str(caught.value)
    assert "too short" not in str(caught.value) and "at least 1 item" not in str(caught.value)  # noqa: PT018
    assert InferenceAwareOptions.model_validate({}) is not None
