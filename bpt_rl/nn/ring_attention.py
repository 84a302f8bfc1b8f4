"""Attention over a sequence that devices share: keys and values travel around a ring, queries stay.

Each device attends to its own keys, then to those that its neighbour hands on, and so on around; outputs are merged
by their log-sum-exps. No device ever holds more than two parts of the keys: the one it attends to, and the one that
arrives meanwhile. The backward pass sends keys and values around once more, and their gradients one turn behind them,
each device adding its share, until they are home.

Source: Liu, Zaharia and Abbeel 2023 (Ring Attention); Brandon et al. 2023 (Striped Attention) for the balance.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from bpt_rl.nn import blockwise, cudnn_block
from bpt_rl.nn.blockwise import RESIDUAL_NAME, Attended, ChunkSizes, Operands
from bpt_rl.nn.zigzag import Placement


class Ring(NamedTuple):
    """Static facts of the devices that share a sequence."""

    axis_name: str
    """Of the mesh."""
    num_devices: int
    placement: Placement
    is_causal: bool
    sizes: ChunkSizes
    """Of blockwise's chunks."""
    implementation: Literal["blockwise", "cudnn"] = "blockwise"
    """What attends to the keys that a device holds. cudnn has no segments."""

    def attend(self, operands: Operands, *, is_causal: bool = False) -> tuple[Array, Array]:
        """Returns output and log-sum-exp of attention to these keys, float32 or wider."""
        if self.implementation == "cudnn":
            return cudnn_block.attend_to_block(operands, is_causal=is_causal)
        return blockwise.attend_to_block(operands, self.sizes, is_causal=is_causal)

    def gradient(
        self, operands: Operands, attended: Attended, *, is_causal: bool = False
    ) -> tuple[Array, Array, Array]:
        """Returns these keys' summand of the query gradient, and their own gradients, float32 or wider."""
        if self.implementation == "cudnn":
            return cudnn_block.block_gradient(operands, attended, is_causal=is_causal)
        return blockwise.block_gradient(operands, attended, self.sizes, is_causal=is_causal)

    @property
    def last_turn(self) -> Array:
        """How many hops the keys make that travel farthest.

        Traced, so that the loop over turns is no scan, for which a rematerialised layer would keep the masks of each.
        """
        return jnp.minimum(jax.lax.axis_index(self.axis_name), 0) + self.num_devices - 1

    def send(self, tree: Any) -> Any:
        """Returns what the device before this one holds."""
        hops = [(i, (i + 1) % self.num_devices) for i in range(self.num_devices)]
        return jax.tree.map(lambda leaf: jax.lax.ppermute(leaf, self.axis_name, hops), tree)


class _Keys(NamedTuple):
    """What travels."""

    pair: Float[Array, "2 B S_local H_kv K"]
    """Keys and values, as one array: of several that are sent at a time, XLA hides one."""
    segment_ids: Int[Array, "B S_local"] | None


class _Part(NamedTuple):
    """Which of the local queries attend to which of the keys that have arrived."""

    queries: slice
    keys: slice


_WHOLE = _Part(slice(None), slice(None))


def ring_attention(
    query: Float[Array, "B S_local H K"],
    key: Float[Array, "B S_local H_kv K"],
    value: Float[Array, "B S_local H_kv K"],
    segment_ids: Int[Array, "B S_local"] | None,
    ring: Ring,
) -> Float[Array, "B S_local H K"]:
    """Returns attention of this device's queries to the keys of all, inside `jax.shard_map(..., check_vma=False)`.

    Args:
      query: This device's share of a sequence placed as the ring says (`bpt_rl.nn.zigzag.placed`).
      key: Its share; H_kv heads travel, however many query heads there are.
      value: Same shape as `key`.
      segment_ids: Its share; tokens attend within equal ids only.
      ring: Of the devices.

    Raises:
      ValueError: If zigzag placement cannot halve a device's share.
    """
    if ring.placement == "zigzag" and query.shape[1] % 2:
        raise ValueError(
            "Zigzag placement must give each device two chunks of one size; got a share of "
            f"{query.shape[1]} tokens. Pad the sequence, or place it contiguously."
        )
    return _attend(ring, query, _Keys(jnp.stack((key, value)), segment_ids))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(ring: Ring, query: Array, keys: _Keys) -> Array:
    return _forward(ring, query, keys)[0]


