"""Packing chains into rows of one context length, without cutting any."""

from collections.abc import Sequence

import numpy as np

from bpt_rl.datasets.chains import Chain
from bpt_rl.types import LAYOUTS, PackedBatch

STEP_FIELDS = (
    "observation",
    "action",
    "reward",
    "return_to_go",
    "completion",
    "step",
    "episode",
    "loss_mask",
)


def steps_of(context_length: int, layout: str) -> int:
    """Returns how many steps a context of so many tokens holds.

    Raises:
      ValueError: If the layout is unknown or does not divide the length.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout must be one of {', '.join(LAYOUTS)}; got {layout!r}.")
    steps, rest = divmod(context_length, LAYOUTS[layout])
    if rest or steps < 1:
        raise ValueError(
            f"context_length must be a positive multiple of the layout's tokens a step; got {context_length} and "
            f"{LAYOUTS[layout]}. Use {(steps + 1) * LAYOUTS[layout]} or another multiple."
        )
    return steps


def pack(
    chains: Sequence[Chain],
    context_length: int,
    *,
    layout: str = "return_state_action_reward",
    num_rows: int | None = None,
) -> PackedBatch:
    """Returns the chains packed into rows, each chain whole, first row with room first.

    With six steps a row, chains of 2, 5, 3 and 1 steps become (digits: segment ids, dots: padding):

        1 1 2 2 2 3
        1 1 1 1 1 .

    Args:
      chains: At least one.
      context_length: Tokens a row; a multiple of the layout's tokens a step.
      layout: Token layout, a key of `LAYOUTS`.
      num_rows: Rows of the batch, the rest padding; as few as first-fit needs if None.

    Raises:
      ValueError: If a chain is longer than a row or the chains do not fit into `num_rows`.
    """
    steps = steps_of(context_length, layout)
    placed = first_fit([chain.num_steps for chain in chains], steps)
    needed = 1 + max(row for row, _ in placed)
    if num_rows is not None and needed > num_rows:
        raise ValueError(
            f"The chains must fit into num_rows rows; got {len(chains)} chains that need {needed} rows of "
            f"{steps} steps, and num_rows {num_rows}. Use more rows or a longer context."
        )
    rows = needed if num_rows is None else num_rows
    fields = {name: _zeros(getattr(chains[0], name), rows, steps) for name in STEP_FIELDS}
    segment_ids = np.zeros((rows, steps), np.int32)
    for chain, (row, start) in zip(chains, placed, strict=True):
        place = (row, slice(start, start + chain.num_steps))
        segment_ids[place] = segment_ids[row].max() + 1
        for name, array in fields.items():
            array[place] = getattr(chain, name)
    return PackedBatch(**fields, segment_ids=segment_ids)


def _zeros(like: np.ndarray, rows: int, steps: int) -> np.ndarray:
    return np.zeros((rows, steps, *like.shape[1:]), like.dtype)


def first_fit(lengths: Sequence[int], steps: int) -> list[tuple[int, int]]:
    """Returns the row and the first step of each chain: in the first row with room for it.

    Args:
      lengths: Steps of each chain.
      steps: Of a row.

    Raises:
      ValueError: If a chain is longer than a row.
    """
    if max(lengths) > steps:
        raise ValueError(
            f"A chain must fit into one row, since none is ever cut; got a chain of {max(lengths)} steps and rows "
            f"of {steps}. Use a longer context_length, fewer trajectories or a window."
        )
    used: list[int] = []
    # Without the rows that no chain fits into any more, so that many chains take no quadratic time.
    open_rows: list[int] = []
    placed, shortest = [], min(lengths)
    for length in lengths:
        row = next((r for r in open_rows if used[r] + length <= steps), len(used))
        if row == len(used):
            used.append(0)
            open_rows.append(row)
        placed.append((row, used[row]))
        used[row] += length
        if used[row] + shortest > steps:
            open_rows.remove(row)
    return placed
