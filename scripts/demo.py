"""The demo, from nothing to a report: build a small vision-language policy, fine-tune it, train it by online GRPO.

`make demo` calls this. Each part is a command that anyone can call by hand; they are printed as they run.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RECIPES = ROOT / "recipes"


def run(title: str, *command: str) -> None:
    """Run one part; end the demo with its exit code where it fails."""
    shown = " ".join(Path(part).name if part.startswith(sys.prefix) else part for part in command)
    shown = shown.replace(f"{ROOT}/", "")
    print(f"\n== {title}\n$ {shown}", flush=True)
    started = time.monotonic()
    code = subprocess.run(command, cwd=ROOT, check=False).returncode
    if code:
        print(f"demo: '{title}' ended with exit code {code}", file=sys.stderr)
        sys.exit(code)
    print(f"== {title}: {time.monotonic() - started:.0f} s", flush=True)


def set_aside(folder: Path) -> None:
    """Keep an earlier demo under a name of its own; a run folder is never written over."""
    if folder.exists():
        kept = folder.with_name(
            f"{folder.name}-{time.strftime('%Y%m%d-%H%M%S', time.localtime(folder.stat().st_mtime))}"
        )
        folder.rename(kept)
        print(f"demo: the earlier demo is now in {kept}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data order and sampling")
    parser.add_argument("overrides", nargs="*", help="overrides for the training recipe (trainer.steps=20)")
    arguments = parser.parse_args()
    folder, seed = (ROOT / arguments.folder).resolve(), str(arguments.seed)
    counterpoint = str(Path(sys.prefix, "bin", "counterpoint"))
    set_aside(folder)
    started = time.monotonic()
    model, warm_start = folder / "model", folder / "warm-start"
    run("Build the policy", sys.executable, str(RECIPES / "digits.py"), "build", "--out", str(model), "--seed", seed)
    run(
        "Warm start by supervised fine-tuning",
        *(counterpoint, "sft", str(RECIPES / "digits-sft.yaml"), f"model.path={model}", f"run.seed={seed}"),
        *(f"run.folder={folder / 'sft'}", f"sft.export_folder={warm_start}"),
    )
    run(
        "Online GRPO",
        *(counterpoint, "train", str(RECIPES / "digits.yaml"), f"model.path={warm_start}", f"run.seed={seed}"),
        *(f"run.folder={folder}", *arguments.overrides),
    )
    print(f"\nThe demo took {time.monotonic() - started:.0f} s. Look at {folder / 'report.html'}, or open MLflow:")
    print(f"  {Path(sys.prefix, 'bin', 'mlflow')} ui --backend-store-uri sqlite:///{folder / 'mlflow.db'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
