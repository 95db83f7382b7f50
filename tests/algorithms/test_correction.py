"""Importance weights for the gap between generator and trainer."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from algorithms.aggregation import Denominators, count
from algorithms.config import CorrectionConfig
from algorithms.correction import (
    Correction,
    CorrectionWeights,
    correction_sums,
    effective_sample_share,
    finish_correction,
    importance_correction,
)
from algorithms.registry import CORRECTIONS, Options, RegistryError, method

# Two sequences of three tokens, the last of the second is padding. Ratios 4, 1, 1/4 and 2, 1.5.
RATIOS = torch.tensor([[4.0, 1.0, 0.25], [2.0, 1.5, 1.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
BEHAVIOUR = torch.full((2, 3), -1.0)
TRAINER = (BEHAVIOUR + RATIOS.log()).masked_fill(~MASK, math.nan)
SWITCHES: dict[str, dict[str, Any]] = {
    "none": {},
    "token_truncated": {"high": 1.8},
    "sequence_truncated": {"high": 1.8},
    "token_masked": {"high": 1.8, "low": 0.5},
    "sequence_masked": {"high": 1.8, "low": 0.5},
    "geometric_masked": {"high": 1.2, "low": 0.9},
}


def config_of(name: str, veto: float | None = None, **switches: Any) -> CorrectionConfig:
    return CorrectionConfig(method=name, options=SWITCHES[name] | switches, veto=veto)


def written_out(name: str, log_ratios: list[float], veto: float | None, switches: dict[str, Any]) -> list[float]:
    """Weights of a sequence's tokens as the papers write them, in float64."""
    low, high = switches.get("low", 0.0), switches.get("high", math.inf)
    product = math.exp(min(max(sum(log_ratios), -20), 20))
    mean = math.exp(sum(log_ratios) / len(log_ratios))
    weights = []
    for log_ratio in log_ratios:
        ratio = math.exp(log_ratio)
        truncate = switches.get("truncate")
        kept = {
            "none": 1.0,
            "token_truncated": min(ratio, high),
            "sequence_truncated": min(product, high),
            "token_masked": ratio if low <= ratio <= high else 0.0,
            "sequence_masked": product if low <= product <= high else 0.0,
            "geometric_masked": (min(ratio, truncate) if truncate else 1.0) if low <= mean <= high else 0.0,
        }[name]
        weights.append(kept)
    is_vetoed = veto is not None and any(math.exp(log_ratio) < veto for log_ratio in log_ratios)
    return [0.0] * len(weights) if is_vetoed else weights


@pytest.mark.parametrize(
    ("name", "weights", "touched", "rejected"),
    [
        ("none", [[1, 1, 1], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]], [[0, 0, 0], [0, 0, 0]]),
        ("token_truncated", [[1.8, 1, 0.25], [1.8, 1.5, 0]], [[1, 0, 0], [1, 0, 0]], [[0, 0, 0], [0, 0, 0]]),
        # Products 1 and 3.
        ("sequence_truncated", [[1, 1, 1], [1.8, 1.8, 0]], [[0, 0, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 0]]),
        ("token_masked", [[0, 1, 0], [0, 1.5, 0]], [[1, 0, 1], [1, 0, 0]], [[1, 0, 1], [1, 0, 0]]),
        ("sequence_masked", [[1, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 0]]),
        # Geometric means 1 and sqrt(3) = 1.73.
        ("geometric_masked", [[1, 1, 1], [0, 0, 0]], [[0, 0, 0], [1, 1, 0]], [[0, 0, 0], [1, 1, 0]]),
    ],
)
def test_weights_are_those_worked_by_hand(
    name: str, weights: list[list[float]], touched: list[list[int]], rejected: list[list[int]]
) -> None:
    correction = importance_correction(TRAINER, BEHAVIOUR, MASK, config_of(name))
    torch.testing.assert_close(correction.weights, torch.tensor(weights, dtype=torch.float32))
    assert torch.equal(correction.is_touched, torch.tensor(touched, dtype=torch.bool))
    assert torch.equal(correction.is_rejected, torch.tensor(rejected, dtype=torch.bool))
    assert not correction.is_vetoed.any()


def test_tokens_kept_by_the_geometric_mean_can_weigh_their_own_truncated_ratio() -> None:
    correction = importance_correction(TRAINER, BEHAVIOUR, MASK, config_of("geometric_masked", truncate=2.0))
    torch.testing.assert_close(correction.weights, torch.tensor([[2.0, 1.0, 0.25], [0.0, 0.0, 0.0]]))
    assert correction.is_touched.tolist() == [[True, False, False], [True, True, False]]
    assert correction.is_rejected.tolist() == [[False, False, False], [True, True, False]]


@pytest.mark.parametrize("name", SWITCHES)
def test_a_veto_leaves_out_the_whole_sequence_on_top_of_any_method(name: str) -> None:
    # Of the ratios only 1/4, in the first sequence, is below 0.3.
    without = importance_correction(TRAINER, BEHAVIOUR, MASK, config_of(name))
    correction = importance_correction(TRAINER, BEHAVIOUR, MASK, config_of(name, veto=0.3))
    assert correction.is_vetoed.tolist() == [True, False]
    assert (correction.weights[0] == 0).all()
    assert correction.is_rejected[0].all()
    assert correction.is_touched[0].all()
    assert torch.equal(correction.weights[1], without.weights[1])


