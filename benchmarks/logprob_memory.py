"""Extra memory and time of chosen tokens' log-probabilities, forward and backward: whole logits beside tiles of them.

    python benchmarks/logprob_memory.py                                 8,192 tokens x 152,064 vocabulary, width 1,024
    python benchmarks/logprob_memory.py --tokens 512 --vocabulary 8192  a smaller one

Every variant runs alone in a process of its own. Extra memory is the process's peak resident size less its size before
the first forward pass, inputs there already; gradients of hidden states and head count for both variants. Where the
plain one wouldn't fit into this machine's free memory, both run with fewer tokens, and its memory, which but for the
head's gradient is proportional to the tokens, is reckoned for all of them. On a busy machine the time of the processors
says more than the time on the clock.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from algorithms.log_probs import BUDGET_BYTES, statistics_of_logits, token_log_probs

VARIANTS = ("plain", "chunked")
MEMORY_TARGET = 0.1
TIME_TARGET = 1.3
PLAIN_COPIES = 5
"""Float32 tensors of [tokens, vocabulary] that the plain computation is reckoned to hold at its peak."""
MIB = 1 << 20
MIN_COLUMNS = 110
"""Of the table, also where the output is no terminal."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocabulary", type=int, default=152_064)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), action="append", help="by default both")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3, help="the shortest time counts")
    parser.add_argument("--budget-mib", type=int, default=BUDGET_BYTES // MIB, help="of the chunked variant")
    parser.add_argument("--entropy", action="store_true", help="compute the entropies too")
    parser.add_argument("--plain-tokens", type=int, help="tokens of the comparison, by default all that fit")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    return parser.parse_args(given)


def statuses() -> dict[str, int]:
    """The kernel's account of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    return {name: int(fields[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM")}


def compute(variant: str, hidden: Tensor, weight: Tensor, tokens: Tensor, budget_bytes: int, entropy: bool) -> Tensor:
    """One forward and backward pass; the log-probabilities."""
    hidden.grad = weight.grad = None
    if variant == "plain":
        outcome = statistics_of_logits(torch.nn.functional.linear(hidden, weight), tokens, with_entropy=entropy)
    else:
        outcome = token_log_probs(hidden, weight, tokens, with_entropy=entropy, budget_bytes=budget_bytes)
    weights = torch.linspace(-1, 1, len(tokens))
    (outcome.log_probs * weights).sum().backward()
    return outcome.log_probs.detach()


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """One variant's figures, in this process."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    dtype = getattr(torch, options.dtype[0])
    hidden = torch.randn(options.tokens, options.width).to(dtype).requires_grad_()
    weight = torch.empty(options.vocabulary, options.width, dtype=dtype)
    for rows in weight.split(4096):
        rows.copy_(torch.randn(rows.shape) * options.width**-0.5)
    weight.requires_grad_()
    tokens = torch.randint(0, options.vocabulary, (options.tokens,))
    few = hidden[:4].detach().requires_grad_(), weight[:64].detach().requires_grad_()
    # Libraries set themselves up on their first products, which isn't memory of the computation.
    compute(options.variant, *few, torch.zeros(4, dtype=torch.long), 1024, options.entropy)
    before = statuses()["VmRSS"]
    seconds, processor_seconds = [], []
    for _ in range(options.repeats):
        start, processor_start = time.perf_counter(), time.process_time()
        log_probs = compute(options.variant, hidden, weight, tokens, options.budget_mib * MIB, options.entropy)
        seconds.append(time.perf_counter() - start)
        processor_seconds.append(time.process_time() - processor_start)
    assert hidden.grad is not None
    assert weight.grad is not None
    return {
        "extra_bytes": statuses()["VmHWM"] - before,
        "seconds": min(seconds),
        "processor_seconds": min(processor_seconds),
        "all_seconds": seconds,
        "checks": [float(part.double().norm()) for part in (log_probs, hidden.grad, weight.grad)],
    }


def run(options: argparse.Namespace, dtype: str, variant: str, tokens: int) -> dict[str, Any]:
    """A variant's figures from a process of its own."""
    command = [sys.executable, __file__, "--variant", variant, "--dtype", dtype, "--tokens", str(tokens)]
    for name in ("vocabulary", "width", "threads", "repeats", "budget_mib"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--entropy"] * options.entropy
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{variant}, {dtype}, {tokens} tokens ended with {done.returncode}:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures | {"tokens": tokens}


def tokens_that_fit(options: argparse.Namespace) -> int:
    """All tokens, halved until the plain computation fits into nine tenths of the free memory."""
    tokens: int = options.tokens
    while tokens > 1 and PLAIN_COPIES * 4 * tokens * options.vocabulary > 0.9 * psutil.virtual_memory().available:
        tokens //= 2
    return tokens


def compare(options: argparse.Namespace, dtype: str) -> dict[str, Any]:
    """Both variants side by side, and the chunked one with all tokens."""
    tokens = options.plain_tokens or tokens_that_fit(options)
    plain, chunked = (run(options, dtype, variant, tokens) for variant in VARIANTS)
    whole = chunked if tokens == options.tokens else run(options, dtype, "chunked", options.tokens)
    head_bytes = options.vocabulary * options.width * getattr(torch, dtype).itemsize
    plain_bytes = (plain["extra_bytes"] - head_bytes) * options.tokens / tokens + head_bytes
    return {
        "dtype": dtype,
        "plain": plain,
        "chunked": chunked,
        "chunked_whole": whole,
        "plain_bytes_whole": plain_bytes,
        "memory_ratio": whole["extra_bytes"] / plain_bytes,
        "time_ratio": chunked["seconds"] / plain["seconds"],
    }


def show(options: argparse.Namespace, results: list[dict[str, Any]], console: Console) -> None:
    title = f"{options.tokens:,} tokens x {options.vocabulary:,} vocabulary, width {options.width:,}"
    table = Table(title=f"{title}, {options.threads} threads, forward and backward")
    for column in (
        "precision",
        "variant",
        "tokens",
        "extra memory",
        "time",
        "processors",
        "memory ratio",
        "time ratio",
    ):
        table.add_column(column, justify="left" if column in ("precision", "variant") else "right")
    for result in results:
        rows = [("plain", result["plain"]), ("chunked", result["chunked"])]
        if result["chunked_whole"] is not result["chunked"]:
            rows.append(("chunked", result["chunked_whole"]))
        for variant, figures in rows:
            is_whole, is_chunked = figures["tokens"] == options.tokens, variant == "chunked"
            is_compared = figures["tokens"] == result["plain"]["tokens"]
            table.add_row(
                result["dtype"],
                variant,
                f"{figures['tokens']:,}",
                f"{figures['extra_bytes'] / MIB:,.0f} MiB",
                f"{figures['seconds']:.2f} s",
                f"{figures['processor_seconds']:.2f} s",
                f"{result['memory_ratio']:.3f}" if is_chunked and is_whole else "",
                f"{result['time_ratio']:.2f}" if is_chunked and is_compared else "",
            )
    console.print(table)
    for result in results:
        if result["plain"]["tokens"] != options.tokens:
            console.print(
                f"{result['dtype']}: the plain variant didn't fit with {options.tokens:,} tokens; its memory there "
                f"is reckoned as {result['plain_bytes_whole'] / MIB:,.0f} MiB, the time ratio is of "
                f"{result['plain']['tokens']:,} tokens."
            )
    console.print(f"wanted: a memory ratio of at most {MEMORY_TARGET}, a time ratio of at most {TIME_TARGET}")


def main() -> None:
    options = arguments()
    if options.variant:
        print(json.dumps(measure(options)))
        return
    results = [compare(options, dtype) for dtype in options.dtype or ("float32", "bfloat16")]
    show(options, results, Console(width=max(Console().width, MIN_COLUMNS)))
    if options.out:
        options.out.write_text(json.dumps({"options": vars(options) | {"out": None}, "results": results}, indent=2))


if __name__ == "__main__":
    main()
