"""Seconds from the samples' arrays to what the loss is made of, on one core: advantages, correction, batch preparation.

    python benchmarks/advantage_scaling.py                     1,000,000 tokens in 4,096 groups of 8
    python benchmarks/advantage_scaling.py --groups 256        the same tokens in fewer, longer completions

A step takes each sample's arrays (action mask, log-probabilities of generator and trainer), puts them end to end,
estimates advantages, puts all four into rows and makes the rollout correction. The last column sets it against one
plain copy of the bytes that it reads and writes. Seconds are those that the core worked for it, so that other work on
the machine doesn't count; the clock's are beside them. Ends with 1 where an estimator takes longer than the limit.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from algorithms import choices  # noqa: F401  registers the built-in methods
from algorithms.config import CorrectionConfig
from algorithms.correction import Correction, importance_correction
from algorithms.estimation import FIELDS, estimate_advantages
from algorithms.inputs import AdvantageInputs
from algorithms.packing import Packing
from algorithms.registry import ADVANTAGE_ESTIMATORS, Need

LIMIT_S = 0.2
COMPONENTS = 3
OPTIONS: dict[str, dict[str, Any]] = {
    "gae": {"discount": 0.99},
    "reinforce_plus_plus": {"discount": 0.99},
    "inference_aware": {"terms": [{"transform": "best_of_n", "n": 4}]},
}
"""Switches of the costlier way through an estimator, and those that it can't do without."""


@dataclass(frozen=True)
class Case:
    """A batch as the trainer gets it.

    Attributes:
        rows: by field, each sample's array: `mask`, `behaviour` and `trainer`.
        inputs: the rest, [samples] or [tokens], by field of AdvantageInputs.
        lengths: [samples] int64.
    """

    rows: dict[str, list[NDArray[np.generic]]]
    inputs: dict[str, Tensor]
    lengths: Tensor

    @property
    def tokens(self) -> int:
        return int(self.lengths.sum())


def draw_lengths(tokens: int, samples: int, generator: torch.Generator) -> Tensor:
    """[samples] int64, from a half to one and a half times their mean, that sum up to `tokens`."""
    shares = torch.rand(samples, dtype=torch.float64, generator=generator) + 0.5
    ends = (shares.cumsum(0) / shares.sum() * tokens).round().long()
    ends[-1] = tokens
    return torch.diff(ends, prepend=torch.zeros(1, dtype=torch.int64))


def make_case(tokens: int, groups: int, group_size: int, seed: int = 0) -> Case:
    """Random samples with rewards of 0 and 1, a tenth of whose tokens an environment wrote."""
    if tokens < 2 * groups * group_size:
        raise SystemExit(f"{tokens} tokens are too few for {groups * group_size} completions: give at least twice that")
    generator = torch.Generator().manual_seed(seed)
    samples = groups * group_size
    lengths = draw_lengths(tokens, samples, generator)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    mask = uniform(tokens) < 0.9
    mask[lengths.cumsum(0) - 1] = True
    behaviour = -uniform(tokens)
    trainer = behaviour + 0.02 * torch.randn(tokens, dtype=torch.float64, generator=generator)
    parts = lengths.tolist()
    columns = {"mask": mask, "behaviour": behaviour.float(), "trainer": trainer.float()}
    rewards = (uniform(samples) < 0.5).double()
    return Case(
        {name: [part.numpy().copy() for part in column.split(parts)] for name, column in columns.items()},
        {
            "rewards": rewards,
            "group": torch.arange(groups).repeat_interleave(group_size),
            "components": torch.stack([rewards, uniform(samples), uniform(samples)], dim=1),
            "is_present": uniform(samples, COMPONENTS) < 0.9,
            "component_weights": torch.ones(COMPONENTS, dtype=torch.float64),
            "greedy_rewards": uniform(samples),
            "values": uniform(tokens),
            "log_probs": trainer.clamp(max=0),
            "collision": uniform(tokens),
        },
        lengths,
    )


