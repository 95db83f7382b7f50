"""Statistics of completion tokens made inside a model's output head, so that whole logits never exist."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from actors.model.batches import ModelBatch
from algorithms.log_probs import TokenStatistics, fits_whole, full_kl, token_log_probs
from algorithms.logit_tiles import LogitTransform

WHOLE_LOGITS = frozenset({"chameleon", "inkling"})
"""Model types that change single columns behind their head, or cut some off."""
TRANSFORM_TOLERANCE = 1e-4
"""Relative: float32 through a scale and a tanh."""
KL = "kl"
"""Among a head's statistics."""


@dataclass(frozen=True, eq=False)
class OutputHead:
    """What makes logits of a frozen model's hidden states.

    Attributes:
        weight: [V, H].
        bias: [V]; None for none.
        transform: what the family does behind it.
    """

    weight: Tensor
    bias: Tensor | None
    transform: LogitTransform

    def to(self, device: torch.device | str) -> OutputHead:
        """The same head on another device."""
        bias = None if self.bias is None else self.bias.to(device)
        return OutputHead(self.weight.to(device), bias, self.transform)


@dataclass(frozen=True, eq=False)
class ReferenceOutputs:
    """The reference's distributions at the completion tokens of a batch, before its head.

    Attributes:
        head: whole on every rank.
        hidden: [N, H] float, the hidden states.
    """

    head: OutputHead
    hidden: Tensor


def can_tile(model: Any, head: nn.Module, tokens: int, budget_bytes: int) -> bool:
    """Whether the logits of so many tokens are worth tiling, and the head is one that can."""
    return is_plain(head, model) and not fits_whole(tokens, head.out_features, budget_bytes)


def is_plain(head: nn.Module, model: Any) -> TypeGuard[nn.Linear]:
    """Whether the head is a plain matrix, and its family changes no single columns behind it."""
    families = {model.config.model_type, model.config.get_text_config().model_type}
    return type(head) is nn.Linear and "forward" not in vars(head) and not families & WHOLE_LOGITS


def expected_transform(config: Any) -> LogitTransform:
    """What the family of a configuration does behind its head, as its code in transformers 5.19 has it."""
    text = config.get_text_config()
    family = text.model_type
    scale = 1.0
    if family.startswith("granite"):
        scale = 1 / getattr(text, "logits_scaling", 1.0)
    elif family.startswith("hyperclovax"):
        scale = getattr(text, "logits_scaling", 1.0)
    elif family.startswith("cohere"):
        scale = getattr(text, "logit_scale", None) or 1.0
    elif family == "falcon_h1":
        scale = text.lm_head_multiplier
    elif family.startswith("muse_glimmer"):
        scale = text.output_multiplier
    softcap = text.output_logit_soft_cap if family == "xlstm" else getattr(text, "final_logit_softcapping", None)
    return LogitTransform(float(scale), None if softcap is None else float(softcap))


def statistics_inside_head(
    forward: Callable[[], Any],
    head: nn.Linear,
    batch: ModelBatch,
    transform: LogitTransform,
    *,
    budget_bytes: int,
    reference: ReferenceOutputs | None = None,
    **options: Any,
) -> tuple[TokenStatistics, Tensor | None] | None:
    """Run the model with a head that makes statistics of completion tokens instead of logits.

    Args:
        forward: calls the model; its result has `logits`.
        head: the model's output head, a plain one.
        batch: says which hidden states belong to completion tokens.
        transform: expected behind the head.
        budget_bytes: of logits at once.
        reference: of the same tokens, to take the exact KL to.
        options: more of :func:`algorithms.log_probs.token_log_probs`.
    Returns:
        The statistics, and [N] float32 the KL in nats where there is a reference; or None where the family does
        something else behind its head, and there is no reference.
    Raises:
        ValueError: it does so under ZeRO-3, where a second forward pass, on this rank only, would hang the others, or
            where there is a reference.
    """
    names: list[str] = []

    def compute(hidden: Tensor) -> Tensor:
        own = hidden[batch.rows, batch.positions]
        statistics = token_log_probs(
            own,
            head.weight,
            batch.tokens,
            bias=head.bias,
            transform=transform,
            budget_bytes=budget_bytes,
            **options,
        )
        present = {name: part for name, part in statistics._asdict().items() if part is not None}
        if reference is not None:
            present[KL] = full_kl(
                own,
                head.weight,
                reference.hidden.to(reference.head.weight.dtype),
                reference.head.weight,
                bias=head.bias,
                reference_bias=reference.head.bias,
                temperature=options["temperature"],
                transform=transform,
                reference_transform=reference.head.transform,
                banned_token_ids=options["banned_token_ids"],
                budget_bytes=budget_bytes,
            )
        names[:] = present
        # One tensor: DeepSpeed counts a module's outputs and waits for the gradient of each.
        return torch.stack(list(present.values()))

    found = inside_head(forward, head, transform, compute)
    if found is None:
        if reference is not None:
            raise _unknown(transform)
        _refuse_or_warn(head, transform)
        return None
    parts = dict(zip(names, found, strict=True))
    statistics = TokenStatistics(parts["log_probs"], parts.get("entropy"), parts.get("collision"))
    return statistics, parts.get(KL)