def test_a_veto_does_not_look_at_padding() -> None:
    mask = torch.tensor([[True, False]])
    correction = importance_correction(
        torch.tensor([[-1.0, -99.0]]), torch.tensor([[-1.0, -1.0]]), mask, config_of("none", veto=0.1)
    )
    assert not correction.is_vetoed.any()


@pytest.mark.parametrize("veto", [None, 0.4])
@pytest.mark.parametrize(("name", "extra"), [*((name, {}) for name in SWITCHES), ("geometric_masked", {"truncate": 2})])
@given(seed=st.integers(0, 10_000), rows=st.integers(1, 4), columns=st.integers(1, 6))
@settings(max_examples=20)
def test_weights_are_the_papers_over_any_shape_whatever_the_padding(
    name: str, extra: dict[str, Any], veto: float | None, seed: int, rows: int, columns: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, columns, generator=generator) < 0.7
    behaviour, noise = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    trainer = (behaviour + 0.5 * noise).masked_fill(~mask, math.nan)
    correction = importance_correction(trainer, behaviour, mask, config_of(name, veto, **extra))
    for row in range(rows):
        places = mask[row].nonzero().flatten().tolist()
        log_ratios = [float(trainer[row, t] - behaviour[row, t]) for t in places]
        if places:
            expected = written_out(name, log_ratios, veto, SWITCHES[name] | extra)
            assert correction.weights[row, places].tolist() == pytest.approx(expected, abs=1e-12)
    for values in (correction.weights, correction.kl, correction.signed_kl, correction.gap):
        assert (values[~mask] == 0).all()
    for flags in (correction.is_touched, correction.is_rejected):
        assert not flags[~mask].any()
    assert (correction.weights[correction.is_rejected] == 0).all()
    assert (correction.is_touched | ~correction.is_rejected).all()


