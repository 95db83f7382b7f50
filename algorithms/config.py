"""What to learn from a batch: orthogonal choices, each by name."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

STRICT = ConfigDict(extra="forbid", frozen=True)


class KLConfig(BaseModel):
    """How far the policy is held back by the reference."""

    model_config = STRICT

    coefficient: float = Field(0.0, ge=0.0, description="Weight of the KL term; 0 needs no reference model.")
    estimator: Literal["k1", "k2", "k3"] = Field("k3", description="Estimator of the KL (Schulman, 2020).")
    placement: Literal["loss", "reward"] = Field(
        "loss", description="In the loss, or subtracted from the sample's reward, summed over its tokens."
    )
    controller: Literal["fixed", "adaptive"] = Field(
        "fixed", description="Fixed, or adapted towards the target (Ziegler et al., 2019)."
    )
    target_nats: float = Field(0.05, gt=0.0, description="KL a token the adaptive controller steers to.")
    horizon: int = Field(100, ge=1, description="Updates over which the adaptive controller acts.")

    @model_validator(mode="after")
    def _the_estimator_suits_its_place(self) -> KLConfig:
        if self.coefficient > 0 and self.placement == "loss" and self.estimator == "k1":
            raise ValueError(
                "algorithm.kl.estimator = k1 does nothing in the loss: its gradient is 0 in expectation. "
                "Set algorithm.kl.estimator to k2 or k3, or algorithm.kl.placement to reward."
            )
        if self.coefficient > 0 and self.placement == "reward" and self.estimator != "k1":
            raise ValueError(
                f"algorithm.kl.estimator = {self.estimator} in the reward doesn't follow the gradient of the KL. "
                "Set algorithm.kl.estimator to k1, or algorithm.kl.placement to loss."
            )
        return self


class CorrectionConfig(BaseModel):
    """Correction for the gap between the generator's and the trainer's distribution."""

    model_config = STRICT

    method: Literal["none", "token_truncated", "sequence_truncated", "token_masked"] = Field(
        "token_truncated", description="Importance sampling truncated by token or by sequence, or masked (IcePop)."
    )
    high: float = Field(2.0, gt=0.0, description="Upper bound of the importance weight.")
    low: float = Field(0.5, ge=0.0, description="Lower bound, where the method masks.")

    @model_validator(mode="after")
    def _the_bounds_are_in_order(self) -> CorrectionConfig:
        if self.method == "token_masked" and self.low >= self.high:
            raise ValueError(
                f"algorithm.correction.low = {self.low:g} must be below algorithm.correction.high = {self.high:g}, "
                "or every token is masked."
            )
        return self


class AlgorithmConfig(BaseModel):
    """Advantage estimator x policy loss x aggregation x KL x correction."""

    model_config = STRICT

    advantage: str = Field("grpo", description="A registered advantage estimator.")
    loss: str = Field("clip", description="A registered policy loss.")
    clip_low: float = Field(0.2, gt=0.0, lt=1.0, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(0.2, gt=0.0, description="The ratio is clipped above at 1 + clip_high.")
    aggregation: Literal["token_mean", "sequence_mean", "sequence_sum"] = Field(
        "token_mean", description="Mean over all tokens; mean over sequences of token means; or of token sums."
    )
    entropy_coefficient: float = Field(0.0, ge=0.0, description="Weight of the entropy bonus.")
    kl: KLConfig = KLConfig()
    correction: CorrectionConfig = CorrectionConfig()
