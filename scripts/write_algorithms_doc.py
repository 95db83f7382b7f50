"""Writes docs/algorithms.md from the registries. With --check, it compares the two and fails where they differ.

It also fails where a built-in method lacks a formula, a source or a word on when to use it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from algorithms import choices  # noqa: F401  registers every built-in method
from algorithms.registry import (
    ADVANTAGE_ESTIMATORS,
    AGGREGATIONS,
    CORRECTIONS,
    GRADIENT_COMBINATIONS,
    IMAGE_NEGATIVES,
    KL_ESTIMATORS,
    POLICY_LOSSES,
    PREFERENCE_LOSSES,
    REWARD_COMBINATIONS,
    REWARD_MODEL_LOSSES,
    REWARD_SHAPES,
    AdvantageEstimator,
    KLEstimator,
    Method,
    PolicyLoss,
    PreferenceLoss,
    Registry,
    incompatibility,
)
from orchestrator.config.setting_list import default_text, settings

TARGET = Path(__file__).parent.parent / "docs" / "algorithms.md"

INTRODUCTION = """# Algorithms

Written by `scripts/write_algorithms_doc.py` from the registries in `algorithms/registry.py`; don't edit.

A recipe chooses independently of each other the methods below, by name, each with options of its own:

    algorithm:
      combination: weighted_sum          # reward components -> one reward
      shaping: [{name: overlong, options: {...}}]
      advantage: grpo                    # rewards -> advantages
      advantage_options: {}
      loss: clip                         # advantages -> loss by token
      loss_options: {low: 0.2, high: 0.28}
      aggregation: token_mean            # losses by token -> one loss
      kl: {coefficient: 0.02, estimator: k3}
      correction: {method: token_truncated, options: {high: 2.0}}

Denominators are those of the whole batch, over all micro-batches and ranks, so that neither changes the result.
A name or an option that doesn't exist, and methods that can't be combined, are refused before anything starts, with
the reason. `algorithm.modules` names Python files of your own; a method is added there with the decorator of its kind:

    from algorithms.inputs import AdvantageInputs
    from algorithms.registry import Options, advantage_estimator

    @advantage_estimator("sign", compares_group=True)
    def sign(inputs: AdvantageInputs, options: Options):
        return (inputs.rewards > 0).double() * 2 - 1