def test_the_kl_seen_is_that_of_generator_and_trainer() -> None:
    behaviour = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    trainer = torch.tensor([0.4, 0.35, 0.25], dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    correction = importance_correction(trainer.log()[None], behaviour.log()[None], mask, CorrectionConfig())
    exact = (behaviour * (behaviour / trainer).log()).sum()
    torch.testing.assert_close((behaviour * correction.kl[0]).sum(), exact)
    torch.testing.assert_close((behaviour * correction.signed_kl[0]).sum(), exact)


def test_the_gap_is_the_distance_of_log_probabilities_and_zero_on_padding() -> None:
    gap = importance_correction(TRAINER, BEHAVIOUR, MASK, CorrectionConfig()).gap
    torch.testing.assert_close(gap, RATIOS.log().abs().masked_fill(~MASK, 0.0))


@pytest.mark.parametrize("name", SWITCHES)
def test_weights_carry_no_gradient_and_equal_policies_weigh_one(name: str) -> None:
    log_probs = torch.randn(2, 3, requires_grad=True)
    correction = importance_correction(log_probs, log_probs, MASK, CorrectionConfig(method=name, veto=0.5))
    assert not correction.weights.requires_grad
    assert torch.equal(correction.weights, MASK.float())
    assert not correction.is_touched.any()


@pytest.mark.parametrize("name", ["token_truncated", "sequence_truncated", "token_masked", "sequence_masked"])
@given(
    log_ratios=st.lists(st.lists(st.floats(-300, 300), min_size=4, max_size=4), min_size=1, max_size=4),
    high=st.floats(1.0, 10.0),
)
@settings(max_examples=50)
def test_weights_stay_within_bounds_however_large_the_gap(
    name: str, log_ratios: list[list[float]], high: float
) -> None:
    trainer = torch.tensor(log_ratios)
    mask = torch.ones_like(trainer, dtype=torch.bool)
    correction = importance_correction(trainer, torch.zeros_like(trainer), mask, config_of(name, high=high))
    assert (correction.weights >= 0).all()
    assert (correction.weights <= high * (1 + 1e-6)).all()
    assert torch.isfinite(correction.kl).all()


def finished(correction: Correction, mask: Tensor) -> dict[str, float]:
    sums = correction_sums(correction, mask, Denominators(*count(mask)))
    return finish_correction({name: float(value) for name, value in sums.items()})


def test_what_a_correction_reports_is_worked_by_hand() -> None:
    # Weights 0, 1, 0 and 0, 1.5: token mean 0.5, square (1 + 2.25) / 5; by sequence 1/3 and 3/4.
    found = finished(importance_correction(TRAINER, BEHAVIOUR, MASK, config_of("token_masked")), MASK)
    log4, log2, log15 = math.log(4), math.log(2), math.log(1.5)
    sequence_mean, sequence_square = (1 / 3 + 3 / 4) / 2, (1 / 9 + 9 / 16) / 2
    expected = {
        "importance_weight_mean": 0.5,
        "effective_sample_share": 0.25 / (3.25 / 5),
        "corrected_share": 3 / 5,
        "rejected_share": 3 / 5,
        "mismatch_kl": ((3 - log4) + 0 + (-0.75 + log4) + (1 - log2) + (0.5 - log15)) / 5,
        "mismatch_kl_k1": -(log2 + log15) / 5,
        "sequence_weight_mean": sequence_mean,
        "effective_sequence_share": sequence_mean**2 / sequence_square,
        "corrected_sequences_share": 1.0,
        "rejected_sequences_share": 0.0,
        "vetoed_sequences_share": 0.0,
    }
    assert found == pytest.approx(expected, rel=1e-5)


def test_rejected_and_vetoed_sequences_are_counted() -> None:
    found = finished(importance_correction(TRAINER, BEHAVIOUR, MASK, config_of("sequence_masked", veto=0.3)), MASK)
    assert found["rejected_sequences_share"] == 1.0
    assert found["vetoed_sequences_share"] == 0.5
    assert found["effective_sequence_share"] == found["effective_sample_share"] == 0.0


def test_a_row_without_trained_tokens_counts_for_nothing() -> None:
    wide = [torch.cat([values, torch.zeros(1, 3, dtype=values.dtype)]) for values in (TRAINER, BEHAVIOUR, MASK)]
    for name in SWITCHES:
        config = config_of(name, veto=0.3)
        small = finished(importance_correction(TRAINER, BEHAVIOUR, MASK, config), MASK)
        assert finished(importance_correction(wide[0], wide[1], wide[2], config), wide[2]) == small


def test_effective_sample_share_is_that_worked_by_hand() -> None:
    # Weights 1, 1, 1, 5: (8 / 4)^2 / (28 / 4) = 4 / 7.
    assert effective_sample_share(2.0, 7.0) == pytest.approx(4 / 7)
    assert effective_sample_share(1.0, 1.0) == 1.0
    assert effective_sample_share(0.0, 0.0) == 0.0


@pytest.mark.parametrize("name", ["token_masked", "sequence_masked", "geometric_masked"])
@pytest.mark.parametrize(
    ("switches", "reason"),
    [
        ({"low": 2.0, "high": 2.0}, r"low = 2 must be below high = 2, or every token is masked"),
        ({"low": 1.0, "high": 2.0}, r"low = 1 masks even tokens that agree \(weight 1\)\. Set it below 1"),
        ({"low": 0.1, "high": 0.9}, r"high = 0\.9 cuts even the weight of samples that agree \(1\)\. Set it to at"),
        ({"high": math.nan}, r"high = nan"),
    ],
)
def test_bounds_that_mask_samples_that_agree_are_refused(name: str, switches: dict[str, float], reason: str) -> None:
    with pytest.raises(RegistryError, match=reason):
        CORRECTIONS.get(name).read_options(switches, "algorithm.correction.options")


@pytest.mark.parametrize(
    ("name", "switches"),
    [
        ("token_truncated", {"high": 0.5}),
        ("sequence_truncated", {"high": 0.5}),
        ("geometric_masked", {"truncate": 0.5}),
    ],
)
def test_a_truncation_below_one_is_refused_naming_option_and_reason(name: str, switches: dict[str, float]) -> None:
    with pytest.raises(
        RegistryError, match=rf"{next(iter(switches))} = 0\.5 cuts even the weight of samples that agree"
    ):
        importance_correction(TRAINER, BEHAVIOUR, MASK, CorrectionConfig(method=name, options=switches))


def test_an_option_of_another_method_is_refused() -> None:
    with pytest.raises(RegistryError, match=r"correction\.options\.low is not an option of 'token_truncated'"):
        importance_correction(
            TRAINER, BEHAVIOUR, MASK, CorrectionConfig(method="token_truncated", options={"low": 0.5})
        )


def test_a_users_own_correction_is_used_by_name_and_must_give_a_weight_a_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(CORRECTIONS, "_entries", dict(CORRECTIONS._entries))  # what is added here goes with the test

    @method(CORRECTIONS, "halved")
    def halved(log_ratio: Tensor, mask: Tensor, options: Options) -> CorrectionWeights:
        return CorrectionWeights(torch.full_like(log_ratio, 0.5), torch.ones_like(mask))

    @method(CORRECTIONS, "by_sequence")
    def by_sequence(log_ratio: Tensor, mask: Tensor, options: Options) -> CorrectionWeights:
        return CorrectionWeights(log_ratio.sum(-1), mask)

    correction = importance_correction(TRAINER, BEHAVIOUR, MASK, CorrectionConfig(method="halved"))
    assert torch.equal(correction.weights, MASK * 0.5)
    assert torch.equal(correction.is_touched, MASK)
    assert not correction.is_rejected.any()
    with pytest.raises(ValueError, match=r"weights of \[2\] for a mask of \[2, 3\]"):
        importance_correction(TRAINER, BEHAVIOUR, MASK, CorrectionConfig(method="by_sequence"))
