"""From a store to a Minari dataset, block by block, so that a store far larger than memory can be exported."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from bpt_rl.config import ExportConfig
from bpt_rl.datasets.minari_source import NAME_KEY, OWN_KEY, dataset_path
from bpt_rl.datasets.store import BLOCK_EPISODES, Store
from bpt_rl.datasets.whole_file import explained, sync_folder

INFOS = ("physics", "stored_reward")
"""Columns of a store that an episode's infos keep, [T+1, ...] like its observations."""


class Exported(NamedTuple):
    """A dataset that was written."""

    dataset_id: str
    path: Path
    """Its folder."""
    num_episodes: int


def export_store(
    store_path: str | os.PathLike[str],
    config: ExportConfig,
    report_progress: Callable[[int, int], None] | None = None,
) -> Exported:
    """Writes the episodes of a store as a Minari dataset with the rewards of one task.

    Observations [T+1, O] and actions [T, A] in [-1, 1] have Box spaces. An episode terminates where its discount is
    0, which ExoRL's never is, and else is truncated at its last step. Its infos keep `physics` (float64) and
    `stored_reward`, [T+1, ...], so that `bpt-rl data build --source minari:ID` gives the store back. Metadata name
    source, subset, digests, action repeat and task.

    The dataset appears whole or not at all; one that is there is never replaced.

    Args:
      store_path: The store.
      config: Which task, and the id.
      report_progress: Called with the episodes done and their number.

    Raises:
      FileNotFoundError: If there is no such store.
      ModuleNotFoundError: If Minari is not installed.
      FileExistsError: If there is a dataset of that id.
      ValueError: If the file is no store, the store cannot give the task's reward, or the id is malformed.
      OSError: If it cannot be written; nothing of it is kept.
    """
    with Store.open(store_path) as store:
        task = config.task or store.tasks[0]
        store.check_task(task)
        dataset_id = config.dataset_id or default_id(store, task)
        path = dataset_path(dataset_id)
        if path.exists():
            raise FileExistsError(
                f"An export must not replace a dataset; {path} is there already. Choose another --dataset-id, "
                "like the next version."
            )
        _check_room(path, store)
        with explained(path), _whole_folder(path, dataset_id) as folder:
            _write(store, task, dataset_id, folder / "data", report_progress)
        return Exported(dataset_id, path, store.num_episodes)


def default_id(store: Store, task: str) -> str:
    """Returns like "walker/rnd-walker_run-v0"; the subset stands between the two if it is not the full one."""
    parts = [store.source, *([] if store.subset == "full" else [store.subset]), task]
    source, *rest = (re.sub(r"[^\w/-]+", "_", part).strip("/_") for part in parts)
    return f"{'-'.join([source, *(part.replace('/', '_') for part in rest)])}-v0"


@contextlib.contextmanager
def _whole_folder(path: Path, dataset_id: str) -> Iterator[Path]:
    """Yields a hidden folder that becomes `path` once the block ends and every byte is on disk."""
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.namespace import create_namespace, list_local_namespaces
    from minari.storage import get_dataset_path

    temporary = get_dataset_path() / f".{path.name}.{secrets.token_hex(4)}.tmp"
    (temporary / "data").mkdir(parents=True)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _sync(file)
        sync_folder(temporary / "data")
        namespace, _, _ = parse_dataset_id(dataset_id)
        if namespace is not None and namespace not in list_local_namespaces():
            create_namespace(namespace)
        temporary.rename(path)
        sync_folder(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _sync(file: Path) -> None:
    with file.open("rb") as opened:
        os.fsync(opened.fileno())


def _check_room(path: Path, store: Store) -> None:
    from minari.storage import get_dataset_path

    # HDF5 cannot be relied on to close a file that it failed to write.
    row = store.block((*INFOS, "observation", "action"), 0, 1)
    row_bytes = sum(values[0, 0].nbytes for values in row.values()) + np.dtype(np.float32).itemsize + 2
    # Padded chunks add a seventh to long episodes, structures 20 kB to each.
    needed = 1.25 * row_bytes * int((store.lengths + 1).sum()) + 32_000 * store.num_episodes
    free = shutil.disk_usage(get_dataset_path()).free
    if needed > free:
        raise OSError(
            f"An export needs room for all its episodes; {path} takes {needed / 1e9:.3g} GB, and {free / 1e9:.3g} "
            "GB are free. Set MINARI_DATASETS_PATH to a folder with more."
        )


def _write(
    store: Store,
    task: str,
    dataset_id: str,
    folder: Path,
    report_progress: Callable[[int, int], None] | None,
) -> None:
    from gymnasium.spaces import Box
    from minari import __version__
    from minari.dataset.minari_storage import MinariStorage

    storage = MinariStorage.new(
        folder,
        observation_space=Box(-np.inf, np.inf, (store.observation_dim,), np.float32),
        action_space=Box(-1, 1, (store.action_dim,), np.float32),
    )
    storage.update_metadata(
        {"dataset_id": dataset_id, "minari_version": __version__, **_metadata(store, task)}
    )
    names, lengths = store.episode_names, store.lengths.tolist()
    columns = ("observation", "action", "discount", f"reward/{task}", *INFOS)
    for start in range(0, store.num_episodes, BLOCK_EPISODES):
        stop = min(start + BLOCK_EPISODES, store.num_episodes)
        block = store.block(columns, start, stop)
        storage.update_episodes(
            [
                _episode({name: values[i, : lengths[start + i] + 1] for name, values in block.items()}, task)
                for i in range(stop - start)
            ]
        )
        storage.update_episode_metadata([{NAME_KEY: name} for name in names[start:stop]], range(start, stop))
        if report_progress:
            report_progress(stop, store.num_episodes)


def _episode(columns: Mapping[str, Shaped[np.ndarray, "T1 ..."]], task: str) -> Any:
    from minari.data_collector import EpisodeBuffer

    terminated = columns["discount"][1:, 0] == 0
    truncated = np.zeros_like(terminated)
    truncated[-1] = not terminated[-1]
    return EpisodeBuffer(
        observations=columns["observation"],
        actions=columns["action"][1:],
        rewards=columns[f"reward/{task}"][1:],
        terminations=terminated,
        truncations=truncated,
        infos={name: columns[name] for name in INFOS if columns[name].shape[1]},
    )


def _metadata(store: Store, task: str) -> Mapping[str, Any]:
    return {
        "description": (
            f"{store.num_episodes} episodes of {store.source}, subset {store.subset} (digest "
            f"{store.subset_digest[:8]}), with rewards of {task} at action repeat {store.action_repeat}; exported "
            f"from a bpt_rl store with digest {store.digest}."
        ),
        "algorithm_name": store.source.rpartition("/")[2],
        OWN_KEY: {
            "domain": store.domain,
            "task": task,
            "action_repeat": store.action_repeat,
            "source": store.source,
            "subset": store.subset,
            "subset_digest": store.subset_digest,
            "digest": store.digest,
            "versions": store.versions,
        },
    }