Notation: π is the policy being trained, π_prox the policy at the start of the update, μ the distribution sampled from,
π_ref the reference; r = π/π_prox; A an advantage; σ the logistic function.
"""

SECTIONS: tuple[tuple[str, str, Registry[Any]], ...] = (
    ("Reward combinations", "How a completion's reward components become one reward (`algorithm.combination`).",
     REWARD_COMBINATIONS),
    ("Reward shapes", "Adjustments of the rewards, in the order given (`algorithm.shaping`).", REWARD_SHAPES),
    ("Advantage estimators", "How rewards become advantages (`algorithm.advantage`).", ADVANTAGE_ESTIMATORS),
    ("Policy losses", "What is minimised, by token (`algorithm.loss`).", POLICY_LOSSES),
    ("Aggregations", "How losses by token become one loss (`algorithm.aggregation`).", AGGREGATIONS),
    ("KL estimators", "Divergence from the reference, in the loss or in the reward (`algorithm.kl`).", KL_ESTIMATORS),
    ("Rollout corrections", "For the gap between generator and trainer, and for staleness (`algorithm.correction`). "
     "`algorithm.correction.veto` adds to any of them: a sequence with one token whose ratio is below it is left out.",
     CORRECTIONS),
    ("Gradient combinations", "Weights of the gradients of several objectives (`algorithm.gradient_combination`): "
     "computed from the Gram matrix of the gradients, which is summed over ranks (`famo`: from the rewards). "
     "The gradient of KL and entropy is added unweighed. Losses that rank the batch (`clip_cov`, `kl_cov`, `m2po`) do "
     "so once, by the advantages of the summed reward.",
     GRADIENT_COMBINATIONS),
    ("Preference losses", "Losses on answers that were preferred or labelled, from a data set or from rollouts.",
     PREFERENCE_LOSSES),
    ("Image negatives", "Worse images for preference losses that compare images.", IMAGE_NEGATIVES),
    ("Reward-model losses", "How a reward model's scores are trained.", REWARD_MODEL_LOSSES),
)  # fmt: skip


def document() -> str:
    """The whole document."""
    parts = [INTRODUCTION]
    for title, about, registry in SECTIONS:
        parts.append(f"## {title}\n\n{about}\n\n{_table(registry)}")
        if registry is POLICY_LOSSES:
            parts.append(f"### Pairs that are refused\n\n{_refused()}")
    return "\n".join(parts)


def undocumented() -> list[str]:
    """Built-in methods without a formula, a source or a word on when to use them."""
    return [
        f"{registry.kind} {name}"
        for _, _, registry in SECTIONS
        for name in registry
        if not all((registry.get(name).formula, registry.get(name).source, registry.get(name).use_when))
    ]


def _table(registry: Registry[Any]) -> str:
    rows = "\n".join(_row(registry.get(name)) for name in registry)
    return f"| Name | Formula | Source | Options | When |\n|---|---|---|---|---|\n{rows}\n"


def _row(method: Method) -> str:
    when = " ".join(filter(None, (method.use_when, *_traits(method))))
    cells = (f"`{method.name}`", method.formula, method.source, _options(method), when)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _options(method: Method) -> str:
    found = [
        f"`{setting.key}` ({'required' if setting.is_required else _default(setting.default)}): {setting.description}"
        for setting in settings(method.options)
    ]
    return "<br>".join(found) or "none"


def _default(value: Any) -> str:
    """A default as a recipe would write it; entries of a list by what they set."""
    if isinstance(value, tuple) and value and all(isinstance(each, BaseModel) for each in value):
        return f"[{', '.join(str(each.model_dump(exclude_defaults=True)) for each in value)}]"
    return default_text(value) or "empty"


def _traits(method: Method) -> Iterable[str]:
    """What a method needs or can't bear, as sentences."""
    if isinstance(method, AdvantageEstimator):
        if method.compares_group:
            yield "Needs groups of at least two."
        if method.needs:
            yield f"Needs {_listed(each.value.replace('_', ' ') for each in method.needs)}."
        if method.level == "token":
            yield "One advantage a token."
    if isinstance(method, PolicyLoss):
        if method.needs:
            yield f"Needs {_listed(each.value.replace('_', ' ') for each in method.needs)}."
        if method.corrects_mismatch:
            yield "Set `algorithm.correction.method: none`: it weighs by the behaviour policy itself."
    if isinstance(method, KLEstimator):
        if method.wrong_in_loss:
            yield f"Not in the loss: {method.wrong_in_loss}"
        if method.wrong_in_reward:
            yield f"Not in the reward: {method.wrong_in_reward}"
    if isinstance(method, PreferenceLoss):
        if not method.is_paired:
            yield "Takes single labelled answers."
        if not method.needs_reference:
            yield "Needs no reference model."
        if method.needs_negative_image:
            yield "Needs an image negative."


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _refused() -> str:
    by_reason: dict[str, list[str]] = {}
    for loss in POLICY_LOSSES:
        for advantage in ADVANTAGE_ESTIMATORS:
            reason = incompatibility(ADVANTAGE_ESTIMATORS.get(advantage), POLICY_LOSSES.get(loss))
            if reason:
                by_reason.setdefault(reason, []).append(f"`{advantage}` × `{loss}`")
    return "All other pairs can be combined.\n\n" + "\n".join(
        f"- {', '.join(pairs)}: {reason}." for reason, pairs in by_reason.items()
    ) + "\n"  # fmt: skip


def main() -> int:
    """Write the document, or compare it with the file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is current")
    if bare := undocumented():
        print(f"no formula, source or word on when to use them: {', '.join(bare)}", file=sys.stderr)
        return 1
    made = document()
    if not parser.parse_args().check:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(made, encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == made:
        return 0
    print(f"{TARGET} is not current: run python scripts/write_algorithms_doc.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
