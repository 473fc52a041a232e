"""Imported by Python itself where this folder is on PYTHONPATH: notes wall and CPU time after every optimizer step of a rank.

HALFSTEP_STEP_CLOCK names the file that rank 0 writes: a line a step, `wall_seconds cpu_seconds threads` of its process. After
HALFSTEP_STEP_CLOCK_STEPS steps a rank is gone at once: what comes after the steps is not measured."""

import os
import time

if os.environ.get("HALFSTEP_STEP_CLOCK") and "RANK" in os.environ:
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    _lines: list[str] = []

    def _note(*step: object) -> None:
        _lines.append(f"{time.perf_counter()} {time.process_time()} {torch.get_num_threads()}\n")
        if len(_lines) == int(os.environ["HALFSTEP_STEP_CLOCK_STEPS"]):
            if os.environ["RANK"] == "0":
                with open(os.environ["HALFSTEP_STEP_CLOCK"], "w", encoding="utf-8") as file:
                    file.writelines(_lines)
            os._exit(0)

    register_optimizer_step_post_hook(_note)
