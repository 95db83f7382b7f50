"""The command line: each command loads its recipe, checks it, and calls what does the work.

The commands that train come from the table of run kinds. Ray, vLLM, DeepSpeed and torch are imported by what the
commands call, so that `counterpoint --help` answers at once.

Exit codes: 0 done, 1 the run failed (its verdict is printed), 2 bad configuration or input, 130 interrupted.
"""

from __future__ import annotations

import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from orchestrator.run_kinds import RUN_KINDS, RunKind, UnknownKindError, kind_named, kind_of_recipe

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
_KINDS = tuple(kind.command for kind in RUN_KINDS)

Recipe = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the latest checkpoint in the run folder.")]
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


def _run_command(kind: RunKind) -> Callable[..., None]:
    """The command that runs a kind."""

    def command(recipe: Recipe, overrides: Overrides = None, resume: Resume = False) -> None:
        with _exit_codes():
            config = _load(kind, recipe, overrides)
            _check(kind, config, resume=resume)
            from orchestrator.run_shell import run

            raise typer.Exit(run(kind, config, resume=resume))

    return command


for _kind in RUN_KINDS:
    app.command(name=_kind.command, help=_kind.help, context_settings=_DASHED_OVERRIDES)(_run_command(_kind))


@app.command(context_settings=_DASHED_OVERRIDES)
def evaluate(
    recipe: Recipe,
    overrides: Overrides = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option("--checkpoint", help="Folder of a checkpoint to evaluate; by default the recipe's model."),
    ] = None,
) -> None:
    """Evaluate a model or a checkpoint on held-out prompts."""
    with _exit_codes():
        kind = kind_named("train")
        config = _load(kind, recipe, overrides)
        if config.data.evaluation is None:
            _refuse(f"{recipe}: data.evaluation names no held-out prompts. Add them, or set data.evaluation.path=...")
        if checkpoint is not None and not checkpoint.is_dir():
            _refuse(
                f"--checkpoint: there is no folder {checkpoint}. A run's checkpoints are in its folder checkpoints/."
            )
        _check(kind, config, starts_run=False)
        from orchestrator.evaluate_export import evaluate as run_evaluation

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
            _refuse(f"{out} exists and is not an empty folder. Choose another folder, or remove it.")
        from orchestrator.evaluate_export import export as run_export

        raise typer.Exit(run_export(run_folder.absolute(), out.absolute()))


@app.command()
def track(run_folder: RunFolder) -> None:
    """Send to MLflow the items that a run has not sent."""
    with _exit_codes():
        _need_folder(run_folder)
        from orchestrator.tracking.tracker import flush_spool

        try:
            status = flush_spool(run_folder)
        except FileNotFoundError as error:
            _refuse(str(error))
            return
        typer.echo(
            f"MLflow run {status.run_id} at {status.uri}: {status.waiting} items wait to be sent, "
            f"{status.refused} were refused."
        )
        if status.waiting:
            _say("error", status.error or "the time was over before all items were sent. Run this command again.")
            raise typer.Exit(1)


@app.command()
def report(run_folder: RunFolder) -> None:
    """Write the report of a run: report.html, summary.json and plots/."""
    with _exit_codes():
        _need_folder(run_folder)
        from orchestrator.report.page import write_report

        typer.echo(write_report(run_folder.absolute()))


@app.command(context_settings=_DASHED_OVERRIDES)
def check(recipe: Recipe, overrides: Overrides = None) -> None:
    """Check a recipe and print what it would run, without starting anything."""
    with _exit_codes():
        from orchestrator.preflight.plan_table import plan_rows

        kind = kind_of_recipe(recipe)
        config = _load(kind, recipe, overrides)
        table = Table(title=f"{recipe}", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, value in plan_rows(config):
            table.add_row(name, escape(value))
        Console(width=None if sys.stdout.isatty() else 120).print(table)
        _check(kind, config, resume=_has_checkpoint(config))
        typer.echo("Ready to run.")


@app.command(name="config")
def show_config(
    prefix: Annotated[str, typer.Argument(help="List only keys that start with this.", show_default=False)] = "",
    command: Annotated[str, typer.Option("--kind", help=f"Kind of run: {', '.join(_KINDS)}.")] = _KINDS[0],
) -> None:
    """List every setting with its meaning, its allowed values and its default."""
    with _exit_codes():
        from orchestrator.config.setting_list import default_text, settings

        try:
            kind = kind_named(command)
        except UnknownKindError as error:
            _refuse(f"--kind: {error}")
        found = [setting for setting in settings(kind.schema()) if setting.key.startswith(prefix)]
        if not found:
            _refuse(f"no setting of `counterpoint {kind.command}` starts with {prefix}. Leave it out to list all.")
        for setting in found:
            default = "required" if setting.is_required else f"default {default_text(setting.default)}"
            typer.echo(f"{setting.key}\n    {setting.description} ({setting.allowed}; {default})")


def _load(kind: RunKind, recipe: Path, overrides: list[str] | None) -> Any:
    """The configuration of a recipe, by the schema of a run kind."""
    from orchestrator.config.loading import load_config

    return load_config(recipe, overrides or (), kind.schema())


def _check(kind: RunKind, config: Config | SFTConfig, *, resume: bool = False, starts_run: bool = True) -> None:
    """Print what the run kind's checks find; exit with 2 where an error is among it."""
    found = kind.checks()(config, resume=resume, starts_run=starts_run)
    for finding in found:
        _say(finding.severity, finding.message)
    if any(finding.severity == "error" for finding in found):
        raise typer.Exit(BAD_INPUT)


def _has_checkpoint(config: Config | SFTConfig) -> bool:
    from orchestrator.checkpoints import Checkpoints

    return Checkpoints(config.run.folder, keep=config.checkpoint.keep).latest() is not None


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
    """Turn the error that ended a command into one message and the exit code of its kind."""
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
