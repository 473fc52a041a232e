"""A chain of halvings: each stage an ordinary run, the ranks kept alive from one to the next."""

import logging
from pathlib import Path

from trainer.chain import read_chain
from trainer.exit_codes import DONE
from trainer.options import Options, flag, optional_text
from trainer.stop import StopRequest
from trainer.train import train
from trainer.watch import Watch

logger = logging.getLogger(__name__)


def distill_job(path: Path, options: Options, stop: StopRequest, watch: Watch) -> int:
    """Run the stages that the chain in `path` trains, in order; a finished one takes no time. Returns the exit code. Collective."""
    stages = read_chain(path)
    for stage in stages:
        if not stage.trained_here:
            continue
        code = train(
            stage.run_dir, stop, watch, previous_end=optional_text(options, "previous_end"), allow_fresh=flag(options, "allow_fresh")
        )
        if code != DONE:
            return code
        logger.info("%s is done: %d steps", stage.name, stage.steps)
    logger.info("%s: all are done; draw with the last one: halfstep sample %s --steps %d", path, path, stages[-1].steps)
    return DONE
