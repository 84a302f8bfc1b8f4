"""Expected returns-to-go of a store's steps, fitted once and kept in the run folder."""

import io
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int

from bpt_rl.config import TrainConfig
from bpt_rl.datasets.chains import returns_to_go
from bpt_rl.datasets.store import BLOCK_EPISODES, Store
from bpt_rl.nn.value_function import Fit, Steps, fit_value
from bpt_rl.run import records
from bpt_rl.run.open_runs import OpenRun
from bpt_rl.types import DataStatistics


def prepare_expected_return(store: Store, runs: Sequence[OpenRun]) -> str | None:
    """Fits what was to be expected of each step of the store and writes it into the folders of runs that begin.

    A step's return-to-go becomes its reward and what a value function V, fitted to the returns-to-go of the data,
    expects of the state and time that the step led to: r_t + V(s_tp1, t + 1), and r_t at the end. V(s_t, t) itself
    would tell nothing of the action: the model sees s_t and t anyway.

    Args:
      store: Data of the runs.
      runs: They differ by their seed at most. One that goes on keeps what it began with.

    Returns:
      What was found, in words; None if nothing is relabelled so.

    Raises:
      FloatingPointError: If the fit does not stay finite.
      ValueError: If the store has fewer than two episodes.

    Source: the step's label is a one-step form of what Yamagata et al. 2023 (Q-learning Decision Transformer) put in
    place of returns that came by luck; why luck misleads is in Paster et al. 2022 (ESPER). V is that of the data's
    behaviour and not of the best one, so nothing is bootstrapped.
    """
    config = runs[0].config
    if config.data.relabel != "expected_return":
        return None
    made = next((run.folder.expected_return_path for run in runs if run.start), None)
    if made is None:
        statistics = store.statistics(config.data.task)
        fit = _fitted(config, store, statistics)
        file = io.BytesIO()
        np.save(file, _expected(config.data.task, store, statistics, fit))
        content = file.getvalue()
        words = f"held-out error {float(fit.held_out_error):.3f} of the variance of returns-to-go"
    else:
        content, words = made.read_bytes(), "as when the run began"
    for run in runs:
        if not run.start:
            records.write_atomically(run.folder.expected_return_path, content)
    return words


def _fitted(config: TrainConfig, store: Store, statistics: DataStatistics) -> Fit:
    settings = config.expected_return
    if store.num_episodes < 2:
        raise ValueError(
            "Expected returns are measured on episodes that they are not fitted to; got a store of "
            f"{store.num_episodes}. Build one of more episodes."
        )
    generator = np.random.default_rng(settings.seed)
    drawn = generator.permutation(store.num_episodes)[: settings.max_episodes]
    num_held_out = min(max(1, round(settings.held_out * len(drawn))), len(drawn) - 1)
    held_out, fitted = np.sort(drawn[:num_held_out]), np.sort(drawn[num_held_out:])
    return fit_value(settings, *(_steps(config.data.task, store, statistics, e) for e in (fitted, held_out)))


def _steps(task: str, store: Store, statistics: DataStatistics, episodes: Int[np.ndarray, "_"]) -> Steps:
    parts = []
    for first, block in _blocks(task, store):
        for i in episodes[(episodes >= first) & (episodes < first + BLOCK_EPISODES)].tolist():
            length = int(store.lengths[i])
            reward = block[f"reward/{task}"][i - first, 1 : length + 1]
            time = np.arange(length, dtype=np.float32) / statistics.episode_steps
            observation = _normalized(block["observation"][i - first, :length], statistics)
            parts.append((observation, time, returns_to_go(reward)))
    return Steps(*(jnp.asarray(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)))


def _expected(task: str, store: Store, statistics: DataStatistics, fit: Fit) -> Float32[np.ndarray, "E T1"]:
    longest = int(store.lengths.max()) + 1
    found = np.zeros((store.num_episodes, longest), np.float32)
    time = np.arange(longest, dtype=np.float32) / statistics.episode_steps
    value_of = jax.jit(lambda observation: fit(observation, jnp.asarray(time)))
    for first, block in _blocks(task, store):
        for i, observation in enumerate(block["observation"][:, :longest], first):
            length = int(store.lengths[i])
            value = np.array(value_of(_normalized(observation, statistics)))
            found[i, :length] = block[f"reward/{task}"][i - first, 1 : length + 1]
            found[i, : length - 1] += value[1:length]
    return found


def _normalized(
    observation: Float32[np.ndarray, "T O"], statistics: DataStatistics
) -> Float32[np.ndarray, "T O"]:
    mean, std = (np.asarray(x, np.float32) for x in (statistics.observation_mean, statistics.observation_std))
    return np.asarray((observation - mean) / std)


def _blocks(task: str, store: Store) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    for number, block in enumerate(store.blocks(("observation", f"reward/{task}"))):
        yield number * BLOCK_EPISODES, block
