"""Refuses samples that an objective can't learn from, by the columns that it needs."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout.failures import Failure, FailureError, FailureKind
from rollout.samples import TokenSequence

BY_OBJECTIVE = frozenset({"objective_advantages", "objective_rewards"})
"""Columns whose first axis is objectives."""


@dataclass(frozen=True)
class Columns:
    """Columns of a sample, by name, beyond those of a :class:`TokenSequence`.

    Attributes:
        required: every sample must have them.
        optional: either all samples of a batch have them, or none.
    """

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()


def check_samples(
    samples: Sequence[TokenSequence], banned_token_ids: Collection[int], columns: Columns | None = None
) -> None:
    """Refuse samples that nothing can be computed from. Cheap; every rank checks all samples, so all decide alike.

    Args:
        banned_token_ids: must not stand in a completion.
        columns: that are looked at, besides the tokens; None for none.
    Raises:
        FailureError: of kind bug: `no_samples`, `sample_shape`, `sample_not_finite`, `banned_token_sampled`.
    """
    columns = columns or Columns()
    if not samples:
        raise _bug("no_samples", "the batch has no samples. It must hold at least one.")
    for name in (*columns.required, *columns.optional):
        missing = sum(getattr(sample, name, None) is None for sample in samples)
        if missing == len(samples) and name in columns.optional:
            continue
        if missing:
            rule = "all must have it" if name in columns.required else "all must have it, or none"
            raise _bug("sample_shape", f"{missing} of {len(samples)} samples have no {name}: {rule}.")
    banned = np.fromiter(banned_token_ids, dtype=np.int32, count=len(banned_token_ids))
    for index, sample in enumerate(samples):
        where = f"sample {index} (prompt {sample.prompt.prompt_id})"
        if len(sample.token_ids) == 0:
            raise _bug("sample_shape", f"{where} has an empty completion.")
        if len(sample.loss_mask) != len(sample.token_ids):
            lengths = f"loss_mask has {len(sample.loss_mask)} entries for {len(sample.token_ids)} tokens"
            raise _bug("sample_shape", f"{where}: {lengths}.")
        if np.isin(sample.token_ids, banned).any():
            raise _bug("banned_token_sampled", f"{where} holds a media placeholder that must never be sampled.")
        for name in (*columns.required, *columns.optional):
            values = getattr(sample, name, None)
            if values is not None and name not in BY_OBJECTIVE:
                _check_column(name, values, sample, where)


def check_hidden_states(samples: Sequence[TokenSequence], width: int) -> None:
    """Refuse samples without the reference's hidden states, or with those of a model of another width.

    Raises:
        FailureError: of kind bug: `sample_shape`.
    """
    for index, sample in enumerate(samples):
        hidden = getattr(sample, "reference_hidden", None)
        if hidden is None or hidden.shape[1] != width:
            found = "none" if hidden is None else hidden.shape[1]
            raise _bug(
                "sample_shape",
                f"sample {index} (prompt {sample.prompt.prompt_id}) has reference_hidden of width {found}: the exact "
                f"KL needs {width}, the reference head's.",
            )


def _check_column(name: str, values: NDArray[Any], sample: TokenSequence, where: str) -> None:
    tokens = len(sample.token_ids)
    if name == "reference_hidden":  # too large to search on every rank; the loss refuses NaN by name
        if values.ndim != 2 or len(values) != tokens:
            raise _bug("sample_shape", f"{where}: reference_hidden {list(values.shape)} for {tokens} tokens.")
        return
    if len(values) != tokens:
        raise _bug("sample_shape", f"{where}: {len(values)} {name} for {tokens} tokens.")
    is_bad = ~np.isfinite(values) & sample.loss_mask
    if is_bad.any():
        first = int(np.argmax(is_bad))
        raise _bug("sample_not_finite", f"{where}: {name} of token {first} is {values[first]}, which isn't finite.")


def _bug(reason: str, message: str) -> FailureError:
    return FailureError(Failure(FailureKind.BUG, reason, message))
