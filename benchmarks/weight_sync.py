"""Measures the transfer of a policy version from the trainer to the generators, each route against its own limit.

    python benchmarks/weight_sync.py                              all cases: 1 GiB, both dtypes, about 15 minutes
    python benchmarks/weight_sync.py --only tcp --dtype bfloat16  one case
    python benchmarks/weight_sync.py --gib 0.1 --repeats 3        smaller

Cases: shared-memory, tcp, fleet, alternatives, delta, memory, engine, demo. Trainer and generators are
separate processes. Limits are measured in the same run, in turns with the measured route, so that noise affects both
alike; figures are medians after two warm-up rounds. Every word of the weights is new in each round, so that nothing is
skipped as unchanged; only the delta case changes fewer. A ratio with a lower bound is one of rates, a ratio with an
upper bound one of seconds or bytes. The exit status is 1 where a ratio misses its bound.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from weight_sync_engine import demo_case, engine_case
from weight_sync_memory import memory_case
from weight_sync_processes import Row, Workload
from weight_sync_transfer import alternatives_case, delta_case, fleet_case, shared_memory_case, tcp_case

CASES = ("shared-memory", "tcp", "fleet", "alternatives", "delta", "memory", "engine", "demo")
DTYPES = ("bfloat16", "float32")
GIB, MIB, GB = 1 << 30, 1 << 20, 1e9
MIN_COLUMNS = 170
"""Of the table, also where the output is no terminal."""


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=1.0, help="size of the model")
    parser.add_argument("--engine-gib", type=float, default=1.0, help="size of the engine's model")
    parser.add_argument("--repeats", type=int, default=5, help="the median counts")
    parser.add_argument("--versions", type=int, default=30, help="of the demo")
    parser.add_argument("--dtype", choices=DTYPES, action="append", help="by default both")
    parser.add_argument("--only", choices=CASES, action="append", metavar="CASE", help="by default all")
    parser.add_argument("--generators", type=int, default=8, help="of the fleet")
    parser.add_argument("--bucket-mib", type=int, default=8)
    parser.add_argument("--link-gb", type=float, default=1.0, help="gigabytes a second of the delta's slow link")
    parser.add_argument("--folder", type=Path, help="for files of safetensors; by default a temporary one")
    parser.add_argument("--out", type=Path, help="where to write the figures as JSON")
    return parser.parse_args(given)


def measure(options: argparse.Namespace) -> Iterator[Row]:
    """Yields the rows of every selected case."""
    bucket_bytes, repeats = options.bucket_mib * MIB, options.repeats
    wanted = options.only or CASES
    for dtype in options.dtype or DTYPES:
        workload = Workload(int(options.gib * GIB), dtype, bucket_bytes)
        engine_workload = replace(workload, nbytes=int(options.engine_gib * GIB))
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            cases: dict[str, Callable[[], list[Row]]] = {
                "shared-memory": partial(shared_memory_case, workload, repeats),
                "tcp": partial(tcp_case, workload, repeats),
                "fleet": partial(fleet_case, workload, repeats, options.generators),
                "alternatives": partial(alternatives_case, workload, repeats, Path(folder)),
                "delta": partial(delta_case, workload, repeats, options.link_gb * GB),
                "memory": partial(memory_case, workload, repeats),
                "engine": partial(engine_case, engine_workload, repeats),
            }
            for name, case in cases.items():
                if name in wanted:
                    yield from case()
    if "demo" in wanted:
        yield from demo_case(options.versions)


def show(options: argparse.Namespace, rows: list[Row], console: Console) -> None:
    table = Table(
        title=f"{options.gib:g} GiB in buckets of {options.bucket_mib} MiB, median of {options.repeats}",
        title_justify="left",
    )
    for column in ("case", "seconds", "GB/s", "limit", "ratio", "wanted", "met"):
        table.add_column(column, justify="left" if column in ("case", "limit") else "right")
    for row in rows:
        rate = "" if row.nbytes is None or row.seconds is None else f"{row.nbytes / row.seconds / GB:.2f}"
        seconds = "" if row.seconds is None else f"{row.seconds:.4f}"
        ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
        met = {None: "", True: "yes", False: "no"}[row.is_met]
        table.add_row(row.case, seconds, rate, row.limit, ratio, wanted(row), met)
    console.print(table)


def wanted(row: Row) -> str:
    """The bound of the ratio, for the table."""
    if row.at_least is not None:
        return f">= {row.at_least:g}"
    return "" if row.at_most is None else f"<= {row.at_most:g}"


def main(words: list[str] | None = None) -> int:
    options = arguments(words)
    rows = []
    for row in measure(options):
        rows.append(row)
        told = [f"{row.seconds:.4f} s"] if row.seconds is not None else []
        told += [f"ratio {row.ratio:.3f}"] if row.ratio is not None else []
        print(f"{row.case}: {', '.join(told)}", flush=True)
    show(options, rows, Console(width=max(Console().width, MIN_COLUMNS)))
    if options.out:
        options.out.write_text(json.dumps([asdict(row) | {"is_met": row.is_met} for row in rows], indent=2) + "\n")
    missed = [row for row in rows if row.is_met is False]
    for row in missed:
        print(f"missed: {row.case}: {row.ratio:.3f} (wanted {wanted(row)})")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
