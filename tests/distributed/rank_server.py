"""One rank of a pool: joins the others, then runs the jobs that stand on its stdin, a JSON object a line, until it ends."""

import gc
import json
import logging
import os
import sys
import traceback
from importlib import import_module
from typing import TextIO

from data_shards import ranks

TIMEOUT_SECONDS = 150.0
"""Of a collective; the pool's own limits come first."""


def main() -> None:
    """`python -m tests.distributed.rank_server`, with torch's standard variables and HALFSTEP_ANSWERS_FD in the environment."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    jobs, answers = _pipes()
    ranks.init_process_group(timeout_seconds=TIMEOUT_SECONDS)
    _answer(answers, {"value": "ready"})
    for line in jobs:
        _answer(answers, _result(line))
        gc.collect()  # engines hold buffers in reference cycles
    sys.stdout.flush()
    sys.stderr.flush()
    # All ranks leave at once; threads of gloo may abort while the interpreter tears down.
    os._exit(0)


def _pipes() -> tuple[TextIO, TextIO]:
    """The pipes of jobs and answers, out of reach of the processes that libraries start."""
    jobs = os.fdopen(os.dup(0), encoding="utf-8")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    number = int(os.environ.pop("HALFSTEP_ANSWERS_FD"))
    os.set_inheritable(number, False)
    return jobs, os.fdopen(number, "w", encoding="utf-8")


def _result(line: str) -> dict[str, object]:
    """What a job returned, or the traceback of what it raised."""
    request = json.loads(line)
    module, function = request["job"].split(":")
    logging.info("job %s %s", request["job"], request["arguments"])
    try:
        if not module.startswith("tests."):
            raise ValueError(f"{module}: only functions of the tests are run")
        return {"value": getattr(import_module(module), function)(**request["arguments"])}
    except Exception:
        return {"error": f"rank {ranks.rank()}:\n{traceback.format_exc()}"}


def _answer(answers: TextIO, result: dict[str, object]) -> None:
    answers.write(json.dumps(result) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
