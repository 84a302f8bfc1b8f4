"""What a decoding step needs of the host, as one array: each array that goes to a device costs the host a call."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from bpt_rl.nn.trajectory_model import Step

_LENGTH, _CALL = 0, 1
_INTEGERS = ("previous_step", "previous_episode", "step", "episode")
_REALS = ("previous_reward", "previous_completion", "return_to_go")
_FIRST_REAL = 2 + len(_INTEGERS)
_FIRST_VECTOR = _FIRST_REAL + len(_REALS)


def num_columns(observation_dim: int, action_dim: int) -> int:
    """Returns N, the numbers of a packed row."""
    return _FIRST_VECTOR + action_dim + observation_dim


def pack(step: Step, length: Int[np.ndarray, "B"], call: int) -> Int[np.ndarray, "B N"]:
    """Returns a row for each context.

    Reals are kept as float32, bit for bit, in an array of integers and not the other way round: a device that takes
    tiny reals for zero would take small integers for it too.

    Args:
      step: In the model's units.
      length: Tokens of each context so far.
      call: Number of the step among those of its policy, which its noise is drawn for.
    """
    action, observation = step.previous_action, step.observation
    action_dim = action.shape[1]
    packed = np.empty((len(length), num_columns(observation.shape[1], action_dim)), np.int32)
    packed[:, _LENGTH], packed[:, _CALL] = length, call
    for column, name in enumerate(_INTEGERS, 2):
        packed[:, column] = getattr(step, name)
    reals = packed.view(np.float32)
    for column, name in enumerate(_REALS, _FIRST_REAL):
        reals[:, column] = getattr(step, name)
    reals[:, _FIRST_VECTOR : _FIRST_VECTOR + action_dim] = action
    reals[:, _FIRST_VECTOR + action_dim :] = observation
    return packed


def unpack(packed: Int[jax.Array, "B N"], action_dim: int) -> tuple[Step, Int[jax.Array, "B"]]:
    """Returns the step and the length of each context, of all rows or of some."""
    reals = jax.lax.bitcast_convert_type(packed, jnp.float32)
    fields = {name: packed[:, column] for column, name in enumerate(_INTEGERS, 2)}
    fields |= {name: reals[:, column] for column, name in enumerate(_REALS, _FIRST_REAL)}
    fields["previous_action"] = reals[:, _FIRST_VECTOR : _FIRST_VECTOR + action_dim]
    fields["observation"] = reals[:, _FIRST_VECTOR + action_dim :]
    return Step(**fields), packed[:, _LENGTH]


def key_of(key: jax.Array, packed: Int[Any, "B N"]) -> jax.Array:
    """Returns the key of this call's noise."""
    return jax.random.fold_in(key, packed[0, _CALL])
