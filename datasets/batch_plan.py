"""What a batch is made of, in a few numbers a trajectory, and putting it together from episodes.

A plan is drawn on the host and is the same wherever the episodes lie; `assemble` and `assemble_in_jit` follow it
to the same bits, those of `chains.build_chain` and `packing.pack`.
"""

import collections
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Int, Int32

from bpt_rl.datasets.chains import reach_threshold, without_subnormals
from bpt_rl.datasets.packing import first_fit
from bpt_rl.types import PackedBatch

COLUMNS = ("observation", "action", "reward", "collected")
"""Of every episode, [T1, ...] float32; collected[t] is the reward of the steps before t (`collected_returns`).

There may be one more, `expected`: returns-to-go that stand in place of the target less what was collected."""

Columns = Mapping[str, Any]
"""Each of them: one array of all episodes, [E, T1, ...], or on the host a sequence of theirs, [T1, ...]."""


class BatchPlan(NamedTuple):
    """One entry for each trajectory of a batch, in the order of the batch's steps.

    Unused entries come last and have a row behind the last and no steps. A pytree whose shapes never change.
    """

    row: Int32[np.ndarray, "slots"]
    offset: Int32[np.ndarray, "slots"]
    """First step within the row."""
    segment_id: Int32[np.ndarray, "slots"]
    """1, 2, ... for the chains of a row."""
    episode: Int32[np.ndarray, "slots"]
    """Position in the chain, from 0."""
    episode_index: Int32[np.ndarray, "slots"]
    """Which of the episodes that may be drawn."""
    start: Int32[np.ndarray, "slots"]
    """First step within the episode."""
    num_steps: Int32[np.ndarray, "slots"]
    flag_from: Int32[np.ndarray, "slots"]
    """First step of the episode that may be flagged as complete."""
    target: Float32[np.ndarray, "slots"]
    """Return asked of the whole episode."""
    threshold: Float32[np.ndarray, "slots"]
    """Collected reward that counts as the target."""
    counts: Float32[np.ndarray, "slots"]
    """1 where the actions are to be predicted."""

    @classmethod
    def of_rows(
        cls,
        whole: Int[np.ndarray, "8 *slots"],
        real: Float32[np.ndarray, "3 *slots"],
        *,
        first_row: int,
        num_rows: int,
    ) -> "BatchPlan":
        """Returns the plan of `num_rows` rows from `first_row` on, out of that of all of a batch's trajectories.

        Args:
          whole: The fields from `row` to `flag_from`; a row below 0 is no row.
          real: The fields from `target` on.
          first_row: Row that becomes row 0.
          num_rows: Others' entries become unused.
        """
        row = whole[0].ravel() - first_row
        row = np.where((row >= 0) & (row < num_rows), row, num_rows)
        order = row.argsort(kind="stable")  # In each row, later chains already lie behind earlier ones.
        whole, real = (values.reshape(len(values), -1)[:, order] for values in (whole.astype(np.int32), real))
        whole[0] = row[order]
        plan = cls(*whole, *real)
        plan.num_steps[plan.row == num_rows] = 0
        return plan


def place_chains(num_steps: Int[np.ndarray, "C N"], steps_per_row: int) -> Int[np.ndarray, "3 C N"]:
    """Returns row, offset and segment id of each trajectory of C chains, packed as `packing.pack` does.

    Args:
      num_steps: Of each trajectory, in the order of its chain.
      steps_per_row: Steps that a row holds.

    Raises:
      ValueError: If a chain is longer than a row.
    """
    num_chains = collections.Counter[int]()
    rows, firsts, segment_ids = [], [], []
    for row, first in first_fit(num_steps.sum(axis=1).tolist(), steps_per_row):
        num_chains[row] += 1
        rows.append(row)
        firsts.append(first)
        segment_ids.append(num_chains[row])
    placed = np.array([rows, firsts, segment_ids])[:, :, None].repeat(num_steps.shape[1], axis=2)
    placed[1] += num_steps.cumsum(axis=1) - num_steps
    return placed


def fill_rows(num_steps: Int[np.ndarray, "C N"], rows: Int[np.ndarray, "R"]) -> Int[np.ndarray, "3 C N"]:
    """Returns row, offset and segment id of each trajectory of C chains, equally many one behind another in each row.

    Args:
      num_steps: Of each trajectory, in the order of its chain.
      rows: To be filled, a divisor of the chains in number.
    """
    in_row = num_steps.reshape(len(rows), -1)
    offset = in_row.cumsum(axis=1) - in_row
    segment_id = np.arange(in_row.shape[1]) // num_steps.shape[1] + 1
    placed = np.array([rows[:, None] + 0 * in_row, offset, segment_id + 0 * in_row])
    return placed.reshape(3, *num_steps.shape)


