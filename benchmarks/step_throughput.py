"""Completions per second of online GRPO, Counterpoint beside TRL's GRPOTrainer, and where Counterpoint's step goes.

    python benchmarks/step_throughput.py                      both engines, both workloads
    python benchmarks/step_throughput.py --only counterpoint generator.threads=2

The same policy, prompts (two images each), group size, token limit, KL to a reference model, learning rate and
reward, in float32, one engine after the other, each in its own environment; the peer's is made on the first call.
Figures are of the steady state: medians over wall time from the end of one step to the end of the next, without the
first steps. The peer gets the best of several micro-batches. Arguments that look like settings go to Counterpoint.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import yaml
from throughput_case import CASES, ROOT, Case, write_case

HERE = Path(__file__).resolve().parent
REQUIREMENTS = HERE / "requirements-trl.txt"
KL_COEFFICIENT = 0.01
# So small that the policy, and with it the distribution of lengths, stays what it is.
LEARNING_RATE = 1e-6
THREADS = 2
"""Of trainer and reference, which never run at the same time as the generator here."""
PARTS = ("generate", "score", "reference", "learn", "sync")
TARGETS = {"fixed-32": 1.0, "unequal-256": 1.5}


def arguments() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "step-throughput")
    parser.add_argument("--peer-environment", type=Path, default=ROOT / ".cache" / "trl-venv")
    parser.add_argument("--only", choices=("counterpoint", "trl"), help="run one engine alone")
    parser.add_argument("--case", choices=[case.name for case in CASES], action="append", help="by default all")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=6, help="first steps that aren't counted")
    parser.add_argument("--threads", type=int, default=2, help="of the peer")
    parser.add_argument("--peer-micro-batches", default="256,64", help="completions in a forward pass; the best counts")
    parser.add_argument("--deadline-s", type=float, default=1200.0, help="for one engine on one workload")
    options, overrides = parser.parse_known_args()
    unknown = [argument for argument in overrides if "=" not in argument or argument.startswith("--")]
    if unknown:
        parser.error(f"unknown arguments: {' '.join(unknown)}")
    if options.steps <= options.warmup + 1:
        parser.error("--steps must exceed --warmup by at least 2")
    return options, overrides


def setup_script() -> ModuleType:
    """The project's own set-up, whose remedies for mismatched torch builds the peer's environment needs too."""
    spec = importlib.util.spec_from_file_location("counterpoint_setup", ROOT / "scripts" / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def peer_python(environment: Path) -> Path:
    """The interpreter of the peer's environment, which is made, or made anew after its requirements changed."""
    environment = environment.absolute()
    python, stamp = environment / "bin" / "python", environment / ".requirements"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text() == wanted:
        return python
    print(f"making the peer's environment in {environment} (a few minutes)", flush=True)
    setup = setup_script()
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    index = setup.TORCH_CPU_INDEX
    options = ["--extra-index-url", index] if setup.index_answers(index) else []
    pip: list[str | Path] = [python, "-m", "pip", "--disable-pip-version-check", "install", "-qq"]
    subprocess.run([*pip, *options, "-r", REQUIREMENTS], check=True)
    setup.mend(python)
    stamp.write_text(wanted)
    return python


def start(command: list[Any], log: Path, deadline_s: float, **environment: str) -> None:
    """Run a command to its end, its output in a file, which the error names and quotes if it fails."""
    with log.open("w") as output:
        done = subprocess.run(
            [str(part) for part in command],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
            timeout=deadline_s,
            check=False,
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-25:])
        raise SystemExit(f"{command[0]} ended with exit code {done.returncode}; the end of {log}:\n{tail}")


