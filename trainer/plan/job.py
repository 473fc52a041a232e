"""The job behind `halfstep plan`."""

import json
import logging
import sys
from pathlib import Path

from data_shards import ranks
from trainer.config_io import load_recipe
from trainer.exit_codes import DONE
from trainer.options import Options, flag, integer, optional_text
from trainer.plan.from_recipe import plan_input
from trainer.plan.gpus import load_prices
from trainer.plan.page import as_json, page
from trainer.plan.plan import make_plan
from trainer.plan.ways_out import ways_out

logger = logging.getLogger(__name__)


def plan_job(recipe: Path, options: Options) -> int:
    """Write the plan of a recipe to standard output.

    Options: overrides (of the recipe), world_size, ranks_per_node, on_gpu, gpu, json, title.
    Raises: ValueError as make_plan and plan_input do."""
    ranks.destroy_process_group()  # the plan's own ranks are fake
    overrides = options.get("overrides")
    assert isinstance(overrides, list), "overrides are a list of texts"
    config = load_recipe(recipe, overrides)
    source = plan_input(
        config,
        world_size=integer(options, "world_size", 1),
        ranks_per_node=integer(options, "ranks_per_node", 1),
        on_gpu=flag(options, "on_gpu"),
    )
    prices = load_prices()
    logger.info(
        "measuring a step of rank 0 of %d on tensors without memory; a network of 900M weights takes half a minute", source.world_size
    )
    plan = make_plan(source, prices, optional_text(options, "gpu"))
    ways = ways_out(plan, prices) if plan.fits is False else []
    if flag(options, "json"):
        sys.stdout.write(json.dumps(as_json(plan, prices, ways), indent=2) + "\n")
    else:
        sys.stdout.write(page(plan, prices, ways, title=optional_text(options, "title") or recipe.stem))
    return DONE
