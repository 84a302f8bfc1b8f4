"""The episodes that are drawn as films: of a dataset, or of a run's evaluation."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from bpt_rl.datasets import exorl
from bpt_rl.datasets.build import domain_on_path
from bpt_rl.datasets.store import Store
from bpt_rl.envs import tasks
from bpt_rl.run.film import FilmError, write_film
from bpt_rl.run.records import RunFolder, write_atomically


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
    """Yields the episodes of run folders and datasets; see `run_episodes` and `dataset_episode`."""
    for path in paths:
        if path.is_dir():
            yield from run_episodes(path)
        else:
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


def run_episodes(path: Path) -> list[Filmed]:
    """Returns the first and the last episode that the first chain of a run's latest evaluation played.

    They are simulated again from their start states and actions: the same states, to the last bit.

    Raises:
      FileNotFoundError: If the run has not been evaluated.
      ValueError: If the simulator pays other rewards than it did: another version of it.
    """
    folder = RunFolder(path)
    found = sorted(folder.evaluations_path.glob("*_episodes.npz"), key=lambda file: file.stat().st_mtime_ns)
    if not found:
        raise FileNotFoundError(
            f"A run must have been evaluated for its episodes to be drawn; {path} has not. "
            f"Run `bpt-rl evaluate {path}`."
        )
    with np.load(found[-1]) as file:
        values = dict(file)
    stem = found[-1].stem.removesuffix("_episodes")
    which = ["first"] if values["first_episode"] == values["last_episode"] else ["first", "last"]
    return [_simulated_again(f"{stem}_{name}", name, values) for name in which]


def _simulated_again(name: str, which: str, values: Mapping[str, np.ndarray]) -> Filmed:
    task, action_repeat = str(values["task"]), int(values["action_repeat"])
    environment = tasks.make(task, int(values[f"{which}_seed"]), action_repeat)
    environment.reset()
    states, rewards = [tasks.physics_state(environment)], []
    for action in values[f"{which}_action"]:
        rewards.append(environment.step(action).reward)
        states.append(tasks.physics_state(environment))
    environment.close()
    obtained, recorded = float(np.sum(rewards)), float(values[f"{which}_reward"].sum())
    if abs(obtained - recorded) > 1e-6 * max(1.0, abs(recorded)):
        raise ValueError(
            f"An episode must be simulated again as it was played, with a return of {recorded:.6g}; got {obtained:.6g} "
            "with the MuJoCo that is installed. Evaluate the run again."
        )
    return Filmed(name=name, task=task, physics=np.stack(states), action_repeat=action_repeat)


def film_evaluation(path: Path) -> str:
    """Draws `run_episodes` as GIFs beside the evaluation and returns a sentence that says what came of it.

    The sentence is kept in rendering.txt, for the report.
    """
    folder = RunFolder(path)
    try:
        names = []
        for episode in run_episodes(path):
            gif = folder.evaluations_path / f"{episode.name}.gif"
            write_film(gif, episode.task, episode.physics, action_repeat=episode.action_repeat)
            names.append(gif.name)
        sentence = f"Films of the first chain's first and last episode: {', '.join(names)}."
    except FilmError as error:
        sentence = f"No episode was drawn. {error}"
    write_atomically(folder.evaluations_path / "rendering.txt", sentence + "\n")
    return sentence
