"""Schedules: functions of the training step, which is 0 for the first one."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from torch import Tensor

from pyro_vae.arguments import check_count, check_number, checked

__all__ = ["Schedule", "cyclical", "linear", "value_at"]

Schedule = Callable[[int], float]


@checked
def linear(num_steps: int, start: float = 0.0, stop: float = 1.0) -> Schedule:
    """A schedule that goes from `start` to `stop` in `num_steps` steps and then stays there.

    Example:
        >>> [linear(4)(step) for step in (0, 1, 4, 9)]
        [0.0, 0.25, 1.0, 1.0]
    """
    check_count("linear: num_steps", num_steps)
    start, stop = check_number("linear: start", start), check_number("linear: stop", stop)
    return lambda step: start + (stop - start) * min(1.0, step / num_steps)


@checked
def cyclical(period: int, start: float = 0.0, stop: float = 1.0, *, rising: float = 0.5) -> Schedule:
    """A schedule of periods: it goes from `start` to `stop` in the share `rising` of each, and then stays there.

    References:
        Fu et al. (2019), Cyclical Annealing Schedule: A Simple Approach to Mitigating KL Vanishing.

    Example:
        >>> [cyclical(4)(step) for step in range(6)]
        [0.0, 0.5, 1.0, 1.0, 0.0, 0.5]
    """
    start, stop = check_number("cyclical: start", start), check_number("cyclical: stop", stop)
    return lambda step: start + (stop - start) * min(1.0, step % period / (rising * period))


def value_at(owner: str, name: str, schedule: float | Schedule, step: int) -> float:
    """The value of a number or schedule at a step, which must be finite and not negative. Errors say whose it is."""
    value = schedule(step) if callable(schedule) else schedule
    number = float(value) if isinstance(value, Tensor) and value.dim() == 0 else value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        check_number(owner, number, what=f"a finite {name} >= 0")
    if not 0 <= number < inf:
        raise ValueError(f"{owner}: expected a finite {name} >= 0, got {float(number)} at step {step}. Try 1.0.")
    return float(number)
