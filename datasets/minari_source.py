"""An episode of any Minari dataset with Box spaces as a trajectory.

A dataset that `bpt_rl.datasets.minari_export` wrote gives back what the store held: physics, body and task. Any
other one has no simulator here: its domain and its only task bear its id.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Shaped

from bpt_rl.envs import features, tasks
from bpt_rl.types import Trajectory

PREFIX = "minari:"
"""What a source begins with that is the id of a Minari dataset."""
UNSIMULATED = "minari/"
"""What the source of a store begins with whose task has no simulator here."""
OWN_KEY = "bpt_rl"
"""Entry of a dataset's metadata that says which store it was exported from."""
NAME_KEY = "name"
"""Entry of an episode's metadata: its name in that store."""
# Not FILE.py:NAME: nothing that comes with a dataset may be run.
_TASK = re.compile(r"\w+(\([\w=.,+-]*\))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What the episodes of a dataset are."""

    domain: str
    task: str
    """Whose rewards the dataset holds."""
    action_repeat: int
    """Control steps of a step of the dataset."""
    source: str
    subset: str

    @property
    def is_simulated(self) -> bool:
        """Whether there is a simulator for the body, and physics in each episode."""
        return self.domain in tasks.DOMAINS


class MinariSource:
    """An opened dataset. Nothing is held open: each read opens the file anew.

    Attributes:
      path: Of the folder with its data.
      origin: What its episodes are.
      names: Of the episodes: those of the store it was exported from, or like "minari/ID/episode_17".
      num_steps: Of each episode.
    """

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path = path
        self._dataset = dataset
        self.origin = _origin(dataset)
        entries = list(dataset.storage.get_episode_metadata(dataset.episode_indices))
        default = f"{UNSIMULATED}{dataset.id}/episode_"
        self.names = [str(entry.get(NAME_KEY, f"{default}{i}")) for i, entry in enumerate(entries)]
        self.num_steps = np.array([entry["total_steps"] for entry in entries], np.int64)

    @classmethod
    def open(cls, dataset_id: str) -> "MinariSource":
        """Returns the dataset of that id on this machine.

        Raises:
          ModuleNotFoundError: If Minari is not installed.
          FileNotFoundError: If there is no such dataset in the folder that MINARI_DATASETS_PATH names.
          ValueError: If the id is malformed, or the dataset is damaged, empty or has other than Box spaces.
        """
        path = dataset_path(dataset_id) / "data"
        if not path.is_dir():
            raise FileNotFoundError(
                f"A Minari dataset must be on this machine; there is none at {path.parent}. Fetch it with "
                f"`minari download {dataset_id}`, or set MINARI_DATASETS_PATH to the folder of your datasets."
            )
        return cls.at(path)

    @classmethod
    def at(cls, path: Path) -> "MinariSource":
        """Returns the dataset in a folder; see `open`."""
        from minari import MinariDataset

        try:
            source = cls(path, MinariDataset(path))
        except ImportError:
            # It names the extra of Minari that reads the dataset's format.
            raise
        except Exception as error:
            raise ValueError(
                f"A Minari dataset must be whole; {path} cannot be read ({error}). Fetch or export it again."
            ) from error
        source._check()
        return source

    def _check(self) -> None:
        from gymnasium.spaces import Box

        for kind, space in self._spaces.items():
            if not isinstance(space, Box) or not np.prod(space.shape):
                raise ValueError(
                    f"A Minari dataset must have Box spaces with at least one number; {self._dataset.id} has the "
                    f"{kind} space {type(space).__name__}{list(space.shape or ())}. Choose another dataset."
                )
        if not len(self.num_steps) or self.num_steps.min() < 1:
            raise ValueError(
                f"A Minari dataset must have episodes of at least one step; {self._dataset.id} has "
                f"{len(self.num_steps)} episodes, {np.count_nonzero(self.num_steps < 1)} of them without a step. "
                "Filter it, or choose another dataset."
            )

    @property
    def _spaces(self) -> Mapping[str, Any]:
        return {"observation": self._dataset.observation_space, "action": self._dataset.action_space}

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 that changes when the dataset does, without reading it: metadata, sizes, times of change."""
        digest = hashlib.sha256((self.path / "metadata.json").read_bytes())
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            status = file.stat()
            line = f"{file.relative_to(self.path)}\0{status.st_size}\0{status.st_mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def read(self, index: int) -> Trajectory:
        """Returns an episode, with the reward of the dataset's task.

        Observations are flattened to one axis, float32. Actions are mapped from the bounds of their space to
        [-1, 1], where agents act; one outside its bounds counts as the nearest bound. Without finite bounds they
        are taken as they are. The discount is 0 where the episode terminated.

        Raises:
          ValueError: If arrays do not fit together, a value is not finite, or an unbounded action lies outside
            [-1, 1].
        """
        try:
            return self._trajectory(self._dataset[index], int(self.num_steps[index]))
        except Exception as error:
            # Damage to HDF5 has many kinds of error.
            raise ValueError(
                f"Episode {index} of the Minari dataset {self._dataset.id} cannot be used: {error}"
            ) from error

    def _trajectory(self, episode: Any, num_steps: int) -> Trajectory:
        rows = num_steps + 1
        spaces = self._spaces
        observation = _array("observations", episode.observations, (rows, *spaces["observation"].shape))
        actions = _array("actions", episode.actions, (num_steps, *spaces["action"].shape))
        rewards = _float32("rewards", _array("rewards", episode.rewards, (num_steps,)))
        terminated = _array("terminations", episode.terminations, (num_steps,))
        reward = _below(0, rewards)
        physics, stored_reward = np.zeros((rows, 0)), reward[:, None]
        measured = np.zeros((rows, 0))
        if self.origin.is_simulated:
            physics, stored_reward = (
                _array(f"infos/{name}", (episode.infos or {}).get(name), (rows, None))
                for name in ("physics", "stored_reward")
            )
            physics = physics.astype(np.float64, copy=False)
            measured = features.physical_features(self.origin.domain, physics)
        return Trajectory(
            observation=_float32("observations", observation.reshape(rows, -1)),
            action=_below(0, _scaled(actions.reshape(num_steps, -1), spaces["action"])),
            reward=stored_reward.astype(np.float32, copy=False),
            discount=_below(1, 1 - terminated.astype(np.float32))[:, None],
            physics=physics,
            features=measured,
            task_reward={self.origin.task: reward},
        )


def require_minari() -> None:
    """Checks that Minari and what it needs to read HDF5 are installed.

    Raises:
      ModuleNotFoundError: If not.
    """
    try:
        import minari  # noqa: F401
        import PIL.Image  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"A Minari dataset needs the package {error.name}, which is not installed. "
            "Install the extra: pip install 'bpt-rl[minari]'."
        ) from error


def dataset_path(dataset_id: str) -> Path:
    """Returns the folder of a dataset, whether it is there or not.

    Raises:
      ModuleNotFoundError: If Minari is not installed.
      ValueError: If the id is malformed.
    """
    require_minari()
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.storage import get_dataset_path

    try:
        parse_dataset_id(dataset_id)
    except (ValueError, TypeError) as error:
        # TypeError: Minari reads a missing version as a number.
        raise ValueError(
            "The id of a Minari dataset must read NAMESPACE/NAME-vNUMBER, in letters, digits, - and _, the namespace "
            f"optional; got {dataset_id!r}. Correct it."
        ) from error
    return Path(get_dataset_path(dataset_id))


def _origin(dataset: Any) -> Origin:
    own = dataset.storage.metadata.get(OWN_KEY)
    if isinstance(own, Mapping) and own.get("domain") in tasks.DOMAINS and _TASK.fullmatch(str(own["task"])):
        return Origin(**{field.name: own[field.name] for field in dataclasses.fields(Origin)})
    source = f"{UNSIMULATED}{dataset.id}"
    return Origin(domain=dataset.id, task=dataset.id, action_repeat=1, source=source, subset="full")


def _array(name: str, values: Any, shape: tuple[int | None, ...]) -> Shaped[np.ndarray, "_ ..."]:
    array = np.asarray(values)
    fits = array.ndim == len(shape) and all(
        size in (None, got) for size, got in zip(shape, array.shape, strict=True)
    )
    if values is None or array.dtype.kind not in "biuf" or not fits:
        wanted = ["any" if size is None else size for size in shape]
        got = "none" if values is None else f"{array.dtype} {list(array.shape)}"
        raise ValueError(f"{name} must be numbers of shape {wanted}; got {got}.")
    return array


def _below(dummy: float, values: Shaped[np.ndarray, "T *A"]) -> Float32[np.ndarray, "T1 *A"]:
    return np.concatenate([np.full((1, *values.shape[1:]), dummy, np.float32), values])


def _float32(name: str, values: Shaped[np.ndarray, "T *A"]) -> Float32[np.ndarray, "T *A"]:
    with np.errstate(over="ignore"):
        converted = values.astype(np.float32)
    if not np.isfinite(converted).all():
        raise ValueError(f"{name} must be finite in float32; got {values[~np.isfinite(converted)][0]}.")
    return converted


def _scaled(actions: Shaped[np.ndarray, "T A"], space: Any) -> Float32[np.ndarray, "T A"]:
    low, high = (bound.ravel().astype(np.float64) for bound in (space.low, space.high))
    is_bounded = np.isfinite(low) & np.isfinite(high)
    low, high = np.where(is_bounded, low, -1), np.where(is_bounded, high, 1)
    # Bounds of -1 and 1 change no bit; a number that cannot move becomes 0.
    scaled = (actions - (low + high) / 2) / np.where(high > low, (high - low) / 2, 1)
    outside = np.abs(scaled) > 1
    if (outside & ~is_bounded).any():
        value = scaled[outside & ~is_bounded][0]
        raise ValueError(
            f"actions without finite bounds must lie in [-1, 1], where agents act; got {value:.6g}. "
            "Scale them, or give their space its bounds."
        )
    return _float32("actions", np.where(outside, np.sign(scaled), scaled))
