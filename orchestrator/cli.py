"""The command line. Reads recipes, looks ahead, hands over to the run; engines are imported inside the commands only.

Exit codes: 0 done, 1 the run failed (its verdict is printed), 2 bad configuration or input, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

if TYPE_CHECKING:
    from orchestrator.config.schema import Config, SFTConfig

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130

app = typer.Typer(
    name="counterpoint",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

_DASHED_OVERRIDES = {"ignore_unknown_options": True}

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="A YAML recipe.", show_default=False)]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Overrides, such as trainer.learning_rate=3e-4.", show_default=False),
]
RunFolder = Annotated[
    Path, typer.Argument(metavar="RUN_FOLDER", help="Folder of a run (run.folder).", show_default=False)
]


def main() -> None:
    """Entry point of the command ``counterpoint``."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"counterpoint {_version()}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Online reinforcement learning of multimodal models, on Ray, vLLM and DeepSpeed."""


@app.command(context_settings=_DASHED_OVERRIDES)
def train(
    recipe: Recipe,
    overrides: Overrides = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the run folder's latest checkpoint.")] = False,
) -> None:
    """Train a policy by reinforcement learning."""
    with _exit_codes():
        config = _load(recipe, overrides)
        _look_ahead(config, resume=resume)
        from orchestrator.run_shell import train as run_training

        raise typer.Exit(run_training(config, resume=resume))


@app.command(context_settings=_DASHED_OVERRIDES)
def sft(recipe: Recipe, overrides: Overrides = None) -> None:
    """Fine-tune a model on given answers."""
    with _exit_codes():
        from orchestrator.config.loading import load_config
        from orchestrator.config.schema import SFTConfig

        config = load_config(recipe, overrides or (), SFTConfig)
        _look_ahead(config)
        from orchestrator.run_shell import sft as run_sft

        raise typer.Exit(run_sft(config))


@app.command(context_settings=_DASHED_OVERRIDES)
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None, typer.Option("--checkpoint", help="A checkpoint's folder; by default the recipe's model.")
    ] = None,
) -> None:
    """Evaluate a model or a checkpoint on the held-out prompts."""
    with _exit_codes():
        config = _load(recipe, overrides)
        if config.data.evaluation is None:
            _refuse(f"{recipe}: data.evaluation names no held-out prompts. Add them, or set data.evaluation.path=...")
        if checkpoint is not None and not checkpoint.is_dir():
            _refuse(f"--checkpoint: there is no folder {checkpoint}. A run keeps its own under checkpoints/.")
        _look_ahead(config, starts_run=False)
        from orchestrator.run_shell import evaluate as run_evaluation

        raise typer.Exit(run_evaluation(config, checkpoint.absolute() if checkpoint else None))


@app.command()
def export(
    run_folder: RunFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write.", show_default=False)],
) -> None:
    """Write a run's best policy as a Hugging Face folder."""
    with _exit_codes():
        _need_folder(run_folder)
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            _refuse(f"{out} exists and isn't an empty folder. Choose another, or remove it.")
        from orchestrator.run_shell import export as run_export

        raise typer.Exit(run_export(run_folder.absolute(), out.absolute()))


@app.command()
def track(run_folder: RunFolder) -> None:
    """Send to MLflow what a run could not."""
    with _exit_codes():
        _need_folder(run_folder)
        from orchestrator.tracking.tracker import flush_spool

        try:
            status = flush_spool(run_folder)
        except FileNotFoundError as error:
            _refuse(str(error))
            return
        typer.echo(
            f"MLflow run {status.run_id} at {status.uri}: {status.waiting} items wait, {status.refused} refused."
        )
        if status.waiting:
            _say("error", status.error or "there was not time enough; call it again.")
            raise typer.Exit(1)


@app.command()
def report(run_folder: RunFolder) -> None:
    """Write a run's report (report.html, summary.json, plots)."""
    with _exit_codes():
        _need_folder(run_folder)
        from orchestrator.report.page import write_report

        typer.echo(write_report(run_folder.absolute()))


