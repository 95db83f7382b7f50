"""The benchmark of log-probabilities compares the same computation, and its ratios are those worked by hand."""

import argparse
import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))

import logprob_memory


def small(*more: str) -> argparse.Namespace:
    sizes = ("--tokens", "64", "--vocabulary", "16384", "--width", "8", "--budget-mib", "1", "--threads", "1")
    return logprob_memory.arguments([*sizes, "--repeats", "1", *more])


def test_both_variants_compute_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(64, 8, generator=generator).requires_grad_()
    weight = torch.randn(2048, 8, generator=generator).requires_grad_()
    tokens = torch.arange(64)
    found = []
    for variant in logprob_memory.VARIANTS:
        log_probs = logprob_memory.compute(variant, hidden, weight, tokens, 64 << 10, True)
        assert hidden.grad is not None
        assert weight.grad is not None
        found.append((log_probs, hidden.grad.clone(), weight.grad.clone()))
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


def test_ratios_set_the_chunked_memory_beside_the_plain_one_of_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    # The head's gradient takes 16,384 x 8 x 4 = 524,288 bytes whatever the tokens. Half of the tokens fit: the plain
    # variant takes a million more there, so 2 million more with all; the chunked one takes 600,000.
    def run(_: Any, dtype: str, variant: str, tokens: int) -> dict[str, Any]:
        extra_bytes = 1_524_288 if variant == "plain" else 600_000
        return {"extra_bytes": extra_bytes, "seconds": tokens / 32, "tokens": tokens}

    monkeypatch.setattr(logprob_memory, "run", run)
    result = logprob_memory.compare(small("--plain-tokens", "32"), "float32")
    assert result["plain_bytes_whole"] == 2_524_288
    assert result["memory_ratio"] == pytest.approx(600_000 / 2_524_288)
    assert result["time_ratio"] == pytest.approx(1.0)
    assert result["chunked_whole"]["tokens"] == 64


def test_a_small_run_prints_every_figure_and_says_what_did_not_fit() -> None:
    options = small("--dtype", "bfloat16", "--plain-tokens", "32")
    result = logprob_memory.compare(options, "bfloat16")
    assert result["plain"]["checks"] == pytest.approx(result["chunked"]["checks"], rel=0.02)
    assert result["plain"]["seconds"] > 0
    assert json.loads(json.dumps(result))["memory_ratio"] == result["memory_ratio"]
    shown = io.StringIO()
    logprob_memory.show(options, [result], Console(file=shown, width=200))
    printed = shown.getvalue()
    assert "didn't fit with 64 tokens" in printed
    assert printed.count("chunked") == 2
