"""What runs on a rank is importable without Ray, which only the actors around it need."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

WITHOUT_RAY = (
    "actors.model.batches",
    "actors.model.forward",
    "actors.model.loading",
    "actors.model.lora",
    "actors.model.output_head",
    "actors.model.reference_head",
    "actors.trainer.deepspeed_engine",
    "actors.trainer.gradient_combiner",
    "actors.trainer.learner",
    "actors.trainer.micro_batch",
    "actors.trainer.objective",
    "actors.trainer.passes",
    "actors.trainer.planning",
    "actors.trainer.policy_learner",
    "actors.trainer.policy_objective",
    "actors.trainer.policy_weights",
    "actors.trainer.sample_checks",
    "actors.trainer.schedule",
    "actors.trainer.spec",
    "actors.trainer.value_objective",
)


def test_a_ranks_modules_import_no_ray() -> None:
    code = "\n".join(f"import {name}" for name in WITHOUT_RAY) + "\nimport sys\nassert 'ray' not in sys.modules"
    command = [sys.executable, "-c", code]
    found = subprocess.run(
        command, cwd=Path(__file__).resolve().parents[3], capture_output=True, text=True, timeout=300, check=False
    )
    assert found.returncode == 0, found.stderr[-2000:]


def test_a_spec_imports_no_torch() -> None:
    code = "import actors.trainer.spec, sys\nassert 'torch' not in sys.modules"
    found = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(__file__).resolve().parents[3],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert found.returncode == 0, found.stderr[-2000:]
