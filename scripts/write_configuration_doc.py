"""Writes docs/configuration.md from the schema. With --check, it compares the two and fails where they differ."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from orchestrator.config.schema import Config, SFTConfig
from orchestrator.config.setting_list import Schema, Setting, default_text, section, settings

TARGET = Path(__file__).parent.parent / "docs" / "configuration.md"

INTRODUCTION = """# Configuration

Written by `scripts/write_configuration_doc.py` from the schema; don't edit.

A run is described by a recipe, a YAML file (`recipes/`), and by overrides on the command line:

    counterpoint train recipes/digits.yaml trainer.learning_rate=3e-4 rollout.max_staleness=1

- A key that isn't in these tables, a value of another type, or settings that can't work together are refused before
  anything starts, all problems at once. `counterpoint check RECIPE` checks and starts nothing.
- Values of overrides are YAML. An entry of a list is reached by its index (`reward.components.0.weight=2`), or the
  whole list is given (`trainer.betas=[0.9, 0.99]`). `evaluation={}` puts a section back to its defaults.
- YAML is read by the core schema of YAML 1.2: `3e-4` is a number, and only `true` and `false` are truth values. A
  value is never converted: `"10"` is not a number.
- **Paths** are relative to where they are written: in a recipe to the recipe's folder, on the command line to the
  working directory. What a run writes (marked *output*) is always relative to the working directory.
- The resolved configuration, all paths absolute, is saved with the run and loads back as a recipe.
- `counterpoint config [KEY]` lists the same settings in the terminal.
"""


def document() -> str:
    """The whole document."""
    parts = [
        INTRODUCTION,
        "## Training\n\nSettings of `counterpoint train` and `counterpoint evaluate`.\n",
        *_sections(Config, Config),
        "## Supervised fine-tuning\n",
        "`counterpoint sft` has the sections above named "
        + ", ".join(_shared(name) for name in SFTConfig.model_fields if name in Config.model_fields)
        + ", and:\n",
        *(part for name, part in _by_section(SFTConfig) if name not in Config.model_fields),
    ]
    return "\n".join(parts)


def _sections(schema: Schema, known: Schema) -> list[str]:
    return [part for name, part in _by_section(schema) if name in known.model_fields]


def _shared(name: str) -> str:
    """A section that both schemas have; its settings are named where the supervised one has only some of them."""
    supervised, trained = (section(schema.model_fields[name].annotation) for schema in (SFTConfig, Config))
    if supervised is None or trained is None or supervised.model_fields.keys() == trained.model_fields.keys():
        return f"`{name}`"
    return f"`{name}` (only {', '.join(f'`{each}`' for each in supervised.model_fields)})"


def _by_section(schema: Schema) -> list[tuple[str, str]]:
    found = []
    for name, field in schema.model_fields.items():
        inner = section(field.annotation)
        rows = "\n".join(_row(setting) for setting in settings(schema) if setting.key.split(".")[0] == name)
        about = " ".join((inner.__doc__ or "").split()) if inner else ""
        table = f"| Setting | Allowed | Default | |\n|---|---|---|---|\n{rows}\n"
        found.append((name, f"### {name}\n\n{about}\n\n{table}"))
    return found


def _row(setting: Setting) -> str:
    default = "**required**" if setting.is_required else f"`{default_text(setting.default) or '(empty)'}`"
    path = " *Output.*" if setting.path == "output" else ""
    return f"| `{setting.key}` | {setting.allowed} | {default} | {setting.description}{path} |"


def main() -> int:
    """Write the document, or compare it with the file; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the file is current")
    made = document()
    if not parser.parse_args().check:
        TARGET.parent.mkdir(exist_ok=True)
        TARGET.write_text(made, encoding="utf-8")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == made:
        return 0
    print(f"{TARGET} is not current: run python scripts/write_configuration_doc.py", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
