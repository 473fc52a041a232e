"""fp16's loss scale: small gradients are lifted above fp16's smallest number, and the lift adapts itself."""

from collections.abc import Mapping
from typing import final

_FIRST_SCALE = 2.0**16
_GROWTH_INTERVAL_STEPS = 2000
_SMALLEST_SCALE = 1.0


@final
class LossScale:
    """A power of two, halved at an overflow and doubled after 2000 steps without one; 1 where the precision needs none.

    Source: Micikevicius et al. 2017, arXiv:1710.03740, section 3.2; constants as in torch.amp.GradScaler, backoff 0.5."""

    def __init__(self, *, enabled: bool) -> None:
        self.enabled = enabled
        self.value = _FIRST_SCALE if enabled else 1.0
        self.good_steps = 0

    def update(self, *, overflow: bool) -> None:
        """Adapt after a step."""
        if not self.enabled:
            return
        self.good_steps = 0 if overflow else self.good_steps + 1
        if overflow:
            self.value = max(_SMALLEST_SCALE, self.value / 2)
        elif self.good_steps == _GROWTH_INTERVAL_STEPS:
            self.value, self.good_steps = self.value * 2, 0

    def to_json(self) -> Mapping[str, float]:
        """For the checkpoint's manifest."""
        return {"value": self.value, "good_steps": self.good_steps} if self.enabled else {}

    def restore(self, saved: Mapping[str, float]) -> None:
        """Go on from `to_json`; one of a run without a scale changes nothing."""
        if self.enabled and saved:
            self.value, self.good_steps = float(saved["value"]), int(saved["good_steps"])
