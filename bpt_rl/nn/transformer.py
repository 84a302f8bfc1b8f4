"""Pre-norm causal transformer with rotary positions, blockwise feedforward and a key-value cache."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Float, Int

from bpt_rl.config import ModelConfig
from bpt_rl.nn.attention import dot_product_attention
from bpt_rl.nn.cached_attention import Stripes, cached_attention, write_step
from bpt_rl.nn.context_parallel import ContextAxis, context_attention
from bpt_rl.nn.device_mesh import Sharing
from bpt_rl.nn.feedforward import blockwise_map
from bpt_rl.nn.rematerialisation import LAYER_INPUT, keeping_attention, scan_layers
from bpt_rl.nn.rotary import apply_rotary
from bpt_rl.nn.working_copy import widened

ACTIVATIONS = {"relu": jax.nn.relu, "gelu": jax.nn.gelu, "silu": jax.nn.silu}


class KeyValueCache(NamedTuple):
    """Keys and values of every layer, one [B, H_kv, C, K] array each, for contexts of up to C tokens.

    Heads come before tokens, so that a head's keys lie side by side: read so, a GPU's whole bandwidth is used.
    """

    keys: tuple[Float[jax.Array, "B H_kv C K"], ...]
    """Already turned by their rotary positions."""
    values: tuple[Float[jax.Array, "B H_kv C K"], ...]
    length: Int[jax.Array, "B"]
    """Tokens held for each row; a row may be cleared by setting its length to 0."""


class ProjectionKernels(NamedTuple):
    """Weights that make queries, keys and values of some of a layer's heads."""

    query: Float[jax.Array, "D HK"]
    key: Float[jax.Array, "D H_kvK"]
    value: Float[jax.Array, "D H_kvK"]


