"""The steps of contexts on the host, in raw units: what a cache is filled from."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bpt_rl.datasets.chains import Chain
from bpt_rl.datasets.packing import STEP_FIELDS
from bpt_rl.types import PackedBatch


class ChainEnd(NamedTuple):
    """Where B chains stand: what the tokens of the next step take from the steps before it."""

    num_steps: Int[np.ndarray, "B"]
    """Steps in the context."""
    previous_action: Float[Any, "B A"]
    """A device may be at work on it until the step has been made."""
    previous_reward: Float[np.ndarray, "B"]
    previous_completion: Float[np.ndarray, "B"]
    previous_step: Int[np.ndarray, "B"]
    previous_episode: Int[np.ndarray, "B"]
    step: Int[np.ndarray, "B"]
    """Of the next step."""
    episode: Int[np.ndarray, "B"]


def empty_steps(num_rows: int, num_steps: int, *, observation_dim: int, action_dim: int) -> PackedBatch:
    """Returns room for `num_steps` steps a row: zeros, each array its own."""
    place = (num_rows, num_steps)
    values = {name: np.zeros(place, np.float32) for name in STEP_FIELDS}
    values |= {name: np.zeros(place, np.int32) for name in ("step", "episode", "segment_ids")}
    values["observation"] = np.zeros((*place, observation_dim), np.float32)
    values["action"] = np.zeros((*place, action_dim), np.float32)
    return PackedBatch(**values)


def write_chains(steps: PackedBatch, chains: Sequence[Chain]) -> Int[np.ndarray, "B"]:
    """Writes each chain to the front of its row, in place, and returns how many steps each has."""
    for row, chain in enumerate(chains):
        for name in STEP_FIELDS:
            getattr(steps, name)[row, : chain.num_steps] = getattr(chain, name)
    return np.array([chain.num_steps for chain in chains], np.int32)


def end_of(steps: PackedBatch, num_steps: Int[np.ndarray, "B"]) -> ChainEnd:
    """Returns the ends of rows of whole trajectories, `num_steps` steps each; of an empty row, a chain's beginning."""
    rows, last = np.arange(len(num_steps)), np.maximum(num_steps - 1, 0)

    def of_last(values: np.ndarray) -> np.ndarray:
        found: np.ndarray = values[rows, last]
        found[num_steps == 0] = 0
        return found

    episode = of_last(steps.episode)
    return ChainEnd(
        num_steps=num_steps,
        previous_action=of_last(steps.action),
        previous_reward=of_last(steps.reward),
        previous_completion=of_last(steps.completion),
        previous_step=of_last(steps.step),
        previous_episode=episode,
        step=np.zeros_like(episode),
        episode=np.where(num_steps == 0, 0, episode + 1).astype(np.int32),
    )


def forget_oldest(steps: PackedBatch, row: int, num_steps: int, most: int) -> int:
    """Drops whole trajectories from the front of a row, in place, and returns how many steps are left.

    As few are dropped as leave at most `most` steps; those that are left are counted from 0 again.

    Args:
      steps: Rows of whole trajectories, one behind another.
      row: Where to drop them.
      num_steps: Steps of this row.
      most: Steps that may be left.
    """
    begins = np.flatnonzero(np.diff(steps.episode[row, :num_steps], prepend=-1))
    first = next((int(begin) for begin in begins if num_steps - begin <= most), num_steps)
    num_left = num_steps - first
    for name in STEP_FIELDS:
        values = getattr(steps, name)[row]
        values[:num_left] = values[first:num_steps].copy()
    if num_left:
        steps.episode[row, :num_left] -= steps.episode[row, 0]
    return num_left