def _forward(ring: Ring, query: Array, keys: _Keys) -> tuple[Array, tuple[Array, _Keys, Array, Array]]:
    def visit(state: tuple[Array, Array], held: _Keys, part: _Part) -> tuple[Array, Array]:
        """Returns output and log-sum-exp with a part of the keys that are held merged in."""
        rows = part.queries
        block = ring.attend(_operands(query, keys, held, part))
        merged = _merged((state[0][:, rows], state[1][:, rows]), block)
        return _written(state[0], rows, merged[0]), _written(state[1], rows, merged[1])

    def turn(state: tuple[Array, Array], held: _Keys, number: Array | int) -> tuple[Array, Array]:
        branches = [functools.partial(visit, part=part) for part in _parts(ring, query)]
        case = _case(ring, query, keys, held, number)
        result: tuple[Array, Array] = jax.lax.switch(
            case, [lambda state, held: state, *branches], state, held
        )
        return result

    def body(number: Array, carry: tuple[Any, _Keys]) -> tuple[Any, _Keys]:
        state, held = carry
        # Nothing here waits for it: it travels while this device attends.
        arriving = ring.send(held)
        return turn(state, held, number), arriving

    held = ring.send(keys) if ring.num_devices > 1 else keys
    state = ring.attend(_operands(query, keys, keys, _WHOLE), is_causal=ring.is_causal)
    if ring.num_devices > 2:
        state, held = jax.lax.fori_loop(1, ring.last_turn, body, (state, held))
    if ring.num_devices > 1:
        state = turn(state, held, ring.num_devices - 1)
    out = checkpoint_name(state[0].astype(query.dtype), RESIDUAL_NAME)
    log_sum_exp = checkpoint_name(state[1], RESIDUAL_NAME)
    return out, (query, keys, out, log_sum_exp)


class _Gradients(NamedTuple):
    """Of this device's queries, and of the keys that it holds at the moment, summed over the devices so far."""

    query: Float[Array, "B S_local H K"]
    pair: Float[Array, "2 B S_local H_kv K"]


def _backward(
    ring: Ring, residuals: tuple[Array, _Keys, Array, Array], cotangent: Array
) -> tuple[Array, _Keys]:
    query, keys, out, log_sum_exp = residuals
    attended = Attended(out, log_sum_exp, cotangent)

    def gradient(held: _Keys, part: _Part, attended: Attended, *, is_causal: bool = False) -> _Gradients:
        d_query, *d_pair = ring.gradient(_operands(query, keys, held, part), attended, is_causal=is_causal)
        return _Gradients(d_query, jnp.stack(d_pair))

    def visit(state: _Gradients, held: _Keys, part: _Part) -> _Gradients:
        of_rows = Attended(*(array[:, part.queries] for array in attended))
        block = gradient(held, part, of_rows)
        return _Gradients(
            _written(state.query, part.queries, state.query[:, part.queries] + block.query),
            _written(state.pair, part.keys, block.pair, axis=2),
        )

    def turn(state: _Gradients, held: _Keys, number: Array | int) -> _Gradients:
        # Of the keys that have arrived; what other devices added to theirs arrives meanwhile, and is added last.
        arriving = ring.send(state.pair)
        fresh = _Gradients(state.query, jnp.zeros_like(state.pair))
        branches = [functools.partial(visit, part=part) for part in _parts(ring, query)]
        case = _case(ring, query, keys, held, number)
        added: _Gradients = jax.lax.switch(case, [lambda state, held: state, *branches], fresh, held)
        return _Gradients(added.query, added.pair + arriving)

    def body(number: Array, carry: tuple[_Gradients, _Keys]) -> tuple[_Gradients, _Keys]:
        state, held = carry
        arriving = ring.send(held)
        return turn(state, held, number), arriving

    held = ring.send(keys) if ring.num_devices > 1 else keys
    state = gradient(keys, _WHOLE, attended, is_causal=ring.is_causal)
    if ring.num_devices > 2:
        state, held = jax.lax.fori_loop(1, ring.last_turn, body, (state, held))
    if ring.num_devices > 1:
        state = turn(state, held, ring.num_devices - 1)
    # Complete, they are rounded before they go home: nothing hides that way.
    home = state.pair.astype(keys.pair.dtype)
    if ring.num_devices > 1:
        home = ring.send(home)
    return state.query.astype(query.dtype), _Keys(home, None)


