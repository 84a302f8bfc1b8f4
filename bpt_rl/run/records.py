"""The run folder: what is written where, and reading it back."""

import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from bpt_rl import config_toml
from bpt_rl.config import Activations, TrainConfig
from bpt_rl.types import DataStatistics, EpisodeFailure, EpisodeLog

PACKAGES = (
    "bpt-rl",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "dm_control",
    "mujoco",
    "h5py",
)


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """Paths and contents of one training run."""

    path: Path

    @property
    def config_path(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.toml"

    @property
    def metrics_path(self) -> Path:
        """One JSON object a logged gradient step."""
        return self.path / "metrics.jsonl"

    @property
    def expected_return_path(self) -> Path:
        """Expected returns-to-go of the store's steps, where chains are relabelled by them."""
        return self.path / "expected_return.npy"

    @property
    def exhausted_path(self) -> Path:
        """What layers kept when memory ran out; there only if it did, with `model.activations = "auto"`."""
        return self.path / "out_of_memory.json"

    @property
    def checkpoints_path(self) -> Path:
        """Orbax checkpoints, one folder a step."""
        return self.path / "checkpoints"

    @property
    def evaluations_path(self) -> Path:
        """One JSON file an evaluation."""
        return self.path / "evaluations"

    def config(self) -> TrainConfig:
        """Returns the resolved configuration.

        Raises:
          FileNotFoundError: If this is not a run folder.
        """
        if not self.config_path.is_file():
            raise FileNotFoundError(
                f"A run folder must hold config.toml; there is none in {self.path}. Name the folder that "
                "`bpt-rl train` wrote."
            )
        return config_toml.load(TrainConfig, str(self.config_path))

    def statistics(self) -> DataStatistics:
        """Returns the statistics of the training data."""
        values = json.loads((self.path / "statistics.json").read_text())
        fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        return DataStatistics(**fields)

    def versions(self) -> dict[str, Any]:
        """Returns the versions, git commit and machine that the run was trained with."""
        values: dict[str, Any] = json.loads((self.path / "versions.json").read_text())
        return values

    def exhausted(self) -> list[Activations]:
        """Returns what layers kept each time that memory ran out."""
        if not self.exhausted_path.is_file():
            return []
        values: list[Activations] = json.loads(self.exhausted_path.read_text())["activations"]
        return values

    def metrics(self) -> list[dict[str, float]]:
        """Returns the logged metrics, oldest first; a last line that a crash cut short does not count."""
        if not self.metrics_path.is_file():
            return []
        lines = self.metrics_path.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def evaluations(self) -> list[dict[str, Any]]:
        """Returns every evaluation of the run, oldest first; `evaluate.record` says what each holds."""
        return list(self.evaluation_files().values())

    def evaluation_files(self) -> dict[Path, dict[str, Any]]:
        """Returns `evaluations` by their files; those of one second in the order they were written in."""
        found = {path: json.loads(path.read_text()) for path in self.evaluations_path.glob("*.json")}

        def age(path: Path) -> tuple[str, int]:
            # A copied folder's files are all of the same age, or of any.
            return found[path].get("timings", {}).get("created", ""), path.stat().st_mtime_ns

        return {path: found[path] for path in sorted(found, key=age)}


def write_atomically(path: Path, content: str | bytes) -> None:
    """Writes a file, text as UTF-8, so that a reader sees the old content or the new, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON object atomically."""
    write_atomically(path, json.dumps(values, indent=1) + "\n")


def versions() -> dict[str, Any]:
    """Returns what a result depends on beside its configuration: packages, Python, machine, git commit."""
    packages = {}
    for name in PACKAGES:
        try:
            packages[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {
        "packages": packages,
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "git_commit": _git_commit(),
    }


def _git_commit() -> str:
    source = Path(__file__).resolve().parent
    try:
        arguments = ["git", "-C", str(source), "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"


def write_arrays(path: Path, **arrays: Any) -> None:
    """Writes an npz file atomically."""
    content = io.BytesIO()
    np.savez(content, **arrays)
    write_atomically(path, content.getvalue())


def log_to_json(log: EpisodeLog) -> dict[str, Any]:
    """Returns a log as plain JSON values, without its `seconds`: equal logs give equal values."""
    values = dataclasses.asdict(log)
    del values["seconds"]
    target = log.target_return
    return values | {
        "returns": log.returns.tolist(),
        "num_steps": log.num_steps.tolist(),
        "target_return": None if np.isnan(target) else target,
        "failures": list(values["failures"]),
    }


def log_from_json(values: Mapping[str, Any]) -> EpisodeLog:
    """Returns the log that `log_to_json` wrote."""
    target = values["target_return"]
    arrays = {
        "returns": np.asarray(values["returns"], np.float64),
        "num_steps": np.asarray(values["num_steps"], np.int64),
        "target_return": float("nan") if target is None else float(target),
        "failures": tuple(EpisodeFailure(**failure) for failure in values.get("failures", ())),
    }
    return EpisodeLog(**{**values, **arrays})