def drop(x: Float[jax.Array, "B S *_"], rate: float, key: jax.Array | None) -> Float[jax.Array, "B S *_"]:
    """Drops entries with probability `rate` and scales up the rest; none without a key."""
    if key is None or rate == 0:
        return x
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def make_norm(config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm | nnx.LayerNorm:
    """Returns the norm that `config.norm` names, over the width of the stream."""
    if config.norm == "rms":
        return nnx.RMSNorm(config.embed_dim, param_dtype=jnp.float32, rngs=rngs)
    return nnx.LayerNorm(config.embed_dim, epsilon=1e-5, param_dtype=jnp.float32, rngs=rngs)


class Block(nnx.Module):
    """Attention and feedforward, each behind a norm and on a residual branch."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        self.num_kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = config.embed_dim // config.num_heads
        hidden = config.feedforward_dim or 4 * config.embed_dim
        linear = functools.partial(
            nnx.Linear,
            dtype=jnp.dtype(config.compute_dtype),
            param_dtype=jnp.float32,
            use_bias=False,
            rngs=rngs,
        )
        # Residual branches start small, so that the variance of the stream does not grow with depth.
        residual = nnx.initializers.variance_scaling(0.5 / config.num_layers, "fan_in", "truncated_normal")
        width = config.num_heads * self.head_dim
        self.attention_norm = make_norm(config, rngs)
        self.query = linear(config.embed_dim, width)
        self.key = linear(config.embed_dim, self.num_kv_heads * self.head_dim)
        self.value = linear(config.embed_dim, self.num_kv_heads * self.head_dim)
        self.output = linear(width, config.embed_dim, kernel_init=residual)
        self.feedforward_norm = make_norm(config, rngs)
        self.expand = linear(config.embed_dim, hidden)
        self.contract = linear(hidden, config.embed_dim, kernel_init=residual)

    def kernels(self) -> ProjectionKernels:
        """Returns the weights of all heads."""
        return ProjectionKernels(*(layer.kernel[...] for layer in (self.query, self.key, self.value)))

    def project(
        self, x: Float[jax.Array, "B S D"], positions: Int[jax.Array, "B S"], kernels: ProjectionKernels
    ) -> tuple[Float[jax.Array, "B S H K"], Float[jax.Array, "B S H_kv K"], Float[jax.Array, "B S H_kv K"]]:
        """Returns queries, keys and values of the heads of `kernels`, turned by their positions where it matters."""
        dtype = jnp.dtype(self.config.compute_dtype)
        normed = self.attention_norm(x).astype(dtype)
        query, key, value = (
            jnp.matmul(normed, kernel.astype(dtype)).reshape(*x.shape[:2], -1, self.head_dim)
            for kernel in kernels
        )
        if self.config.positions == "none":
            return query, key, value
        return apply_rotary(query, positions), apply_rotary(key, positions), value

    def attend(
        self,
        x: Float[jax.Array, "B S D"],
        positions: Int[jax.Array, "B S"],
        segment_ids: Int[jax.Array, "B S"] | None,
        axis: ContextAxis | None = None,
    ) -> Float[jax.Array, "B S HK"]:
        """Returns what the heads attend to, side by side; groups of heads one after another.

        With an axis the tokens are a share of the sequence, and attend to all of it.

        Groups project chunk by chunk, so that the normed stream never exists whole; without groups that would cost
        3% of a step and save nothing, since queries, keys and values of all heads outweigh it.
        """
        config, num_groups = self.config, self.config.head_groups
        chunk_size = config.feedforward_chunk_size if num_groups > 1 else x.shape[1]

        def attend_with(kernels: ProjectionKernels) -> Float[jax.Array, "B S H K"]:
            query, key, value = blockwise_map(
                lambda x, positions, _: self.project(x, positions, kernels), (x, positions), chunk_size
            )
            options: dict[str, Any] = {
                "implementation": config.implementation,
                "query_chunk_size": config.query_chunk_size,
                "key_chunk_size": config.key_chunk_size,
            }
            if axis:
                return context_attention(query, key, value, segment_ids, axis, **options)
            return dot_product_attention(query, key, value, segment_ids=segment_ids, **options)

        kernels = self.kernels()
        if num_groups == 1:
            return attend_with(kernels).reshape(*x.shape[:2], -1)
        one_group = attend_with if config.activations == "keep" else keeping_attention(attend_with)

        def visit(attended: jax.Array, inputs: tuple[jax.Array, ProjectionKernels]) -> tuple[jax.Array, None]:
            index, kernels = inputs
            return jax.lax.dynamic_update_index_in_dim(attended, one_group(kernels), index, axis=2), None

        split = jax.tree.map(
            lambda kernel: kernel.reshape(kernel.shape[0], num_groups, -1).swapaxes(0, 1), kernels
        )
        shape = (*x.shape[:2], num_groups, config.num_heads // num_groups, self.head_dim)
        empty = jnp.zeros(shape, config.compute_dtype)
        attended, _ = jax.lax.scan(visit, empty, (jnp.arange(num_groups), split))
        return attended.reshape(*x.shape[:2], -1)

    def feedforward(self, x: Float[jax.Array, "B S D"]) -> Float[jax.Array, "B S D"]:
        """Returns the feedforward branch, without its residual."""
        return self.contract(ACTIVATIONS[self.config.activation](self.expand(self.feedforward_norm(x))))

    def __call__(
        self,
        x: Float[jax.Array, "B S D"],
        positions: Int[jax.Array, "B S"],
        segment_ids: Int[jax.Array, "B S"] | None,
        dropout_key: jax.Array | None,
        axis: ContextAxis | None = None,
    ) -> Float[jax.Array, "B S D"]:
        """Returns the stream after this block; tokens see earlier tokens of their own segment."""
        inputs = (x, self.attend(x, positions, segment_ids, axis))
        # What is to be kept need not be made again chunk by chunk.
        chunk_size = x.shape[1] if self.config.activations == "keep" else self.config.feedforward_chunk_size
        stream: jax.Array = blockwise_map(self._residuals, inputs, chunk_size, key=dropout_key)
        return stream

    def _residuals(
        self,
        x: Float[jax.Array, "B S D"],
        attended: Float[jax.Array, "B S HK"],
        dropout_key: jax.Array | None,
    ) -> Float[jax.Array, "B S D"]:
        """Returns the stream after both residual branches, each token by itself."""
        keys = (None, None) if dropout_key is None else tuple(jax.random.split(dropout_key))
        x = x + drop(self.output(attended), self.config.dropout, keys[0])
        return x + drop(self.feedforward(x), self.config.dropout, keys[1])

    def prefill(
        self, x: Float[jax.Array, "B S D"], positions: Int[jax.Array, "B S"], axis: ContextAxis | None = None
    ) -> tuple[Float[jax.Array, "B S D"], Float[jax.Array, "B S H_kv K"], Float[jax.Array, "B S H_kv K"]]:
        """Returns the stream after this block, and its tokens' keys and values as a cache holds them.

        With an axis the tokens are a share of the sequence, and attend to all of it.
        """
        config = self.config
        query, key, value = self.project(x, positions, self.kernels())
        # A model that was trained with cudnn may act where there is none, and a ring has an implementation of its own.
        is_free = config.implementation == "cudnn" or (axis is not None and axis.method == "ring")
        options: dict[str, Any] = {
            "implementation": "auto" if is_free else config.implementation,
            "query_chunk_size": config.query_chunk_size,
            "key_chunk_size": config.key_chunk_size,
        }
        if axis:
            attended = context_attention(query, key, value, None, axis, **options)
        else:
            attended = dot_product_attention(query, key, value, **options)
        inputs = (x, attended.reshape(*x.shape[:2], -1))
        stream: jax.Array = blockwise_map(self._residuals, inputs, config.feedforward_chunk_size)
        return stream, key, value

    def decode(
        self,
        x: Float[jax.Array, "B S D"],
        cache_key: Float[jax.Array, "B H_kv C K"],
        cache_value: Float[jax.Array, "B H_kv C K"],
        length: Int[jax.Array, "B"],
        num_dummy: int,
        positions: Int[jax.Array, "B S"] | None = None,
        stripes: Stripes | None = None,
    ) -> tuple[Float[jax.Array, "B S D"], Float[jax.Array, "B H_kv C K"], Float[jax.Array, "B H_kv C K"]]:
        """Returns the stream of S new tokens and the cache that holds them too.

        Args:
          x: New tokens, the same number in every row.
          cache_key: Keys of the tokens before them.
          cache_value: Values of the tokens before them.
          length: Tokens before them, row by row.
          num_dummy: First slots of the cache that no later token may see.
          positions: Rotary positions of the new tokens; their slots if None.
          stripes: How devices share the cache, of which this one has a part.
        """
        slots = length[:, None] + jnp.arange(x.shape[1])
        query, key, value = self.project(x, slots if positions is None else positions, self.kernels())
        cache_key = write_step(cache_key, key, length, stripes)
        cache_value = write_step(cache_value, value, length, stripes)
        attended = cached_attention(query, cache_key, cache_value, slots, num_dummy, stripes)
        x = x + self.output(attended.reshape(*x.shape[:2], -1))
        return x + self.feedforward(x), cache_key, cache_value


class Transformer(nnx.Module):
    """A stack of equal blocks, scanned over their stacked parameters, and a final norm."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs) -> None:
        self.config = config
        create = nnx.vmap(lambda r: Block(config, r), in_axes=0, out_axes=0)
        self.blocks = create(rngs.split(config.num_layers))
        self.norm = make_norm(config, rngs)

    def __call__(
        self,
        x: Float[jax.Array, "B S D"],
        segment_ids: Int[jax.Array, "B S"] | None,
        dropout_key: jax.Array | None = None,
        *,
        positions: Int[jax.Array, "B S"] | None = None,
        read: Callable[[Float[jax.Array, "B C D"]], Any] = lambda normed: normed,
        tokens: slice = slice(None),
        sharing: Sharing | None = None,
    ) -> Any:
        """Returns what `read` makes of the normed stream of a packed batch of token embeddings.

        Args:
          x: Token embeddings.
          segment_ids: Tokens see only tokens of their own segment; None where each row is one.
          dropout_key: Draws dropout; none without it.
          positions: Rotary positions; those in the row if None.
          read: Maps normed tokens [B, C, D] to a tree of arrays [B, C, ...], each token by itself; it goes over them
            chunk by chunk.
          tokens: Those to be read.
          sharing: With other devices, where `x` is this device's share of the rows, or of each row's tokens.
        """
        graph, stacked = nnx.split(self.blocks)
        config = self.config
        axis = sharing.context if sharing else None
        if positions is None:
            in_row = jnp.arange(x.shape[1]) if axis is None else axis.positions(x.shape[1])
            positions = jnp.broadcast_to(in_row, x.shape[:2])

        def layer(stream: jax.Array, inputs: tuple[Any, jax.Array]) -> tuple[jax.Array, None]:
            state, index = inputs
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, index)
            stream = checkpoint_name(stream, LAYER_INPUT)
            state = sharing.gathered(state) if sharing else widened(state)
            return nnx.merge(graph, state)(stream, positions, segment_ids, key, axis), None

        layers = (stacked, jnp.arange(config.num_layers))
        stream = scan_layers(layer, x.astype(config.compute_dtype), layers, config)
        return blockwise_map(
            lambda x, _: read(self.norm(x)), (stream[:, tokens],), config.feedforward_chunk_size
        )

    def init_cache(
        self, num_rows: int, capacity: int, sharding: jax.sharding.Sharding | None = None
    ) -> KeyValueCache:
        """Returns an empty cache for `num_rows` contexts of up to `capacity` tokens.

        Args:
          num_rows: B.
          capacity: C, over all devices.
          sharding: Where keys and values lie; on the first device if None.
        """
        heads = self.config.num_kv_heads or self.config.num_heads
        shape = (num_rows, heads, capacity, self.config.embed_dim // self.config.num_heads)
        half, dtype = self.config.num_layers, self.config.compute_dtype
        empty = [jnp.zeros(shape, dtype, device=sharding) for _ in range(2 * half)]
        return KeyValueCache(tuple(empty[:half]), tuple(empty[half:]), jnp.zeros(num_rows, jnp.int32))

    def decode(
        self,
        x: Float[jax.Array, "B S D"],
        cache: KeyValueCache,
        num_dummy: int = 0,
        *,
        positions: Int[jax.Array, "B S"] | None = None,
        stripes: Stripes | None = None,
    ) -> tuple[Float[jax.Array, "B S D"], KeyValueCache]:
        """Returns the normed stream of S new tokens a row, and the cache that holds them.

        Args:
          x: New tokens.
          cache: To be written to; donate it.
          num_dummy: First slots of the cache that no later token may see.
          positions: Rotary positions; the slots in the cache if None.
          stripes: How devices share the cache, of which this one has a part; all have the new tokens.
        """
        graph, stacked = nnx.split(self.blocks)
        x = x.astype(self.config.compute_dtype)
        keys, values = [], []
        # One array a layer, written in place where the caller donates it: a scan would copy the whole cache.
        for i in range(self.config.num_layers):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
            held = (cache.keys[i], cache.values[i], cache.length)
            x, key, value = block.decode(x, *held, num_dummy, positions, stripes)
            keys.append(key)
            values.append(value)
        length = cache.length + x.shape[1]
        return self.norm(x), KeyValueCache(tuple(keys), tuple(values), length)

    def prefill(
        self,
        x: Float[jax.Array, "contexts S D"],
        cache: KeyValueCache,
        rows: Int[Any, "contexts"],
        num_tokens: Int[Any, "contexts"],
        num_dummy: int = 0,
        *,
        positions: Int[jax.Array, "contexts S"] | None = None,
        shares: tuple[ContextAxis, Stripes] | None = None,
    ) -> KeyValueCache:
        """Returns the cache as decoding the tokens step by step would have left it, for one pass over all of them.

        Attention is the model's own and the feedforward goes chunk by chunk, as in training: nothing grows with the
        square of S, nor with S times the feedforward's width.

        Args:
          x: Token embeddings of contexts that begin anew, padding behind each.
          cache: To be filled; donate it, and each layer is written in place.
          rows: Which rows of the cache the contexts go to, ascending; the others stay as they are. What is to go
            behind the last row goes nowhere.
          num_tokens: Tokens that each row is to hold, dummies included; slots behind them hold padding until
            decoding overwrites it, and no earlier token sees them.
          num_dummy: First slots of the cache, which no token may see; the first of `x` goes behind them.
          positions: Rotary positions; the slots in the cache if None.
          shares: How devices share the contexts' tokens, of which `x` is a part, and how the cache.
        """
        graph, stacked = nnx.split(self.blocks)
        x = x.astype(self.config.compute_dtype)
        axis, stripes = shares or (None, None)
        if positions is None:
            in_row = jnp.arange(x.shape[1]) if axis is None else axis.positions(x.shape[1])
            positions = jnp.broadcast_to(num_dummy + in_row, x.shape[:2])
        first = num_dummy if stripes is None else 0
        num_kept = min(x.shape[1], cache.keys[0].shape[2] - first)

        def written(cached: jax.Array, new: jax.Array) -> jax.Array:
            kept = new[:, :num_kept].swapaxes(1, 2).astype(cached.dtype)
            place = cached.at[rows, :, first : first + num_kept]
            return place.set(kept, indices_are_sorted=True, unique_indices=True, mode="drop")

        keys, values = [], []
        # As in `decode`. Nothing reads what leaves the last layer, so its attention is not computed.
        for i in range(self.config.num_layers):
            block = nnx.merge(graph, jax.tree.map(lambda leaf, i=i: leaf[i], stacked))
            x, key, value = block.prefill(x, positions, axis)
            if axis and stripes:
                both = jnp.concatenate([key, value], axis=2)
                key, value = jnp.split(stripes.dealt(both, axis.placement, num_dummy), 2, axis=2)
            keys.append(written(cache.keys[i], key))
            values.append(written(cache.values[i], value))
        return KeyValueCache(tuple(keys), tuple(values), cache.length.at[rows].set(num_tokens, mode="drop"))