_attend.defvjp(_forward, _backward)


def _operands(query: Array, keys: _Keys, held: _Keys, part: _Part) -> Operands:
    """Returns a part of the queries and of the keys that are held, and the segments of both."""
    rows, columns = part
    ids = None
    if keys.segment_ids is not None and held.segment_ids is not None:
        ids = keys.segment_ids[:, rows], held.segment_ids[:, columns]
    key, value = held.pair[:, :, columns]
    return Operands(query[:, rows], key, value, ids)


def _parts(ring: Ring, query: Array) -> list[_Part]:
    """Returns who attends to what: first to keys of a device before this one in the ring's order, then of one behind.

    Zigzag, a device before has its first chunk before all queries here and its second behind them; a device behind has
    both its chunks between this device's two. So half of all pairs are visited, whichever it is, and none is masked.
    """
    if not ring.is_causal or ring.placement == "contiguous":
        return [_WHOLE]
    half = query.shape[1] // 2
    return [_Part(slice(None), slice(0, half)), _Part(slice(half, None), slice(None))]


def _case(ring: Ring, query: Array, keys: _Keys, held: _Keys, number: Array | int) -> Array:
    """Returns which part is visited when keys have come `number` hops: its place in `_parts` and 1, or 0 for none."""
    parts = _parts(ring, query)
    meets = jnp.stack([_meet(keys, held, part) for part in parts])
    is_before = jax.lax.axis_index(ring.axis_name) >= number
    if not ring.is_causal:
        return meets[0].astype(jnp.int32)
    behind = jnp.where(meets[-1], 2, 0) if len(parts) > 1 else 0
    return jnp.where(is_before, meets[0].astype(jnp.int32), behind)


def _meet(keys: _Keys, held: _Keys, part: _Part) -> Array:
    """Returns whether queries may find keys of their segments: false only if no row's ranges of ids overlap."""
    if keys.segment_ids is None or held.segment_ids is None:
        return jnp.array(True)
    queries, others = keys.segment_ids[:, part.queries], held.segment_ids[:, part.keys]
    return jnp.any((queries.max(1) >= others.min(1)) & (queries.min(1) <= others.max(1)))


def _written(array: Array, place: slice, part: Array, *, axis: int = 1) -> Array:
    """Returns the array with that part along an axis.

    An index (`array.at`) would become an input of the `jax.shard_map`, and JAX 0.11 crashes where one turns out unused.
    """
    return jax.lax.dynamic_update_slice_in_dim(array, part, place.start or 0, axis=axis)


def _merged(left: tuple[Array, Array], right: tuple[Array, Array]) -> tuple[Array, Array]:
    """Returns output and log-sum-exp of attention to both blocks of keys."""
    log_sum_exp = jnp.logaddexp(left[1], right[1])
    of_left, of_right = (out * jnp.exp(each - log_sum_exp)[..., None] for out, each in (left, right))
    return of_left + of_right, log_sum_exp
