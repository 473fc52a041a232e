"""How far the losses of every objective, engine and number of ranks lie from those of one process, as a table.

    .venv/bin/python -m benchmarks.engine_grid [--docs]        about 5 minutes on 2 cores

Run as a module from the repository's root: the cases are those of tests/distributed/test_engine_grid.py."""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from benchmarks.measure import machine, put_table
from tests.distributed.grid import CASES, ENGINES, OBJECTIVES, RANKS, STEPS, TOLERANCE, Case, Grid
from tests.distributed.pool import Pools

DOCS = Path(__file__).parents[1] / "docs" / "engines.md"


def main() -> None:
    """Print the table, and with --docs put it into docs/engines.md; exit code 1 if a case is off."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", action="store_true", help=f"put the table into {DOCS.name} too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        differences = measure(Path(folder))
    lines = list(table(differences))
    sys.stdout.write("\n".join(lines) + "\n")
    if options.docs:
        put_table(DOCS, "engine grid", lines)
    if max(differences.values()) > TOLERANCE:
        sys.exit(f"error: a loss is off by more than {TOLERANCE:.0e}")


def measure(folder: Path) -> dict[Case, float]:
    """Largest relative difference of each case's losses from the one-process reference's."""
    pools = Pools(logs=folder / "logs")
    grid, differences = Grid(folder, pools), {}
    try:
        for number, case in enumerate(CASES, start=1):
            differences[case] = grid.difference(*case)
            sys.stderr.write(f"{number}/{len(CASES)} {' '.join(map(str, case))}: {differences[case]:.1e}\n")
    finally:
        pools.close()
    return differences


def table(differences: Mapping[Case, float]) -> Iterator[str]:
    """Lines of Markdown; the case without a number is the reference itself."""
    heads = (f"{ranks} rank{'s' if ranks > 1 else ''}" for ranks in RANKS)
    yield f"| objective | engine | {' | '.join(heads)} |"
    yield "| --- | --- |" + " --- |" * len(RANKS)
    for objective in OBJECTIVES:
        for engine in ENGINES:
            cells = (differences.get((objective, engine, ranks)) for ranks in RANKS)
            yield f"| {objective} | {engine} | {' | '.join('reference' if cell is None else f'{cell:.1e}' for cell in cells)} |"
    yield ""
    yield f"Largest relative difference among {STEPS} losses; {machine()}, gloo, fp32."


if __name__ == "__main__":
    main()
