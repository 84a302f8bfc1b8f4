"""What a dataset is like, read once from a store or from a folder or zip of episodes: returns and visited states."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from bpt_rl.datasets import build, coverage
from bpt_rl.datasets.episode_source import EpisodeSource
from bpt_rl.datasets.store import Store
from bpt_rl.envs import features, processes, rewards, tasks

Progress = Callable[[int, int], None]
_SHARE_EPISODES = 64
"""Episodes that a process reads at a time: a zip is listed anew for each such share."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dataset:
    """What is known of a dataset before its episodes are read."""

    path: str
    domain: str
    source: str
    """Domain and collector, like "walker/rnd"; of a store of several sources, all of them."""

    @property
    def is_store(self) -> bool:
        """Whether it is a store, not a folder or zip of episodes."""
        return not (Path(self.path).is_dir() or self.path.endswith(".zip"))

    @property
    def algorithm(self) -> str:
        """What collected the episodes, like "rnd"."""
        return " + ".join(part.rpartition("/")[2] for part in self.source.split(" + "))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Survey:
    """A dataset's returns under every task, and the states that its coverage is measured with."""

    dataset: Dataset
    subset: str
    action_repeat: int
    num_steps: Int[np.ndarray, "E"]
    """Of each episode, agent steps."""
    returns: Mapping[str, Float[np.ndarray, "E"]]
    """By task: every named one of the domain, or those of the store where it cannot compute others."""
    feature_names: tuple[str, ...]
    states: Float[np.ndarray, "M F"]
    """Physical features of the states of `coverage.draw_states`."""


def identify(path: str, domain: str = "") -> Dataset:
    """Returns what is known of a dataset without reading its episodes.

    Args:
      path: A store, or a folder or zip of episodes.
      domain: Of a folder or zip; empty if its path says it.

    Raises:
      FileNotFoundError: If there is no such dataset, or no episode in it.
      ValueError: If nothing says the domain or it is unknown, or the file is damaged.
    """
    if not Path(path).exists():
        raise FileNotFoundError(
            f"A dataset must be a store, or a folder or zip of episodes; there is none at {path}. Check the path."
        )
    if Path(path).is_dir() or path.endswith(".zip"):
        EpisodeSource.open(path).close()
        domain = domain or build.domain_on_path(path) or ""
        if not domain:
            raise ValueError(
                f"Episodes must be of a known domain; the path {path} names none. Set domain to one of "
                f"{', '.join(tasks.DOMAINS)}."
            )
        tasks.tasks_of(domain)
        return Dataset(path=path, domain=domain, source=build.source_name(path, domain))
    with Store.open(path) as store:
        return Dataset(path=path, domain=store.domain, source=store.source)


def survey(dataset: Dataset, *, num_workers: int = 0, report_progress: Progress | None = None) -> Survey:
    """Returns what a dataset is like; episodes of a folder or zip are relabelled without being stored.

    Args:
      dataset: From `identify`.
      num_workers: Relabelling processes; 0 means one a core.
      report_progress: Called with the episodes read and their number.

    Raises:
      ValueError: If a store or an episode is damaged.
      ImportError: If episodes are to be relabelled and MuJoCo's version does not fit.
    """
    if not dataset.is_store:
        return _survey_episodes(dataset, num_workers, report_progress)
    with Store.open(dataset.path) as store:
        named = tasks.tasks_of(store.domain) if store.domain in tasks.DOMAINS else ()
        task_names = store.tasks + (() if store.action_repeat > 1 else named)
        return Survey(
            dataset=dataset,
            subset=store.subset,
            action_repeat=store.action_repeat,
            num_steps=store.lengths,
            returns={task: store.returns(task) for task in dict.fromkeys(task_names)},
            feature_names=store.feature_names,
            states=drawn_states(store),
        )


def drawn_states(store: Store) -> Float[np.ndarray, "M F"]:
    """Returns the physical features of a store's states that `coverage.draw_states` chooses."""
    drawn = coverage.draw_states(store.lengths)
    rows = coverage.rows_by_episode(drawn, store.num_episodes)
    episodes = itertools.chain.from_iterable(block["features"] for block in store.blocks(("features",)))
    return coverage.in_order_drawn(drawn, [values[r] for values, r in zip(episodes, rows, strict=True)])


class _Share(NamedTuple):
    """Episodes that one process reads at a time."""

    path: str
    domain: str
    names: Sequence[str]
    rows: Sequence[Int[np.ndarray, "_"]]
    """Of each episode, those whose features are kept."""


def _survey_episodes(dataset: Dataset, num_workers: int, report_progress: Progress | None) -> Survey:
    path, domain = dataset.path, dataset.domain
    with EpisodeSource.open(path) as opened:
        names, num_steps = opened.names, np.array(opened.num_steps, np.int64)
    task_names = tasks.tasks_of(domain)
    tasks.require_mujoco()
    drawn = coverage.draw_states(num_steps)
    rows = coverage.rows_by_episode(drawn, len(names))
    parts = [slice(i, i + _SHARE_EPISODES) for i in range(0, len(names), _SHARE_EPISODES)]
    shares = [_Share(path, domain, names[part], rows[part]) for part in parts]
    returns, states = [], []
    workers = processes.num_processes(num_workers, len(shares))
    for share_returns, share_states in processes.map_in_order(_measure, shares, num_workers=workers):
        returns.append(share_returns)
        states.append(share_states)
        if report_progress:
            report_progress(min(len(returns) * _SHARE_EPISODES, len(names)), len(names))
    return Survey(
        dataset=dataset,
        subset="full",
        action_repeat=1,
        num_steps=num_steps,
        returns=dict(zip(task_names, np.concatenate(returns).T, strict=True)),
        feature_names=features.FEATURES[domain],
        states=coverage.in_order_drawn(drawn, states),
    )


def _measure(share: _Share) -> tuple[Float[np.ndarray, "_ _"], Float[np.ndarray, "_ F"]]:
    """Returns a return for each episode and task, and the states to keep."""
    with EpisodeSource.open(share.path) as source:
        measured = [
            _measure_episode(source, name, share.domain, rows)
            for name, rows in zip(share.names, share.rows, strict=True)
        ]
    return np.stack([returns for returns, _ in measured]), np.concatenate([states for _, states in measured])


def _measure_episode(
    source: EpisodeSource, name: str, domain: str, rows: Int[np.ndarray, "_"]
) -> tuple[Float[np.ndarray, "_"], Float[np.ndarray, "_ F"]]:
    episode = source.read(name)
    try:
        measured = features.physical_features(domain, episode.physics)
        returns = [
            rewards.reward_from_features(task, measured, episode.observation, episode.action).sum(
                dtype=np.float64
            )
            for task in tasks.tasks_of(domain)
        ]
    except ValueError as error:
        raise ValueError(f"{source.path}/{name}: {error}") from error
    return np.array(returns, np.float32), measured[rows]