def targets_of(returns: Float32[np.ndarray, "C N"], *, own: bool) -> Float32[np.ndarray, "2 C N"]:
    """Returns target return and threshold of each trajectory of C chains.

    Args:
      returns: Of the whole episodes.
      own: Ask each for its own return and not for the chain's largest.
    """
    asked = returns if own else returns.max(axis=1, keepdims=True)
    thresholds = [[reach_threshold(target) for target in chain] for chain in asked.tolist()]
    targets = np.zeros((2, *returns.shape), np.float32)
    targets[0], targets[1] = without_subnormals(asked), thresholds
    return targets


def assemble(plan: BatchPlan, columns: Columns, num_rows: int, steps_per_row: int) -> PackedBatch:
    """Returns the batch of a plan, copied piece by piece straight from arrays in memory into new ones.

    Args:
      plan: Of `num_rows` rows at most.
      columns: Arrays of the episodes that the plan's `episode_index` counts.
      num_rows: B.
      steps_per_row: T.
    """
    num_cells = num_rows * steps_per_row
    begin = np.minimum(plan.row * steps_per_row + plan.offset, num_cells)
    begin[0] = 0  # It is, unless all the rows are empty.
    sizes = np.append(begin[1:], num_cells) - begin  # With the padding behind each entry.
    gaps = sizes - plan.num_steps
    numbers = (plan.episode_index, plan.start, plan.start + plan.num_steps, gaps)
    cuts = list(zip(*(values.tolist() for values in numbers), strict=True))

    def join(name: str, ahead: int) -> np.ndarray:
        episodes, pieces = columns[name], []
        for index, start, stop, gap in cuts:
            values = episodes[index]
            pieces.append(values[start + ahead : stop + ahead])
            if gap:
                pieces.append(np.broadcast_to(np.float32(0), (gap, *values.shape[1:])))
        return np.concatenate(pieces)

    step = np.arange(num_cells, dtype=np.int32) + np.repeat(plan.start - begin, sizes)
    reached = join("collected", 1) >= np.repeat(plan.threshold, sizes)
    reached &= step >= np.repeat(plan.flag_from, sizes)
    if "expected" in columns:
        return_to_go = join("expected", 0)
    else:
        return_to_go = np.repeat(plan.target, sizes) - join("collected", 0)
    flat: dict[str, np.ndarray] = {
        "observation": join("observation", 0),
        "action": join("action", 1),
        "reward": join("reward", 1),
        "return_to_go": return_to_go,
        "completion": reached.astype(np.float32),
        "step": step,
        "episode": np.repeat(plan.episode, sizes),
        "segment_ids": np.repeat(plan.segment_id, sizes),
        "loss_mask": np.repeat(plan.counts, sizes),
    }
    for i in np.flatnonzero(gaps):
        for array in flat.values():
            array[begin[i] + plan.num_steps[i] : begin[i] + sizes[i]] = 0
    return PackedBatch(**{k: x.reshape(num_rows, steps_per_row, *x.shape[1:]) for k, x in flat.items()})


def assemble_in_jit(
    plan: BatchPlan, columns: Mapping[str, Any], num_rows: int, steps_per_row: int
) -> PackedBatch:
    """Returns the batch of a plan as gathers in JAX: for arrays on an accelerator, inside jit.

    Args:
      plan: Of `num_rows` rows at most.
      columns: Arrays [E, T1, ...] of the episodes that the plan's `episode_index` counts.
      num_rows: B.
      steps_per_row: T.
    """
    import jax.numpy as jnp

    cell = jnp.arange(num_rows * steps_per_row, dtype=jnp.int32)
    begin = plan.row * steps_per_row + plan.offset
    # Unrolled, the search becomes part of the kernel that gathers.
    slot = jnp.searchsorted(begin, cell, side="right", method="scan_unrolled").astype(jnp.int32) - 1
    mine: Any = BatchPlan._make(jnp.asarray(values)[slot] for values in plan)
    into = cell - begin[slot]
    is_step = (slot >= 0) & (into < mine.num_steps)
    index, step = jnp.where(is_step, mine.episode_index, 0), jnp.where(is_step, mine.start + into, 0)

    def cut(name: str, ahead: int) -> Any:
        return columns[name].at[index, step + ahead].get(mode="promise_in_bounds")

    def packed(values: Any) -> Any:
        inside = is_step.reshape(is_step.shape + (1,) * (values.ndim - 1))
        kept = jnp.where(inside, values, jnp.zeros((), values.dtype))
        return kept.reshape(num_rows, steps_per_row, *values.shape[1:])

    reached = (step >= mine.flag_from) & (cut("collected", 1) >= mine.threshold)
    return_to_go = cut("expected", 0) if "expected" in columns else mine.target - cut("collected", 0)
    return PackedBatch(
        observation=packed(cut("observation", 0)),
        action=packed(cut("action", 1)),
        reward=packed(cut("reward", 1)),
        return_to_go=packed(return_to_go),
        completion=packed(reached.astype(jnp.float32)),
        step=packed(step),
        episode=packed(mine.episode),
        segment_ids=packed(mine.segment_id),
        loss_mask=packed(mine.counts),
    )