@app.command(context_settings=_DASHED_OVERRIDES)
def check(recipe: Recipe, overrides: Overrides = None) -> None:
    """Load a recipe, look ahead, and print what would run. Starts nothing."""
    with _exit_codes():
        from orchestrator.config.loading import load_config, read_recipe
        from orchestrator.config.schema import Config, SFTConfig
        from orchestrator.preflight.plan_table import plan_rows

        schema: type[Config] | type[SFTConfig] = SFTConfig if "sft" in read_recipe(recipe) else Config
        config = load_config(recipe, overrides or (), schema)
        table = Table(title=f"{recipe}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in plan_rows(config):
            table.add_row(name, escape(value))
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        _look_ahead(config, resume=None)
        typer.echo("Ready to run.")


@app.command(name="config")
def show_config(
    prefix: Annotated[str, typer.Argument(help="Only keys that start so (trainer).", show_default=False)] = "",
    supervised: Annotated[bool, typer.Option("--sft", help="Settings of `counterpoint sft`.")] = False,
) -> None:
    """List every setting: its key, what is allowed, its default, what it does."""
    with _exit_codes():
        from orchestrator.config.schema import Config, SFTConfig
        from orchestrator.config.setting_list import default_text, settings

        found = [s for s in settings(SFTConfig if supervised else Config) if s.key.startswith(prefix)]
        if not found:
            _refuse(f"no setting starts with {prefix}. `counterpoint config` lists them all.")
        for setting in found:
            default = "required" if setting.is_required else f"default {default_text(setting.default)}"
            typer.echo(f"{setting.key}\n    {setting.description} ({setting.allowed}; {default})")


def _load(recipe: Path, overrides: list[str] | None) -> Config:
    from orchestrator.config.loading import load_config

    return load_config(recipe, overrides or ())


def _look_ahead(config: Config | SFTConfig, *, resume: bool | None = False, starts_run: bool = True) -> None:
    """Print what preflight finds; exits with 2 where an error is among it. ``resume=None`` suits either start."""
    from orchestrator.checkpoints import Checkpoints
    from orchestrator.config.schema import Config
    from orchestrator.preflight.checks import preflight

    if resume is None:
        kept = config.checkpoint.keep if isinstance(config, Config) else 1
        resume = Checkpoints(config.run.folder, keep=kept).latest() is not None
    found = preflight(config, resume=resume, starts_run=starts_run)
    for finding in found:
        _say(finding.severity, finding.message)
    if any(finding.severity == "error" for finding in found):
        raise typer.Exit(BAD_INPUT)


def _need_folder(folder: Path) -> None:
    if not folder.is_dir():
        _refuse(f"{folder} is not the folder of a run: it {'is a file' if folder.exists() else 'does not exist'}.")


def _refuse(message: str) -> NoReturn:
    _say("error", message)
    raise typer.Exit(BAD_INPUT)


def _say(severity: str, message: str) -> None:
    colour = "red" if severity == "error" else "yellow"
    Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False).print(
        f"[bold {colour}]{severity}:[/] {escape(message)}"
    )


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turns every way a command can end into one message and the exit code that says what it was."""
    from orchestrator.config.loading import ConfigError
    from orchestrator.record.progress import StderrHandler
    from rollout.failures import DataError, FailureError

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", handlers=[StderrHandler()])
    try:
        yield
    except ConfigError as error:
        for problem in error.problems:
            _say("error", problem)
        raise typer.Exit(BAD_INPUT) from None
    except KeyboardInterrupt:
        _say("error", "interrupted.")
        raise typer.Exit(INTERRUPTED) from None
    except DataError as error:
        _say("error", str(error))
        raise typer.Exit(BAD_INPUT) from None
    except FailureError as error:
        _say("error", f"{error} ({error.failure.kind}: {error.failure.reason})")
        raise typer.Exit(FAILED) from None
    except (typer.Exit, typer.Abort):
        raise
    except Exception as error:
        traceback.print_exc()
        _say("error", f"this is a defect of counterpoint, not of your recipe: {type(error).__name__}: {error}")
        raise typer.Exit(FAILED) from None


def _version() -> str:
    try:
        return version("counterpoint")
    except PackageNotFoundError:
        return "(not installed)"
