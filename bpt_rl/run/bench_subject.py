"""What a benchmark of steps measures: an agent, or a language model on the same backbone, on synthetic data."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bpt_rl.agents.base import Agent, Params
from bpt_rl.agents.registry import make_agent
from bpt_rl.config import ModelConfig, TrainConfig
from bpt_rl.datasets.packing import steps_of
from bpt_rl.envs.tasks import DOMAINS, Domain, domain_of
from bpt_rl.nn.device_mesh import BATCH_SPEC, make_mesh
from bpt_rl.run.activations import choose_activations
from bpt_rl.run.language_agent import LanguageAgent, text_batch
from bpt_rl.run.plan import Rows
from bpt_rl.run.synthetic import synthetic_statistics
from bpt_rl.types import PackedBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """A training step and its batch."""

    train: TrainConfig
    """Its model and optimiser; `activations` resolved."""
    agent: Agent
    make_batch: Callable[[], PackedBatch]
    """Micro-batches, in the host's memory."""
    num_rows: int
    """Of a micro-batch."""
    num_tokens: int
    """Of a row."""
    vocabulary_size: int = 0
    """Of a language model; 0 for an agent."""

    @functools.cached_property
    def mesh(self) -> Mesh | None:
        """Devices that share the step; None for one."""
        return make_mesh(self.train.mesh) if self.train.mesh.num_devices > 1 else None

    @property
    def key(self) -> jax.Array:
        """Draws dropout; on every device."""
        key = jax.random.key(self.train.seed)
        return jax.device_put(key, NamedSharding(self.mesh, PartitionSpec())) if self.mesh else key

    def placed_batch(self) -> PackedBatch:
        """Returns a batch on the device, or each device's part of it."""
        placing = NamedSharding(self.mesh, PartitionSpec(None, *BATCH_SPEC)) if self.mesh else None
        placed: PackedBatch = jax.device_put(self.make_batch(), placing)
        return placed

    @property
    def step_tokens(self) -> int:
        """Tokens of a gradient step."""
        return self.num_rows * self.num_tokens * self.train.optimizer.accumulation

    @property
    def model_flops(self) -> int:
        """Operations of a gradient step, nothing counted twice."""
        num_rows = self.num_rows * self.train.optimizer.accumulation
        return num_rows * step_flops(self.train.model, self.num_tokens) + 3 * self.logit_flops

    @property
    def logit_flops(self) -> int:
        """Operations that make the logits of a gradient step's tokens once; 0 for an agent."""
        return 2 * self.step_tokens * self.train.model.embed_dim * self.vocabulary_size


def step_flops(model: ModelConfig, num_tokens: int) -> int:
    """Returns the floating-point operations of one training step on one causal row, nothing counted twice.

    3 x layers x (2 x P x S + 2 x 2 x S^2 x D / 2), for the forward pass and a backward pass of twice its work:
    P entries of a layer's matrices, S tokens, D the width of all query heads; two matrix products of the attention,
    half of each masked. Embeddings, norms, the head, the optimiser and recomputation are left out, so that the rate
    of a step that recomputes nothing but does the same is the same number.
    """
    width = model.embed_dim
    key_width = width // model.num_heads * (model.num_kv_heads or model.num_heads)
    hidden = model.feedforward_dim or 4 * width
    entries = 2 * width * width + 2 * width * key_width + 2 * width * hidden
    return 3 * model.num_layers * (2 * entries * num_tokens + 2 * num_tokens**2 * width)


def agent_subject(train: TrainConfig, num_tokens: int, num_rows: int) -> Subject:
    """Returns the training step of an agent on random chains, one a row.

    Where the model's `activations` are auto, they are what training would choose.

    Raises:
      ValueError: If the task is unknown, `num_tokens` is no multiple of the layout's tokens a step, or attention that
        is asked for cannot run.
    """
    domain = DOMAINS[domain_of(train.data.task)]
    statistics = synthetic_statistics(train.data.task)
    rows = Rows(statistics=statistics, num_rows=num_rows, context_length=num_tokens, is_one_chain_a_row=True)
    train = choose_activations(train, rows).applied(train)
    return Subject(
        train=train,
        agent=make_agent(train, statistics),
        make_batch=lambda: synthetic_batch(train, domain, num_tokens, num_rows),
        num_rows=num_rows,
        num_tokens=num_tokens,
    )


def first_loss(agent: Agent, params: Params, batch: PackedBatch, key: jax.Array) -> jax.Array:
    """Returns the loss that `train_step` reports of the first step, dropout included."""
    step_key = jax.random.fold_in(key, 0)

    def micro(total: jax.Array, inputs: tuple[PackedBatch, jax.Array]) -> tuple[jax.Array, None]:
        micro_batch, index = inputs
        weight = micro_batch.loss_mask.sum() / jnp.maximum(batch.loss_mask.sum(), 1)
        loss, _ = agent.loss(params, micro_batch, jax.random.fold_in(step_key, index))
        return total + weight * loss, None

    return jax.lax.scan(micro, jnp.zeros(()), (batch, jnp.arange(len(batch.loss_mask))))[0]


def synthetic_batch(config: TrainConfig, domain: Domain, num_tokens: int, num_rows: int) -> PackedBatch:
    """Returns random micro-batches of one full chain a row, stacked on a leading axis as `train_step` wants them."""
    num_steps = steps_of(num_tokens, config.model.layout)
    shape = (config.optimizer.accumulation, num_rows, num_steps)
    generator = np.random.default_rng(config.seed)

    def uniform(*trailing: int, low: float = 0.0) -> np.ndarray:
        return generator.uniform(low, 1, shape + trailing).astype(np.float32)

    index = np.broadcast_to(np.arange(num_steps, dtype=np.int32), shape)
    step = index % domain.episode_steps
    return PackedBatch(
        observation=generator.normal(size=(*shape, domain.observation_dim)).astype(np.float32),
        action=uniform(domain.action_dim, low=-1.0),
        reward=uniform(),
        return_to_go=uniform(),
        completion=(step == domain.episode_steps - 1).astype(np.float32),
        step=step,
        episode=index // domain.episode_steps,
        segment_ids=None,
        loss_mask=np.ones(shape, np.float32),
    )


def language_subject(train: TrainConfig, vocabulary_size: int, num_tokens: int) -> Subject:
    """Returns the training step of a language model with the model and optimiser of `train`, on random texts."""

    def make_batch() -> PackedBatch:
        generator = np.random.default_rng(train.seed)
        shape = (train.optimizer.accumulation, 1, num_tokens + 1)
        return text_batch(generator.integers(vocabulary_size, size=shape, dtype=np.int32))

    return Subject(
        train=train,
        agent=LanguageAgent(train.model, vocabulary_size),
        make_batch=make_batch,
        num_rows=1,
        num_tokens=num_tokens,
        vocabulary_size=vocabulary_size,
    )
