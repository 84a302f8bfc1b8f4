"""The episodes of a store as single transitions, resident on the device: batches are drawn inside jit."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Float32, Int, Int32, Shaped

from bpt_rl.datasets import capacity
from bpt_rl.datasets.store import Store

SHARE = 0.8
"""Most of the free memory that transitions take; networks and batches need little beside them."""


class TransitionBatch(NamedTuple):
    """A batch of n-step transitions of offline data; a pytree."""

    observation: Float[Any, "B O"]
    action: Float[Any, "B A"]
    """In [-1, 1]; the first of the n."""
    reward: Float[Any, "B"]
    """Discounted sum of the n, unscaled."""
    discount: Float[Any, "B"]
    """Of the value of `next_observation`: never 0, since no episode ends but by its time limit."""
    next_observation: Float[Any, "B O"]


class Transitions(NamedTuple):
    """Rows of all episodes, one behind the other, in ExoRL's alignment; a pytree.

    Two episodes of two steps and one, each behind its dummy row:

        row              0      1  2  |  3      4        observation[0] is the first episode's first
        action, reward   dummy  a  b  |  dummy  c        a leads from observation[0] to observation[1]
        transition              0  1  |         2
        row_index        1, 2, 4
        steps_after      1, 0, 0
    """

    observation: Float[Any, "rows O"]
    action: Float[Any, "rows A"]
    reward: Float[Any, "rows"]
    row_index: Int[Any, "transitions"]
    """Row of each transition's action, reward and next observation; its observation lies one row before."""
    steps_after: Int[Any, "transitions"]
    """Steps that its episode still has behind it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransitionDraw:
    """What batches are made of; holds numbers only.

    Transitions are drawn uniformly, with replacement, from those of all episodes. ExoRL draws an episode, then a step
    of it, which is the same where all episodes are equally long.

    The tasks of dm_control end by their time limit alone, and the observation does not tell the time: what follows
    the last step is cut off, not worthless. Its discount is therefore as any other's, and the critic is asked about
    the last observation. A transition of n steps that the episode's end cuts short has fewer rewards and as many
    factors of the discount.
    """

    batch_size: int
    num_step_return: int = 1
    """n."""
    discount: float
    """A step."""

    def indices(self, transitions: Transitions, key: Any) -> Int[Any, "B"]:
        """Returns the numbers of a batch's transitions, drawn with a key of JAX."""
        import jax

        return jax.random.randint(key, (self.batch_size,), 0, len(transitions.row_index))

    def gather(self, transitions: Transitions, indices: Int[Any, "B"]) -> TransitionBatch:
        """Returns the transitions of these numbers."""
        import jax.numpy as jnp

        row, after = transitions.row_index[indices], transitions.steps_after[indices]
        reward, last = jnp.zeros(len(row)), row
        for k in range(self.num_step_return):
            last = row + jnp.minimum(k, after)
            reward += jnp.where(k <= after, self.discount**k * transitions.reward[last], 0.0)
        num_steps = jnp.minimum(self.num_step_return, after + 1)
        return TransitionBatch(
            observation=transitions.observation[row - 1],
            action=transitions.action[row],
            reward=reward,
            discount=jnp.float32(self.discount) ** num_steps,
            next_observation=transitions.observation[last],
        )


def num_bytes(store: Store) -> int:
    """Returns the memory that the transitions of a store take on the device, bytes.

    Four for each entry of every row, observation, action and reward, and eight for each transition.
    """
    num_transitions = int(store.lengths.sum())
    num_rows = num_transitions + store.num_episodes
    return 4 * num_rows * (store.observation_dim + store.action_dim + 1) + 8 * num_transitions


def check_room(store: Store) -> None:
    """Checks that the transitions of a store fit the first device.

    Raises:
      ValueError: If they do not.
    """
    measured, needed = capacity.measure(), num_bytes(store)
    free = measured.host if measured.accelerator is None else measured.accelerator
    if needed > SHARE * free:
        raise ValueError(
            f"Transitions must fit into {SHARE:.0%} of the device's free memory; {store.path} takes "
            f"{needed / capacity.GIB:.3g} GiB of {free / capacity.GIB:.3g} GiB. Build a store of a smaller subset, "
            "such as --subset first-1M."
        )


def load_transitions(store: Store, task: str) -> Transitions:
    """Returns all transitions of a store under a task, on the default device.

    Columns are copied there one after another, so that the host holds one at a time.

    Raises:
      ValueError: If the store can give no reward of the task, if one is not finite, or if there is no room.
    """
    import jax

    store.check_task(task)
    check_room(store)
    row_index, steps_after = index_arrays(store.lengths)
    reward = _load(store, f"reward/{task}")
    if not np.isfinite(reward).all():
        raise ValueError(
            f"Rewards must be finite; {store.path} has others under {task!r}. Build it again, or mend the reward."
        )
    return Transitions(
        observation=jax.device_put(_load(store, "observation")),
        action=jax.device_put(_load(store, "action")),
        reward=jax.device_put(reward),
        row_index=jax.device_put(row_index),
        steps_after=jax.device_put(steps_after),
    )


def index_arrays(
    lengths: Int[np.ndarray, "E"],
) -> tuple[Int32[np.ndarray, "transitions"], Int32[np.ndarray, "transitions"]]:
    """Returns `row_index` and `steps_after` of episodes with so many steps."""
    ends = np.cumsum(lengths)
    number = np.arange(ends[-1])
    episode = np.repeat(np.arange(len(lengths)), lengths)
    # Each episode so far, its own included, has put one dummy row before the transition.
    return (number + episode + 1).astype(np.int32), (ends[episode] - 1 - number).astype(np.int32)


def _load(store: Store, name: str) -> Float32[np.ndarray, "rows ..."]:
    """Returns a column's rows of all episodes, without the padding of short ones."""
    lengths, row, episode = store.lengths, 0, 0
    inner = {"observation": (store.observation_dim,), "action": (store.action_dim,)}.get(name, ())
    loaded = np.empty((int(lengths.sum()) + len(lengths), *inner), np.float32)
    for block in store.blocks((name,)):
        values: Shaped[np.ndarray, "_ T1 ..."] = block[name]
        is_row = np.arange(values.shape[1]) <= lengths[episode : episode + len(values), None]
        num_rows = int(is_row.sum())
        loaded[row : row + num_rows] = values[is_row]
        row, episode = row + num_rows, episode + len(values)
    return loaded
