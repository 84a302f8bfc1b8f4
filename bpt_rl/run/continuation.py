"""Beginning a run and going on with it: what its folder says of it, and what may not change in between."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax

from bpt_rl import config_toml
from bpt_rl.config import TrainConfig
from bpt_rl.config_toml import flat
from bpt_rl.run import records

UNFIXED_FIELDS = (
    "run",
    "checkpoint_every",
    "keep_checkpoints",
    "log_every",
    "logger",
    "data.store",
    "data.place",
    "mesh.data",
    "mesh.fsdp",
    "mesh.context",
    "mesh.attention",
    "model.activations",
    "model.head_groups",
    "model.layer_groups",
    "optimizer.place",
)
"""Fields that may change between a run and its continuation: they change no parameter but by rounding, a mesh also by
what dropout draws.

A store may lie elsewhere by then; its digest tells whether it is the same. Sizes of chunks are not among them: each
chunk draws dropout of its own.
"""


def check_continuation(
    config: TrainConfig, folder: records.RunFolder, digest: str, latest: int | None
) -> None:
    """Checks that a run folder can go on with a configuration and a store.

    Args:
      config: Asked for now.
      folder: Of the run.
      digest: Of the store.
      latest: Gradient steps of the newest checkpoint; None if the run begins.

    Raises:
      ValueError: If it began with another configuration or other data.
    """
    if latest is None:
        return
    old = folder.config()
    before, now = flat(dataclasses.asdict(old)), flat(dataclasses.asdict(config))
    changed = [name for name in now if now[name] != before.get(name) and name not in UNFIXED_FIELDS]
    if changed:
        name = changed[0]
        raise ValueError(
            f"A run folder keeps one configuration; {folder.path} was trained with {name} = {before.get(name)!r}, "
            f"and got {now[name]!r}. Name another folder with --run, or put the old value back."
        )
    if folder.statistics().digest != digest:
        raise ValueError(
            f"A run goes on with the data it began with; {folder.path} began with store digest "
            f"{folder.statistics().digest[:12]}, and {config.data.store} has {digest[:12]}. Name another folder."
        )


def write_description(
    config: TrainConfig,
    folder: records.RunFolder,
    statistics: Mapping[str, Any],
    start: int,
    facts: Mapping[str, Any],
) -> None:
    """Writes what a run is: its configuration, statistics and versions; metrics after `start` are removed.

    Args:
      config: Of the run.
      folder: Of the run.
      statistics: Of the data.
      start: Gradient steps done.
      facts: Written beside the versions.
    """
    records.write_atomically(folder.config_path, config_toml.to_toml(config))
    records.write_json(folder.path / "statistics.json", statistics)
    device = f"{jax.devices()[0].device_kind} ({jax.default_backend()})"
    records.write_json(folder.path / "versions.json", records.versions() | {"device": device, **facts})
    kept = [line for line in folder.metrics() if line["step"] <= start]
    records.write_atomically(folder.metrics_path, "".join(json.dumps(line) + "\n" for line in kept))
