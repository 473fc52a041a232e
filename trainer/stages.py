"""Which noise levels a student keeps of its teacher's, and the stages of a chain of halvings; free of torch."""

from collections.abc import Sequence


def halve(timesteps: Sequence[int]) -> tuple[int, ...]:
    """Every second of a teacher's ascending timesteps, counted from the noisy end: the student's, ascending too.

    Raises: ValueError if the teacher has fewer than two.
    Source: Salimans & Ho 2022, arXiv:2202.00512, Algorithm 2; for odd counts see `halving_counts`."""
    if len(timesteps) < 2:
        raise ValueError(f"a teacher of {len(timesteps)} steps cannot be halved; wanted at least 2")
    return tuple(timesteps[::-2][::-1])


def keep(timesteps: Sequence[int], student_steps: int) -> tuple[int, ...]:
    """The ascending timesteps that a student of `student_steps` keeps: all of them, or those of one or more halvings.

    Raises: ValueError if no halving of so many has so few."""
    for _ in range(halvings(len(timesteps), student_steps)):
        timesteps = halve(timesteps)
    return tuple(timesteps)


def halvings(teacher_steps: int, student_steps: int) -> int:
    """How often the steps of a teacher are halved to be its student's: 0 for the same steps, 1 for a half, 2 for a quarter.

    Raises: ValueError if no number of halvings leads there, naming the counts that there are."""
    return len(halving_counts(teacher_steps, student_steps)) - 1


def halving_counts(start: int, end: int) -> tuple[int, ...]:
    """Step counts from the teacher's `start` down to `end`: each half of the one before, rounded up.

    Of an odd count the student's last, least noisy step covers one teacher step.
    Raises: ValueError if no halving of `start` has `end` steps, naming the counts that there are."""
    if start < 1:
        raise ValueError(f"{start} sampling steps cannot be halved; wanted at least 1")
    counts = [start]
    while counts[-1] > 1:
        counts.append((counts[-1] + 1) // 2)
    if end not in counts:
        raise ValueError(f"halving {start} steps never gives {end}; wanted one of {', '.join(map(str, counts))}")
    return tuple(counts[: counts.index(end) + 1])


def grid(schedule_steps: int, sampling_steps: int) -> tuple[int, ...]:
    """The original timesteps, ascending, at which a model of `schedule_steps` noise levels is sampled in `sampling_steps`.

    A count of the halving sequence takes its student's levels, t = T - 1 - k * 2^j; any other one evenly spaced levels that
    end with the noisiest ("trailing", Lin et al. 2023, arXiv:2305.08891, table 2).
    Raises: ValueError unless 1 <= sampling_steps <= schedule_steps."""
    if not 1 <= sampling_steps <= schedule_steps:
        raise ValueError(f"{sampling_steps} sampling steps on a noise schedule of {schedule_steps} levels; wanted 1 to {schedule_steps}")
    stride = 1
    while (levels := -(-schedule_steps // stride)) > sampling_steps:
        stride *= 2
    if levels == sampling_steps:
        return tuple(range(schedule_steps - 1, -1, -stride))[::-1]
    return tuple(round(schedule_steps * (k + 1) / sampling_steps) - 1 for k in range(sampling_steps))


def trailing(schedule_steps: int, sampling_steps: int) -> tuple[int, ...]:
    """The original timesteps, ascending, of stock samplers with trailing spacing, where the steps divide the levels.

    Source: Lin et al. 2023, arXiv:2305.08891, table 2."""
    assert schedule_steps % sampling_steps == 0, f"{sampling_steps} steps do not divide {schedule_steps} levels"
    stride = schedule_steps // sampling_steps
    return tuple(range(stride - 1, schedule_steps, stride))


def stage_name(index: int, steps: int) -> str:
    """The directory of a chain's stage: stage 0 is the teacher, stage `index` the student of `steps` steps."""
    return f"stage_{index:02d}_{steps:04d}_steps"
