"""The forward pass that trainer and reference share: log-probabilities and hidden states of completions."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from actors.model.batches import ModelBatch
from actors.model.loading import VISION_TOWERS, outermost
from actors.model.output_head import (
    ReferenceOutputs,
    can_tile,
    expected_transform,
    hidden_states_inside_head,
    is_plain,
    statistics_inside_head,
)
from actors.model.shared_media import GRID, repeated_images
from algorithms.log_probs import BUDGET_BYTES, statistics_of_logits


class TokenLogProbs(NamedTuple):
    """Log-probabilities of completion tokens, and what else of the distribution each was drawn from was asked for.

    Attributes:
        log_probs: [B, T] float32, nats; 0 behind each completion's end.
        entropy: [B, T] float32, nats; None where not asked for.
        collision: [B, T] float32, the sum of squared probabilities, without gradient; None where not asked for.
        kl: [B, T] float32, nats, the exact KL of the distribution to the reference's; None where there is none.
    """

    log_probs: Tensor
    entropy: Tensor | None
    collision: Tensor | None
    kl: Tensor | None = None


def completion_log_probs(
    model: Any,
    batch: ModelBatch,
    *,
    temperature: float,
    banned_token_ids: tuple[int, ...] = (),
    with_entropy: bool = False,
    entropy_gradient: bool = False,
    with_collision: bool = False,
    reference: ReferenceOutputs | None = None,
    budget_bytes: int = BUDGET_BYTES,
) -> TokenLogProbs:
    """Log-probabilities of the completions' tokens under the distribution that is sampled from.

    Logits exist only for completion tokens, without padding, and where those of all tokens exceed the budget only tile
    by tile (see :mod:`algorithms.log_probs`). What a family does after its head (soft-capping, scaling) still happens;
    one that does something unknown gets whole logits.

    Args:
        model: a Hugging Face model, or DeepSpeed's engine around one.
        batch: on the model's device.
        temperature: above 0; logits are divided by it.
        banned_token_ids: never sampled: their probability is 0.
        with_entropy: also return the entropies.
        entropy_gradient: let gradients flow through them.
        with_collision: also return the sums of squared probabilities.
        reference: also return the exact KL to it.
        budget_bytes: of logits at once.
    Raises:
        ValueError: the exact KL is asked for, and what the family does behind its head isn't known.
    """
    options: dict[str, Any] = {
        "temperature": temperature,
        "banned_token_ids": banned_token_ids,
        "with_entropy": with_entropy,
        "entropy_gradient": entropy_gradient,
        "with_collision": with_collision,
    }
    module = getattr(model, "module", model)
    head = module.get_output_embeddings()
    if reference is not None:
        require_plain(module, head)
    statistics = kl = None
    if reference is not None or can_tile(module, head, len(batch.tokens), budget_bytes):
        transform = expected_transform(module.config)
        found = statistics_inside_head(
            lambda: _forward(model, batch),
            head,
            batch,
            transform,
            budget_bytes=budget_bytes,
            reference=reference,
            **options,
        )
        statistics, kl = found or (None, None)
    if statistics is None:
        statistics = statistics_of_logits(completion_logits(model, batch), batch.tokens, **options)
    parts = (None if part is None else _scatter(part, batch) for part in (*statistics, kl))
    log_probs, entropy, collision, kl = parts
    assert log_probs is not None
    return TokenLogProbs(log_probs, entropy, collision, kl)


def completion_hidden_states(model: Any, batch: ModelBatch) -> Tensor:
    """[N, H] hidden states that a model's output head makes the completion tokens' logits of.

    Raises:
        ValueError: they don't tell the logits, since what the family does behind its head isn't known.
    """
    head = model.get_output_embeddings()
    require_plain(model, head)
    transform = expected_transform(model.config)
    return hidden_states_inside_head(lambda: _forward(model, batch), head, batch, transform)


def require_plain(model: Any, head: nn.Module) -> None:
    """Raises ValueError where the exact KL can't be taken from hidden states and the output head."""
    if not is_plain(head, model):
        raise ValueError(
            f"algorithm.kl.estimator = full needs a model whose output head is a plain matrix, but "
            f"{type(model).__name__} has {type(head).__name__} or changes single logits behind it. Set it to k3."
        )


def completion_logits(model: Any, batch: ModelBatch) -> Tensor:
    """[N, vocabulary] logits that predict the completion tokens."""
    head = getattr(model, "module", model).get_output_embeddings()

    def gather(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (arguments[0][batch.rows, batch.positions], *arguments[1:])

    hook = head.register_forward_pre_hook(gather)
    try:
        logits: Tensor = _forward(model, batch).logits
    finally:
        hook.remove()
    if logits.dim() != 2 or len(logits) != len(batch.tokens):
        raise ValueError(
            f"{type(model).__name__} returned logits {list(logits.shape)} for {len(batch.tokens)} completion tokens; "
            "its forward must call its output embeddings with hidden states [rows, tokens, width]. Name a model of "
            "another family in model.path."
        )
    return logits


def _forward(model: Any, batch: ModelBatch) -> Any:
    """The model's output for a batch."""
    inputs = dict(batch.inputs)
    if batch.layout is not None:
        inputs["position_ids"] = batch.layout.positions(getattr(model, "module", model), inputs)
    tower = next(iter(outermost(model, VISION_TOWERS)), None) if batch.shared is not None else None
    with repeated_images(tower, batch.inputs.get(GRID), batch.shared):
        return model(**inputs, use_cache=False)


def _scatter(values: Tensor, batch: ModelBatch) -> Tensor:
    return values.new_zeros(batch.shape).index_put((batch.samples, batch.columns), values)
