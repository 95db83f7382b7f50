"""TRL's GRPOTrainer on the throughput benchmark's model and prompts. Runs in an environment of its own.

Prints one JSON line: seconds of each step, completions per second of the steady state, and mean completion length.
The settings are what a careful user of TRL would choose on CPU: float32, no gradient checkpointing (TRL's default
recomputes), no logging or saving, rewards that cost nothing. Generation is TRL's own (transformers' `generate`): its
vLLM mode was not tried, and its continuous batching drops the images.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

IMAGE_PLACEHOLDER = "<image>"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder")
    parser.add_argument("--prompts", type=Path, required=True, help="JSON Lines with prompt, images and target")
    parser.add_argument("--out", type=Path, help="write the JSON line here too")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/peer-trl"), help="the trainer's output folder")
    parser.add_argument("--group-size", type=int, default=8)
    parser.add_argument("--prompts-per-step", type=int, default=32)
    parser.add_argument("--max-tokens", type=int, default=32)
    parser.add_argument("--micro-batch", type=int, help="completions in one forward pass; by default all of a step")
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=3, help="first steps that aren't counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kl-coefficient", type=float, default=0.01)
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    return parser.parse_args()


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Rows as TRL takes them: a conversation of text, and the images apart (it puts them before the text)."""
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        text = row["prompt"].removeprefix(IMAGE_PLACEHOLDER * len(row["images"]))
        rows.append(
            {
                "prompt": [{"role": "user", "content": text}],
                "images": [str(path.parent / image) for image in row["images"]],
                "target": row["target"],
            }
        )
    return rows


def run(options: argparse.Namespace) -> dict[str, Any]:
    # Libraries that read the number of threads at import come after it is set.
    import datasets
    import torch
    from digit_share import digit_share
    from transformers import AutoProcessor, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(options.threads)
    step_ends: list[float] = []

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            step_ends.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            step_ends.append(time.perf_counter())

    lengths: list[int] = []

    def reward(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> Any:
        lengths.extend(len(ids) for ids in completion_ids)
        return digit_share(prompts, completions)

    rows = datasets.Dataset.from_list(read_prompts(options.prompts))
    rows = rows.cast_column("images", datasets.List(datasets.Image()))
    completions = options.prompts_per_step * options.group_size
    micro_batch = options.micro_batch or completions
    config = GRPOConfig(
        output_dir=str(options.folder),
        model_init_kwargs={"dtype": "float32", "attn_implementation": "sdpa"},
        max_steps=options.steps,
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=completions // micro_batch,
        num_generations=options.group_size,
        max_completion_length=options.max_tokens,
        temperature=1.0,
        beta=options.kl_coefficient,
        epsilon=0.2,
        loss_type="dapo",
        scale_rewards="group",
        learning_rate=options.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        shuffle_dataset=False,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=str(options.model),
        reward_funcs=reward,
        args=config,
        train_dataset=rows,
        processing_class=AutoProcessor.from_pretrained(options.model, padding_side="left"),
        callbacks=[Clock()],
    )
    trainer.train()
    step_s = [later - earlier for earlier, later in itertools.pairwise(step_ends)]
    steady = step_s[options.warmup :]
    return {
        "step_s": [round(seconds, 4) for seconds in step_s],
        "median_step_s": statistics.median(steady),
        "completions_per_s": completions / statistics.median(steady),
        "mean_tokens": statistics.fmean(lengths),
        "max_tokens": max(lengths),
        "micro_batch": micro_batch,
        "torch_threads": torch.get_num_threads(),
    }


def main() -> None:
    options = arguments()
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    line = json.dumps(run(options))
    if options.out is not None:
        options.out.write_text(line + "\n")
    print(line)


if __name__ == "__main__":
    main()
