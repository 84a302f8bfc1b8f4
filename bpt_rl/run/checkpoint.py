"""Checkpoints of a run, by Orbax: written aside and renamed, so that a kill leaves the previous one usable.

Of several processes each calls everything here, and writes and reads what its own devices have.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp


class Checkpoints:
    """The checkpoints folder of one run."""

    def __init__(self, path: Path, keep: int = 2) -> None:
        """Opens or creates the folder.

        Args:
          path: Folder with one subfolder a step.
          keep: Newest checkpoints that stay when another is saved.
        """
        self._path = path.absolute()
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(
            self._path, options=options, item_handlers=ocp.StandardCheckpointHandler()
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        """Gradient steps done at the newest complete checkpoint; None if there is none."""
        step: int | None = self._manager.latest_step()
        return step

    def save(self, step: int, state: Any) -> None:
        """Saves a pytree of arrays; returns when it is complete on disk. Ctrl-C waits for that."""
        with _uninterrupted():
            self._manager.save(step, args=ocp.args.StandardSave(state))

    def restore(self, step: int, template: Any) -> Any:
        """Returns the pytree saved at a step.

        Args:
          step: One that was saved.
          template: Pytree of the same structure, shapes and dtypes (`jax.eval_shape` gives one). Arrays come where
            their templates' sharding says, else to this process's first device; NumPy's stay NumPy's.

        Raises:
          FileNotFoundError: If there is no such checkpoint.
          ValueError: If the checkpoint belongs to another architecture.
        """
        if step not in self._manager.all_steps():
            raise FileNotFoundError(
                f"A checkpoint must be complete to be restored; there is none of step {step} in {self._path}. "
                f"Steps there: {', '.join(map(str, self._manager.all_steps())) or 'none'}."
            )
        self._check_architecture(step, template)
        target = jax.tree.map(_with_sharding, template)
        return self._manager.restore(step, args=ocp.args.StandardRestore(target))

    def _check_architecture(self, step: int, template: Any) -> None:
        saved = _shapes(self._manager.item_metadata(step))
        expected = _shapes(template)
        for name in sorted(
            saved.keys() | expected.keys(), key=lambda name: (not name.startswith("params"), name)
        ):
            if saved.get(name) != expected.get(name):
                raise ValueError(
                    f"A checkpoint must match the configured architecture; {name} is "
                    f"{saved.get(name, 'absent')} in step {step} of {self._path} and "
                    f"{expected.get(name, 'absent')} in the configuration. Use the run's own config.toml, or "
                    "another run folder."
                )


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Holds Ctrl-C back until the end: Orbax's threads do not take it well halfway."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Only the main thread receives signals.
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: received.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if received:
        raise KeyboardInterrupt


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct | np.ndarray:
    if isinstance(leaf, np.ndarray) or (isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None):
        return leaf
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    tree = getattr(tree, "tree", tree)
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    names = [
        "/".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in p)
        for p, _ in leaves
    ]
    return {name: tuple(leaf.shape) for name, (_, leaf) in zip(names, leaves, strict=True)}
