"""A trajectory model that was trained on windows of one trajectory, acting on the last window of its episode."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Bool, Float, Int

from bpt_rl.datasets.chains import Chain, completions
from bpt_rl.nn.context_steps import empty_steps
from bpt_rl.nn.hashed_graph import HashedGraph, flat_module
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.trajectory_model import ActionDistribution, TrajectoryModel
from bpt_rl.types import PackedBatch


class WindowedCarry(NamedTuple):
    """The last steps of the present episode of B environments, the newest in the last filled place."""

    window: PackedBatch
    """Raw units; filled from the left, then shifted."""
    num_filled: Int[np.ndarray, "B"]
    step: Int[np.ndarray, "B"]
    return_to_go: Float[np.ndarray, "B"]
    num_calls: int
    """Actions taken since the start; each draws its own noise."""


@functools.partial(jax.jit, static_argnums=0)
def _last_action(
    graph: HashedGraph,
    params: Any,
    window: PackedBatch,
    last: jax.Array,
    key: tuple[jax.Array, Any] | None,
) -> jax.Array:
    predicted = graph.merge(params)(window)
    action = ActionDistribution(
        *(jnp.take_along_axis(x, last[:, None, None], axis=1)[:, 0] for x in predicted)
    )
    # Folded in here: by itself it would be two calls more.
    return action.chosen(None if key is None else jax.random.fold_in(*key))


class WindowedPolicy:
    """Recomputes the whole window at every step, as training saw it: positions start anew with each window.

    A cache would not do: its keys and values would know of steps that have left the window.
    """

    def __init__(
        self,
        graph: nnx.GraphDef[TrajectoryModel],
        params: Any,
        normalizer: Normalizer,
        *,
        window: int,
        completion: str,
        sample_seed: int | None = None,
    ) -> None:
        """Binds parameters to a policy.

        Args:
          graph: Of a `TrajectoryModel`.
          params: Its parameters.
          normalizer: Of its training data.
          window: Steps of the context, as in training.
          completion: `per_episode` or `per_step`, as in training.
          sample_seed: Draw actions from the Gaussian head; their mean if None.
        """
        self._key = None if sample_seed is None else jax.random.key(sample_seed)
        self._graph, self._params = flat_module(graph, params)
        self._normalizer = normalizer
        self._num_steps = window
        self._completion = completion
        self._model = nnx.merge(graph, params)

    def start(self, num_environments: int, context: Sequence[Chain] | None = None) -> WindowedCarry:
        """Returns the carry of empty windows.

        Raises:
          ValueError: If there is a context: training never showed another episode.
        """
        if context is not None:
            raise ValueError(
                "Trajectories can be given as context to a model of whole episodes only; got some for one that was "
                f"trained on windows of {self._num_steps} steps. Evaluate it without, or train with window 0."
            )
        window = empty_steps(
            num_environments,
            self._num_steps,
            observation_dim=len(self._normalizer.observation_mean),
            action_dim=self._model.action_dim,
        )
        start = np.zeros(num_environments, np.int32)
        return WindowedCarry(
            window=window,
            num_filled=start,
            step=start,
            return_to_go=np.zeros(num_environments),
            num_calls=0,
        )

    def act(
        self,
        carry: WindowedCarry,
        observation: Float[np.ndarray, "B O"],
        return_to_go: Float[np.ndarray, "B"],
    ) -> tuple[WindowedCarry, Float[np.ndarray, "B A"]]:
        """Returns the next carry and the action: mean or sample.

        Raises:
          ValueError: If an episode is longer than any of the data.
        """
        self._model.check_steps(carry.step)
        is_full = carry.num_filled == self._num_steps
        last = np.where(is_full, self._num_steps - 1, carry.num_filled)
        asked = np.asarray(return_to_go, np.float64)
        fields = {name: _shifted(values, is_full) for name, values in carry.window._asdict().items()}
        rows = np.arange(len(last))
        now = {"observation": observation, "return_to_go": asked, "step": carry.step, "segment_ids": 1}
        for name, value in now.items():
            fields[name][rows, last] = value
        window = PackedBatch(**fields)
        key = None if self._key is None else (self._key, carry.num_calls)
        action = np.asarray(_last_action(self._graph, self._params, self._normalizer(window), last, key))
        window.action[rows, last] = action
        carry = carry._replace(
            window=window, num_filled=last + 1, return_to_go=asked, num_calls=carry.num_calls + 1
        )
        return carry, action

    def observe(
        self, carry: WindowedCarry, reward: Float[np.ndarray, "B"], done: Bool[np.ndarray, "B"]
    ) -> WindowedCarry:
        """Returns the carry after a step's reward; an episode's end empties its window."""
        reached = completions(
            carry.return_to_go,
            reward,
            done,
            scale=self._normalizer.return_scale,
            completion=self._completion,
        )
        fields = {name: values.copy() for name, values in carry.window._asdict().items()}
        place = (np.arange(len(done)), carry.num_filled - 1)
        fields["reward"][place] = reward
        fields["completion"][place] = reached
        for values in fields.values():
            values[done] = 0
        num_filled = np.where(done, 0, carry.num_filled).astype(np.int32)
        step = np.where(done, 0, carry.step + 1).astype(np.int32)
        return carry._replace(window=PackedBatch(**fields), num_filled=num_filled, step=step)


def _shifted(values: Any, is_full: Bool[np.ndarray, "B"]) -> np.ndarray:
    moved = np.concatenate([values[:, 1:], np.zeros_like(values[:, :1])], axis=1)
    return np.where(is_full.reshape(is_full.shape + (1,) * (values.ndim - 1)), moved, values)
