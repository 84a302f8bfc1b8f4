"""What training says of its steps: checked, logged and reported."""

import time
from collections.abc import Mapping, Sequence

import jax

from bpt_rl.run.open_runs import OpenRun, Progress, means
from bpt_rl.run.seed_axis import numbers


class Ledger:
    """Checks, logs and reports steps in order, one behind the device, which so never waits for the host."""

    def __init__(self, runs: Sequence[OpenRun], tokens: int, report_progress: Progress | None) -> None:
        """Starts the clock.

        Args:
          runs: Trained together; each takes a line every `log_every` steps.
          tokens: Of a gradient step of one of them.
          report_progress: Told of every step.
        """
        self._runs = runs
        self._tokens = tokens
        self._report_progress = report_progress
        self._pending: list[tuple[int, dict[str, jax.Array]]] = []
        self._began, self._steps_since = time.perf_counter(), 0

    def add(self, step: int, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of a step that may still be running; settles those before it."""
        self.settle()
        self._pending = [(step, metrics)]

    def settle(self) -> None:
        """Waits for the metrics taken; checks, logs and reports them.

        Raises:
          FloatingPointError: If one is not finite.
        """
        for step, metrics in self._pending:
            values = numbers(metrics, len(self._runs))
            self._check_finite(step, values)
            self._steps_since += 1
            config = self._runs[0].config
            speed: dict[str, float] = {}
            if step % config.log_every == 0 or step == config.optimizer.num_steps:
                speed = {"tokens": float(step * self._tokens), "tokens_per_second": self._speed()}
                for run, own in zip(self._runs, values, strict=True):
                    run.log({"step": step, **own, **speed})
            if self._report_progress:
                self._report_progress(step, config.optimizer.num_steps, means(values) | speed)
        self._pending = []

    def _speed(self) -> float:
        now = time.perf_counter()
        speed = self._steps_since * self._tokens / (now - self._began)
        self._began, self._steps_since = now, 0
        return speed

    def _check_finite(self, step: int, values: Sequence[Mapping[str, float]]) -> None:
        for run, own in zip(self._runs, values, strict=True):
            if bad := run.first_bad(own):
                raise FloatingPointError(
                    f"Loss, gradient and parameters must stay finite; got {bad} at step {step}, batch index "
                    f"{step - 1}. Last good checkpoint: {run.last_good}. Lower optimizer.learning_rate or check the "
                    "data with `bpt-rl data verify`."
                )