def needed_inputs(case: Case, name: str) -> dict[str, Tensor]:
    """What the estimator reads besides the samples' arrays."""
    wanted = [field for need in ADVANTAGE_ESTIMATORS.get(name).needs for field in FIELDS[Need(need)]]
    return {field: case.inputs[field] for field in ("rewards", "group", *wanted)}


def one_step(case: Case, name: str) -> tuple[dict[str, Tensor], Correction, dict[str, float]]:
    """A step of the estimator called `name`.

    Returns:
        The rows, the correction, and the seconds of each part.
    """
    clock, started = time.perf_counter(), time.thread_time()
    packed = {field: torch.from_numpy(np.concatenate(rows)) for field, rows in case.rows.items()}
    gathered = time.thread_time()
    fields_needed: dict[str, Any] = needed_inputs(case, name)
    inputs = AdvantageInputs(lengths=case.lengths, mask=packed["mask"], **fields_needed)
    packed["advantages"] = estimate_advantages(name, inputs, OPTIONS.get(name)).float()
    estimated = time.thread_time()
    packing = Packing.of(case.lengths)
    rows = {field: packing.to_rows(values) for field, values in packed.items()}
    laid_out = time.thread_time()
    correction = importance_correction(rows["trainer"], rows["behaviour"], rows["mask"], CorrectionConfig())
    ended = time.thread_time()
    seconds = {
        "advantages": estimated - gathered,
        "preparation": gathered - started + laid_out - estimated,
        "correction": ended - laid_out,
        "all": ended - started,
        "clock": time.perf_counter() - clock,
    }
    return rows, correction, seconds


def bytes_of(case: Case, name: str, rows: dict[str, Tensor], correction: Correction) -> int:
    """What the step has to read and write, once each."""
    made = [*rows.values(), *(getattr(correction, field.name) for field in fields(correction))]
    arrays = sum(row.nbytes for each in case.rows.values() for row in each)
    return arrays + sum(tensor.nbytes for tensor in (*needed_inputs(case, name).values(), *made))


def copied_bytes_per_s(repeats: int) -> float:
    """Bytes read and written by a plain copy between buffers larger than any cache, a second."""
    source, target = torch.ones(2**28, dtype=torch.uint8), torch.empty(2**28, dtype=torch.uint8)
    found = []
    for _ in range(repeats + 1):
        started = time.thread_time()
        target.copy_(source)
        found.append(time.thread_time() - started)
    return 2 * len(source) / statistics.median(found[1:])


def measure(case: Case, name: str, repeats: int, bytes_per_s: float) -> dict[str, float]:
    """Median seconds of each part over some steps after a first one, and the ratio of all to a plain copy."""
    rows, correction, _ = one_step(case, name)
    size = bytes_of(case, name, rows, correction)
    steps = [one_step(case, name)[2] for _ in range(repeats)]
    medians = {part: statistics.median(step[part] for step in steps) for part in steps[0]}
    return medians | {"copies": medians["all"] * bytes_per_s / size}


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000)
    parser.add_argument("--groups", type=int, default=4096)
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--limit-s", type=float, default=LIMIT_S)
    arguments = parser.parse_args(words)
    torch.set_num_threads(1)
    case = make_case(arguments.tokens, arguments.groups, arguments.group_size)
    table = Table("estimator", "advantages ms", "preparation ms", "correction ms", "all ms", "clock ms", "copies")
    bytes_per_s = copied_bytes_per_s(arguments.repeats)
    missed = []
    for name in ADVANTAGE_ESTIMATORS:
        found = measure(case, name, arguments.repeats, bytes_per_s)
        parts = (found[part] for part in ("advantages", "preparation", "correction", "all", "clock"))
        table.add_row(name, *(f"{1000 * part:.1f}" for part in parts), f"{found['copies']:.1f}")
        if found["all"] > arguments.limit_s:
            missed.append(f"missed: {name} took {found['all']:.3f} s (limit {arguments.limit_s:g} s)")
    print(
        f"{case.tokens:,} tokens, {len(case.lengths):,} completions in {arguments.groups:,} groups, one core, median "
        f"of {arguments.repeats}"
    )
    Console(width=120).print(table)
    for line in missed:
        print(line)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
