"""Attention of new tokens to those that a cache holds, on one device or on several that share its slots."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from bpt_rl.nn.zigzag import Placement, chunk_order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stripes:
    """How the devices of a mesh axis share the slots of a cache: step by step in turn.

    With three devices and two tokens a step, slots lie so:

        0 1 6 7 12 13 | 2 3 8 9 14 15 | 4 5 10 11 16 17

    In turn, because each device then has the same number of tokens from the first step on, and a cache that grows is
    padded on each device by itself, where contiguous ranges would have to move. By steps, because all tokens of a
    decoding step are then one device's, which writes them in one piece.

    The other devices write them too, each where its own next step will go: nothing sees that place before. So every
    device does the same to its part, in place, where leaving a part as it is would have to be chosen after the write,
    and a choice between two caches makes a copy. A cache needs one turn of steps more for it than it holds.
    """

    name: str
    """Of the mesh axis."""
    num_devices: int
    """Along it."""
    step_tokens: int
    """Tokens of a step."""

    def slots(self, num_local: int) -> Int[Array, "local"]:
        """Returns which slots of the cache the `num_local` places of this device are."""
        turn, token = jnp.divmod(jnp.arange(num_local), self.step_tokens)
        slots: Array = (turn * self.num_devices + jax.lax.axis_index(self.name)) * self.step_tokens + token
        return slots

    def places(self, slots: Int[Array, "B"]) -> Int[Array, "B"]:
        """Returns where this device writes the steps that begin at these slots."""
        num_before = slots // self.step_tokens + self.num_devices - 1 - jax.lax.axis_index(self.name)
        return num_before // self.num_devices * self.step_tokens

    def dealt(
        self, new: Float[Array, "B S_local H_kv K"], placement: Placement, num_dummy: int
    ) -> Float[Array, "B S_local H_kv K"]:
        """Returns this device's places of a cache whose slots from `num_dummy` on hold a sequence.

        Each device sends every other one its share of what it has: nobody holds more than its own.

        Args:
          new: This device's share of the sequence, placed so, each chunk a multiple of `num_devices` steps.
          placement: Of the sequence.
          num_dummy: First slots of the cache, which hold zeros; fewer than a step. As many of the sequence's last
            tokens are left out.
        """
        order = chunk_order(self.num_devices, placement)
        B, _, H, K = new.shape
        chunks = new.reshape(B, len(order) // self.num_devices, -1, self.num_devices, self.step_tokens, H, K)
        arrived = jax.lax.all_to_all(chunks, self.name, split_axis=3, concat_axis=1)
        by_chunk = arrived.reshape(B, len(order), -1, self.step_tokens, H, K)
        steps: Array = by_chunk[:, np.argsort(order)].reshape(B, -1, self.step_tokens, H, K)
        if num_dummy:
            num_own = self.step_tokens - num_dummy
            steps = jnp.concatenate([self._of_steps_before(steps[:, :, num_own:]), steps[:, :, :num_own]], 2)
        return steps.reshape(B, -1, H, K)

    def _of_steps_before(self, of_steps: Float[Array, "B T_local *_"]) -> Float[Array, "B T_local *_"]:
        """Returns what the steps just before this device's hold; zeros before the first."""
        hops = [(i, (i + 1) % self.num_devices) for i in range(self.num_devices)]
        before = jax.lax.ppermute(of_steps, self.name, hops)
        # The step before the first device's next one is the last device's of this turn.
        later = jnp.pad(before[:, :-1], ((0, 0), (1, 0), *((0, 0) for _ in before.shape[2:])))
        found: Array = jnp.where(jax.lax.axis_index(self.name) == 0, later, before)
        return found


def write_step(
    cached: Float[Array, "B H_kv C K"],
    new: Float[Array, "B S H_kv K"],
    slots: Int[Array, "B"],
    stripes: Stripes | None = None,
) -> Float[Array, "B H_kv C K"]:
    """Returns the keys or values of a cache with those of a step's tokens, in place where the cache is donated.

    Args:
      cached: Or this device's share.
      new: Of the same tokens on every device that shares the cache.
      slots: Where each row's first token goes, a multiple of S where devices share the cache.
      stripes: How devices share it.
    """
    places = slots if stripes is None else stripes.places(slots)
    write = jax.vmap(lambda cached, new, place: jax.lax.dynamic_update_slice(cached, new, (0, place, 0)))
    written: Array = write(cached, new.swapaxes(1, 2).astype(cached.dtype), places)
    return written


def cached_attention(
    query: Float[Array, "B S H K"],
    key: Float[Array, "B H_kv C K"],
    value: Float[Array, "B H_kv C K"],
    slots: Int[Array, "B S"],
    num_dummy: int,
    stripes: Stripes | None = None,
) -> Float[Array, "B S H K"]:
    """Returns what the queries of new tokens find in a cache that holds these tokens already.

    Devices that share the cache attend to their own part of it, and exchange [B, S, H, K + 1] numbers: what they found,
    and its log-sum-exp. Each then has the same result, bit for bit.

    Args:
      query: Alike on all devices that share the cache.
      key: Or this device's share.
      value: Likewise.
      slots: Of the new tokens in the cache; later slots are not seen.
      num_dummy: First slots of the cache, which no later token may see.
      stripes: How devices share the cache.
    """
    B, S, H, K = query.shape
    grouped = query.reshape(B, S, key.shape[1], -1, K)
    logits = jnp.einsum("bsngk,bnck->bngsc", grouped, key, preferred_element_type=jnp.float32) / math.sqrt(K)
    cached = jnp.arange(key.shape[2]) if stripes is None else stripes.slots(key.shape[2])
    is_past = (cached <= slots[..., None]) & (cached >= num_dummy)
    # A dummy sees itself, so that its softmax, which nothing reads, stays finite.
    is_visible = is_past | (cached == slots[..., None])
    masked = jnp.where(is_visible[:, None, None], logits, -jnp.inf)
    # A device may hold nothing of what a row sees: its log-sum-exp is then -inf, and nothing is no number.
    peak = jnp.maximum(masked.max(axis=-1, keepdims=True), jnp.finfo(jnp.float32).min)
    exponentials = jnp.exp(masked - peak)
    total = exponentials.sum(axis=-1, keepdims=True)
    weights = exponentials / jnp.where(total > 0, total, 1)
    # What is still to be merged is not rounded.
    kind = jnp.float32 if stripes else None
    attended = jnp.einsum(
        "bngsc,bnck->bsngk", weights.astype(value.dtype), value, preferred_element_type=kind
    )
    if stripes:
        log_sum_exp = (peak + jnp.log(total)).transpose(0, 3, 1, 2, 4)
        attended = _merged(attended, log_sum_exp, stripes)
    return attended.reshape(B, S, H, K).astype(query.dtype)


def _merged(attended: Array, log_sum_exp: Array, stripes: Stripes) -> Array:
    parts = jax.lax.all_gather(jnp.concatenate([attended, log_sum_exp], axis=-1), stripes.name)
    shares = jax.nn.softmax(parts[..., -1:], axis=0)
    return jnp.sum(shares * parts[..., :-1], axis=0)