def hidden_states_inside_head(
    forward: Callable[[], Any], head: nn.Linear, batch: ModelBatch, transform: LogitTransform
) -> Tensor:
    """[N, H] what the head would make logits of, at each completion token.

    Raises:
        ValueError: the family does something else behind its head than `transform`, so they don't tell the logits.
    """
    found = inside_head(forward, head, transform, lambda hidden: hidden[batch.rows, batch.positions])
    if found is None:
        raise _unknown(transform)
    return found


def inside_head(
    forward: Callable[[], Any], head: nn.Linear, transform: LogitTransform, compute: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Run the model with a head that computes something else than logits; returns what it computed.

    It is made within the head module's own call, because ZeRO-3 shows a weight only to its module: its hooks gather
    the head for the call and, by the tensor that the call returns, once more for the backward pass. What flows on
    through the model in the logits' place is two rows of known numbers. What comes out shows whether the family does
    behind its head what is expected. The result and the model's own output are tied together in the graph, because
    DeepSpeed's hooks wait for the gradient of that output.

    Args:
        forward: calls the model; its result has `logits`.
        head: the model's output head, a plain one.
        transform: expected behind the head.
        compute: takes the hidden states that the model gives its head.
    Returns:
        What `compute` returned, or None where the family does something else behind its head.
    """
    known = _known_rows(head)
    found: list[Tensor] = []

    def keep(_: nn.Module, __: tuple[Tensor, ...], computed: Tensor) -> Tensor:
        found.append(computed)
        return _follow(known, computed)

    head.forward = compute  # type: ignore[assignment, method-assign]
    hook = head.register_forward_hook(keep)
    try:
        output: Tensor = forward().logits
    finally:
        hook.remove()
        del head.forward
    if len(found) != 1 or not _agree(output, transform(known)):
        return None
    return _follow(found[0], output)


def _known_rows(head: nn.Linear) -> Tensor:
    """[2, vocabulary] float32: numbers from small to large, and the same in another order."""
    # A soft cap bends what is large and leaves what is small.
    line = torch.linspace(-60.0, 60.0, head.out_features, device=head.weight.device)
    return torch.stack([line, line.roll(head.out_features // 3)])


def _agree(output: Tensor, expected: Tensor) -> bool:
    found = output.detach()
    if found.shape != expected.shape:
        return False
    return torch.allclose(found.float(), expected, rtol=TRANSFORM_TOLERANCE, atol=TRANSFORM_TOLERANCE)


def _unknown(transform: LogitTransform) -> ValueError:
    return ValueError(
        f"the model changes its logits otherwise than its configuration says ({transform}), so the exact KL can't be "
        "computed from its hidden states. Set algorithm.kl.estimator to k3."
    )


def _refuse_or_warn(head: nn.Linear, transform: LogitTransform) -> None:
    message = f"the model changes its logits otherwise than its configuration says ({transform})"
    if hasattr(head.weight, "ds_id"):
        raise ValueError(
            f"{message}, so they can't be computed in tiles. Use trainer.zero_stage 2 or lower, or a smaller "
            "trainer.micro_batch_tokens, so that they are computed as a whole from the start."
        )
    warnings.warn(f"{message}: they are computed as a whole, which takes more memory and time", stacklevel=2)


class _Follow(torch.autograd.Function):
    """A value as it is; the other's history takes part in the backward pass with a gradient of zero."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        ctx.other_shape, ctx.other_dtype = other.shape, other.dtype
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        return gradient, gradient.new_zeros(ctx.other_shape, dtype=ctx.other_dtype)


def _follow(value: Tensor, other: Tensor) -> Tensor:
    result: Tensor = _Follow.apply(value, other)
    return result
