"""The episodes that `bpt-rl render` draws: of a dataset."""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from bpt_rl.datasets import exorl
from bpt_rl.datasets.build import domain_on_path
from bpt_rl.datasets.store import Store
from bpt_rl.envs import tasks


@dataclasses.dataclass(frozen=True, kw_only=True)
class Filmed:
    """An episode to be drawn."""

    name: str
    """What tells it from others of the same source."""
    task: str
    physics: Float[np.ndarray, "T1 P"]
    action_repeat: int
    """Control steps from one state to the next."""


def episodes_of(paths: Sequence[Path], *, task: str = "", index: int = 0) -> Iterator[Filmed]:
    """Yields the episode of each dataset; see `dataset_episode`."""
    for path in paths:
        yield dataset_episode(path, task=task, index=index)


def dataset_episode(path: Path, *, task: str = "", index: int = 0) -> Filmed:
    """Returns an episode of a dataset.

    Args:
      path: An episode's npz file in ExoRL's layout, or a store that `bpt-rl data build` wrote.
      task: Whose body is drawn; empty if the path, or the store, says the domain.
      index: Of the episode in a store.

    Raises:
      FileNotFoundError: If there is no such file.
      ValueError: If it is neither, or nothing says the domain.
      IndexError: If the store has no such episode.
    """
    if path.suffix == ".npz":
        physics, domain, action_repeat = exorl.read_episode(path).physics, domain_on_path(str(path)), 1
        name = path.stem
    else:
        with Store.open(path) as store:
            physics, domain, action_repeat = store.episode(index).physics, store.domain, store.action_repeat
        name = f"{path.stem}_{index:06d}"
    if not task:
        if not domain:
            raise ValueError(
                f"The task of an episode must be known for it to be drawn; the path {path} names no domain. "
                "Set --task, to walker_run for instance."
            )
        task = tasks.tasks_of(domain)[0]
    return Filmed(name=name, task=task, physics=physics, action_repeat=action_repeat)
