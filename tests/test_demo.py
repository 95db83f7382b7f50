"""The demo learns what it says, on several seeds. Long: .ci/run calls it after `make test`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.learning
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_reinforcement_learning_alone_lifts_held_out_exact_match_by_25_points(seed: int, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    demo = [sys.executable, str(ROOT / "scripts" / "demo.py"), "--folder", str(folder), "--seed", str(seed)]
    outcome = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True, timeout=1500, check=False)
    assert outcome.returncode == 0, outcome.stdout[-4000:] + outcome.stderr[-4000:]
    summary = json.loads((folder / "summary.json").read_text())
    before, after = summary["eval"]["before"]["greedy"], summary["eval"]["after"]["greedy"]
    assert summary["seed"] == seed
    assert 0.30 <= before["mean"] <= 0.60
    assert after["mean"] - before["mean"] >= 0.25
    assert before["n"] == after["n"] == 400
    assert summary["groups"]["is_balanced"]
    assert summary["weights"]["verified"] == summary["weights"]["published"] == summary["steps"]
    assert summary["agreement"]["max_logprob_gap_nats"] < 1e-4
    for name in ("report.html", "export/model.safetensors", "mlflow.db"):
        assert (folder / name).exists(), name
    assert list((folder / "plots").glob("*.png"))
