"""What environments and their owner tell each other at every step, in memory that processes share."""

import ctypes
import dataclasses
import math
import multiprocessing
from typing import Any

import numpy as np

_CODES: dict[Any, Any] = {
    np.dtype(np.float32): ctypes.c_float,
    np.dtype(np.float64): ctypes.c_double,
    np.dtype(bool): ctypes.c_bool,
}


@dataclasses.dataclass(frozen=True)
class SharedArray:
    """An array of zeros without a name, that every process it is sent to at its start sees the same.

    Whoever writes must tell the readers: nothing is locked.
    """

    shape: tuple[int, ...]
    dtype: type
    buffer: Any = None

    def __post_init__(self) -> None:
        if self.buffer is None:
            context = multiprocessing.get_context("spawn")
            made = context.RawArray(_CODES[np.dtype(self.dtype)], math.prod(self.shape))
            object.__setattr__(self, "buffer", made)

    @property
    def array(self) -> np.ndarray:
        """The array itself, not a copy."""
        return np.frombuffer(self.buffer, self.dtype).reshape(self.shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Board:
    """The last step of N environments: their owner writes actions, their processes the rest."""

    action: SharedArray
    """[N, A] float64."""
    observation: SharedArray
    """[N, O] float32; of a new episode where `done`."""
    final_observation: SharedArray
    """[N, O] float32; the last of the old episode where `done`, else as `observation`."""
    reward: SharedArray
    """[N] float64."""
    done: SharedArray
    """[N] bool."""

    @classmethod
    def make(cls, num_environments: int, *, observation_dim: int, action_dim: int) -> "Board":
        """Returns a board of zeros."""
        return cls(
            action=SharedArray((num_environments, action_dim), np.float64),
            observation=SharedArray((num_environments, observation_dim), np.float32),
            final_observation=SharedArray((num_environments, observation_dim), np.float32),
            reward=SharedArray((num_environments,), np.float64),
            done=SharedArray((num_environments,), np.bool_),
        )