def measure_trl(case: Case, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The peer's figures with its best micro-batch."""
    python = peer_python(options.peer_environment)
    found = []
    for micro_batch in map(int, options.peer_micro_batches.split(",")):
        out = folder / f"trl-{micro_batch}.json"
        command = [python, HERE / "peer_trl.py", "--model", folder / "model", "--prompts", folder / "prompts.jsonl"]
        command += ["--out", out, "--folder", folder / "trl", "--max-tokens", case.max_tokens]
        command += ["--group-size", case.group_size, "--prompts-per-step", case.prompts_per_step]
        command += ["--micro-batch", micro_batch, "--threads", options.threads]
        command += ["--steps", options.steps, "--warmup", options.warmup]
        command += ["--kl-coefficient", KL_COEFFICIENT, "--learning-rate", LEARNING_RATE]
        start(command, folder / f"trl-{micro_batch}.log", options.deadline_s, OMP_NUM_THREADS=str(options.threads))
        found.append(json.loads(out.read_text()))
        print(f"  trl, micro-batch {micro_batch}: {found[-1]['completions_per_s']:.1f} completions/s", flush=True)
    return max(found, key=lambda figures: figures["completions_per_s"])


def recipe(case: Case, folder: Path, steps: int) -> dict[str, Any]:
    """Counterpoint's recipe of the workload."""
    # Two images of 4 tokens and a short question: no prompt of the demo's model reaches 64 tokens.
    max_length = case.max_tokens + 64
    tokens = 64 * max_length
    return {
        "run": {"name": case.name, "folder": str(folder / "run")},
        "model": {"path": str(folder / "model"), "precision": "float32", "max_length": max_length},
        "data": {"train": {"path": str(folder / "prompts.jsonl"), "images_column": "images"}},
        "rollout": {
            "prompts_per_step": case.prompts_per_step,
            "group_size": case.group_size,
            "sampling": {"temperature": 1.0, "max_tokens": case.max_tokens},
        },
        "reward": {
            "components": [{"function": "digit_share"}],
            "modules": [str(HERE / "throughput_reward.py")],
        },
        "algorithm": {"kl": {"coefficient": KL_COEFFICIENT}},
        "trainer": {"steps": steps, "learning_rate": LEARNING_RATE, "micro_batch_tokens": tokens, "threads": THREADS},
        "generator": {"max_sequences": 256, "kv_cache_gib": 1.0, "enforce_eager": True},
        "reference": {"micro_batch_tokens": tokens, "threads": THREADS},
        "checkpoint": {"every_steps": 10 * steps, "export": False},
        "tracking": {"enabled": False, "samples_every_steps": 0},
    }


def measure_counterpoint(case: Case, folder: Path, options: argparse.Namespace, overrides: list[str]) -> dict[str, Any]:
    """Counterpoint's figures, from the metrics its run wrote."""
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(case, folder, options.steps), sort_keys=False))
    shutil.rmtree(folder / "run", ignore_errors=True)
    command = [Path(sys.executable).parent / "counterpoint", "train", path, *overrides]
    start(command, folder / "counterpoint.log", options.deadline_s)
    figures = read_figures(folder / "run" / "metrics.jsonl", options.warmup)
    print(f"  counterpoint: {figures['completions_per_s']:.1f} completions/s", flush=True)
    return figures


def read_figures(metrics: Path, warmup: int) -> dict[str, Any]:
    """Steady-state figures of a run. A step lasts until the next one's metrics are written, so nothing is left out."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    steps = [row for row in rows if "time/step_s" in row["values"]]
    steady = [
        (later["time"] - earlier["time"], later["values"]) for earlier, later in itertools.pairwise(steps[warmup - 1 :])
    ]
    if not steady:
        raise SystemExit(f"{metrics} has {len(steps)} steps; more than {warmup} are needed")
    named = [{part: values.get(f"time/{part}_s", 0.0) for part in PARTS} for _, values in steady]
    parts = {part: statistics.median(step[part] for step in named) for part in PARTS}
    walls = [wall for wall, _ in steady]
    parts["other"] = statistics.median(wall - sum(step.values()) for wall, step in zip(walls, named, strict=True))
    return {
        "step_s": [round(wall, 4) for wall in walls],
        "median_step_s": statistics.median(walls),
        "completions_per_s": statistics.median(values["rollout/completions"] / wall for wall, values in steady),
        "mean_tokens": statistics.fmean(values["rollout/mean_tokens"] for _, values in steady),
        "max_tokens": max(values["rollout/max_tokens"] for _, values in steady),
        "parts_s": parts,
    }


def show(case: Case, found: dict[str, dict[str, Any]]) -> None:
    for engine, figures in found.items():
        print(
            f"{case.name:12}  {engine:12}  {figures['completions_per_s']:8.1f} completions/s  "
            f"{figures['median_step_s']:7.2f} s a step  {figures['mean_tokens']:6.1f} tokens a completion"
        )
    if len(found) == 2:
        ratio = found["counterpoint"]["completions_per_s"] / found["trl"]["completions_per_s"]
        print(f"{case.name:12}  ratio {ratio:.2f} (wanted: at least {TARGETS[case.name]})")
    if "counterpoint" in found:
        parts = found["counterpoint"]["parts_s"]
        whole = sum(parts.values())
        shares = "  ".join(f"{part} {seconds:.2f} s ({seconds / whole:.0%})" for part, seconds in parts.items())
        print(f"{case.name:12}  a step of counterpoint: {shares}")


def main() -> None:
    options, overrides = arguments()
    results: dict[str, dict[str, dict[str, Any]]] = {}
    for case in CASES:
        if options.case and case.name not in options.case:
            continue
        print(f"{case.name}: {case.prompts_per_step} prompts x {case.group_size}, up to {case.max_tokens} tokens")
        folder = (options.folder / case.name).absolute()
        write_case(case, folder, prompts=case.prompts_per_step * options.steps)
        found = results.setdefault(case.name, {})
        if options.only != "trl":
            found["counterpoint"] = measure_counterpoint(case, folder, options, overrides)
        if options.only != "counterpoint":
            found["trl"] = measure_trl(case, folder, options)
    for case in CASES:
        if case.name in results:
            show(case, results[case.name])
    summary = options.folder / "summary.json"
    summary.write_text(json.dumps({"cpus": os.cpu_count(), "overrides": overrides, "cases": results}, indent=2) + "\n")
    print(f"all figures: {summary}")


if __name__ == "__main__":
    main()
