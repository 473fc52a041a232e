"""Steps whose numbers are bad: what is written down of them, which are left out, and when there were too many."""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, final

from data_shards import ranks
from data_shards.files import replace_file
from trainer.engines.engine import NumericError, StepResult

_WARM_UP_STEPS = 20
_SHARE_OF_NEW_LOSS = 0.02

Action = Literal["stop", "skip", "roll_back"]


class RollBack(RuntimeError):
    """The run goes on from its newest checkpoint, without the step that was bad."""


@final
class LossAverage:
    """Moving average of the loss, against which a spike is seen: a pure function of the losses so far, kept in checkpoints."""

    def __init__(self, *, spike_factor: float | None, saved: object = None) -> None:
        """saved: what `to_json` gave; None at a run's start."""
        self.spike_factor, self.value, self.steps = spike_factor, 0.0, 0
        match saved:
            case {"value": str(value), "steps": int(steps)}:
                self.value, self.steps = float.fromhex(value), steps

    @property
    def limit(self) -> float | None:
        """The largest loss that is no spike; None while there is no average yet, or no spike is looked for."""
        return self.spike_factor * self.value if self.spike_factor is not None and self.steps >= _WARM_UP_STEPS else None

    def add(self, loss: float) -> None:
        """Count the loss of a good step."""
        self.value = loss if self.steps == 0 else self.value + _SHARE_OF_NEW_LOSS * (loss - self.value)
        self.steps += 1

    def to_json(self) -> dict[str, object]:
        """For the checkpoint's manifest: exact."""
        return {"value": self.value.hex(), "steps": self.steps}


@final
class BadSteps:
    """RUN_DIR/bad_steps.jsonl: each bad step with its samples, and the policy that follows. Every method is collective."""

    def __init__(self, run_dir: Path, *, start_step: int, action: Action, budget: int) -> None:
        """start_step: skipped steps from there on are judged anew; those that a roll-back leaves out stay left out."""
        self.path, self.action, self.budget = run_dir / "bad_steps.jsonl", action, budget
        text = self.path.read_text() if self.path.exists() else ""
        # A last line that was only half written is of a step whose policy was not carried out.
        lines = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if line["action"] == "roll_back" or (line["action"] == "skip" and line["step"] < start_step)]
        self.left_out = frozenset(line["step"] for line in kept if line["action"] == "roll_back")
        self.count = len({line["step"] for line in kept})
        ranks.barrier()  # all have read before one writes
        kept_text = "".join(json.dumps(line) + "\n" for line in kept)
        if ranks.is_rank_0() and text != kept_text:
            replace_file(self.path, kept_text)

    def add(self, step: int, result: StepResult, *, loss_limit: float | None, keys: Mapping[int, Sequence[str]]) -> None:
        """Write down a bad step and do what the policy says. keys: of this rank's samples by micro-batch.

        Raises: NumericError where the policy is to stop, or more steps were bad than the budget allows; RollBack."""
        bad = [index for index, loss in enumerate(result.losses) if loss - loss != 0]
        if bad:
            what = f"the loss of micro-batches {bad} is not finite"
        elif loss_limit is not None and result.loss > loss_limit:
            bad = list(range(len(result.losses)))
            what = f"the loss {result.loss:.4g} is above {loss_limit:.4g}, numeric.spike_factor times its average"
        else:
            bad = list(range(len(result.losses)))
            what = "the gradient is not finite (all losses are)"
        own = {index: list(keys[index]) for index in bad if index in keys}
        gathered = [json.loads(text) for text in ranks.all_gather_text(json.dumps(own))]
        samples = {index: names for entry in gathered for index, names in entry.items()}
        self.count += 1
        spent = self.action != "stop" and self.count > self.budget
        if ranks.is_rank_0():
            line = {"step": step, "action": "stop" if spent else self.action, "reason": what, "samples": samples}
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
        message = f"step {step}: {what}; no weight was changed. Samples by micro-batch: {_shown(samples)} (all in {self.path})"
        if spent:
            raise NumericError(f"{message}. {self.count} steps were bad, numeric.max_bad_steps allows {self.budget}")
        match self.action:
            case "stop":
                raise NumericError(
                    f"{message}. Look at the samples; numeric.on_bad_step=skip in a new --run-dir leaves such steps out, a lower "
                    "optim.learning_rate or engine.precision=fp32 may avoid them"
                )
            case "roll_back":
                raise RollBack(message)
            case "skip":
                return


def _shown(samples: Mapping[str, Sequence[str]]) -> str:
    """Samples for people: a few names each."""
    return "; ".join(f"{index}: {', '.join(names[:4])}{', ...' if len(names) > 4 else ''}" for index, names in list(samples.items())[:4])
