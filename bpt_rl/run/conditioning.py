"""What an evaluated policy is told: the return asked of it, and the trajectories its context begins with."""

import dataclasses
import math
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from bpt_rl.config import ContextOrder, DataConfig
from bpt_rl.datasets.chains import Chain, build_chain
from bpt_rl.datasets.drawing import Drawing
from bpt_rl.datasets.store import Store
from bpt_rl.types import DataStatistics, Trajectory


def target_return(
    rule: Literal["largest", "quantile"] | float,
    statistics: DataStatistics,
    *,
    quantile: float = 0.9,
    multiple: float = 1.0,
) -> tuple[float, str]:
    """Returns the target return and, in words, where it comes from.

    Args:
      rule: The data's largest return, their `quantile`, or a return itself, unscaled.
      statistics: Of the training data.
      quantile: In [0, 1].
      multiple: Factor on what the rule gives.

    Raises:
      ValueError: If the target is not finite.
    """
    if rule == "largest":
        base, words = statistics.largest_return, "largest return in the data"
    elif rule == "quantile":
        base = float(np.quantile(statistics.returns, quantile))
        words = f"{quantile} quantile of the data's returns"
    else:
        base, words = rule, "explicit"
    target = base * multiple
    if not math.isfinite(target):
        raise ValueError(
            f"A target return must be finite; got {base} times {multiple}. Use the data's largest."
        )
    return target, words if multiple == 1 else f"{words}, times {multiple}"


def context_chains(
    store: Store,
    data: DataConfig,
    *,
    num_trajectories: int,
    order: ContextOrder,
    target_return: float,
    num_chains: int,
    seed: int,
    expected_return: Path | None = None,
) -> list[Chain] | None:
    """Returns the trajectories that each chain's context begins with, as training would have shown them.

    Args:
      store: To draw from, whatever part of it training drew from.
      data: Of the training: the task, and how trajectories were relabelled and completion flagged.
      num_trajectories: Of each chain, no episode twice; 0 for `none`.
      order: Which, and in what order:
        none: None is returned, and contexts begin empty.
        random: drawn, in the order drawn.
        ascending: the same draw, ascending by return, as in training.
        shuffled: the same draw, in another random order: what ascending returns bring by themselves.
        consecutive: a stretch of one collector's episodes, as collected, with `data.stride`.
        best: those of the largest returns, ascending; alike in all chains.
        worst: those of the smallest returns, ascending; alike in all chains.
      target_return: Asked of them, as of the episodes that will be played; training on own returns asks each for its
        own.
      num_chains: Chains; a chain's draw does not depend on how many there are.
      seed: Of the drawing.
      expected_return: Of a run that was relabelled by them, the expected returns-to-go of the store's steps.

    Raises:
      ValueError: If the number of trajectories does not fit the order or the store, or the store lacks the task.
    """
    _check(store, num_trajectories, order)
    if order == "none":
        return None
    returns = store.returns(data.task)
    if order == "consecutive":
        drawn = _stretches(store, data, num_trajectories, seed, num_chains)
    else:
        drawn = [_drawn(returns, num_trajectories, order, seed, chain) for chain in range(num_chains)]
    episodes = {i: _episode(store, data.task, i) for i in sorted({i for picked in drawn for i in picked})}
    expected = None if expected_return is None else np.load(expected_return, mmap_mode="r")
    chains: dict[tuple[int, ...], Chain] = {}
    for picked in drawn:
        if picked not in chains:
            chains[picked] = build_chain(
                [episodes[i] for i in picked],
                data.task,
                relabel=data.relabel,
                expected=None if expected is None else [np.asarray(expected[i]) for i in picked],
                completion=data.completion,
                target_return=target_return if data.relabel == "chain_maximum" else None,
                order="given",
            )
    return [chains[picked] for picked in drawn]


def _check(store: Store, num_trajectories: int, order: ContextOrder) -> None:
    if num_trajectories < 0 or (num_trajectories == 0) != (order == "none"):
        raise ValueError(
            "A context has an order just if it has trajectories; got num_trajectories "
            f"{num_trajectories} and order {order!r}. Use 0 with none, or at least 1 with another order."
        )
    if num_trajectories > store.num_episodes:
        raise ValueError(
            f"A context holds distinct episodes, so there must be as many in the store; got {num_trajectories} for "
            f"{store.num_episodes} in {store.path}. Use fewer."
        )


def _drawn(
    returns: Float[np.ndarray, "E"], num_trajectories: int, order: ContextOrder, seed: int, chain: int
) -> tuple[int, ...]:
    ranking = np.argsort(returns, kind="stable")
    if order == "best":
        return tuple(ranking[len(ranking) - num_trajectories :].tolist())
    if order == "worst":
        return tuple(ranking[:num_trajectories].tolist())
    generator = _generator(seed, chain)
    picked: Int[np.ndarray, "N"] = generator.choice(len(returns), num_trajectories, replace=False)
    if order == "ascending":
        picked = picked[np.argsort(returns[picked], kind="stable")]
    elif order == "shuffled":
        picked = generator.permutation(picked)
    return tuple(picked.tolist())


def _stretches(
    store: Store, data: DataConfig, num_trajectories: int, seed: int, num_chains: int
) -> list[tuple[int, ...]]:
    stride = data.stride if data.draw == "consecutive" else 1
    config = DataConfig(
        task=data.task,
        num_trajectories=num_trajectories,
        draw="consecutive",
        stride=stride,
        order="collected",
    )
    drawing = Drawing(config, store.returns(data.task), np.asarray(store.lengths), store.episode_names)

    def stretch(chain: int) -> tuple[int, ...]:
        drawn = drawing.chains(
            _generator(seed, chain), seed, first=chain, num_chains=1, size=num_trajectories
        )
        return tuple(drawn.picked[0].tolist())

    return [stretch(chain) for chain in range(num_chains)]


def _generator(seed: int, chain: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(chain,)))


def _episode(store: Store, task: str, index: int) -> Trajectory:
    """Returns an episode with the reward of a task that the store may have to compute."""
    trajectory = store.episode(index)
    reward = store.block((f"reward/{task}",), index, index + 1)[f"reward/{task}"][0]
    return dataclasses.replace(trajectory, task_reward={task: reward[: trajectory.num_steps + 1]})
