"""Frozen configuration dataclasses; `config_toml` reads and writes them, the command line overrides them."""

import dataclasses
import os
from typing import Literal

from bpt_rl.config_checks import not_negative, positive
from bpt_rl.expected_return_config import ExpectedReturnConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.td_config import TDAgentName, TDConfig

Layout = Literal[
    "return_state_action_reward",
    "return_state_action",
    "state_action_reward",
    "fused",
    "fused_without_return",
]
Implementation = Literal["auto", "reference", "blockwise", "cudnn"]
Activations = Literal["auto", "keep", "save_attention", "offload_attention", "recompute", "offload"]
FullContext = Literal["refuse", "drop_oldest"]
ContextOrder = Literal["none", "ascending", "shuffled", "random", "consecutive", "best", "worst"]
Draw = Literal["uniform", "by_length", "return_stratified", "without_replacement", "consecutive"]
Relabel = Literal["chain_maximum", "own_return", "expected_return"]
Place = Literal["auto", "accelerator", "host", "stream"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Transformer backbone and its token layout."""

    layout: Layout = "return_state_action_reward"
    """Tokens of a step: four as in the Agentic Transformer's paper, three as in the Decision Transformer's or in
    algorithm distillation's, which asks for no return; or one fused token, with the return asked for or without."""
    positions: Literal["context", "episode", "none"] = "context"
    """Rotary position of a token: counted over the whole context, or anew in each episode; or no rotary positions, as
    in the Decision Transformer. The step within the episode is embedded besides, always."""
    norm: Literal["rms", "layer"] = "rms"
    """Norm of embeddings and residual branches: by the root mean square, or LayerNorm."""
    embed_dim: int = 128
    """Width of the residual stream."""
    num_layers: int = 3
    num_heads: int = 1
    """Query heads; embed_dim must be a multiple."""
    num_kv_heads: int = 0
    """Key and value heads, a divisor of num_heads; 0 means num_heads."""
    feedforward_dim: int = 0
    """Hidden width of the feedforward; 0 means four times embed_dim."""
    activation: Literal["relu", "gelu", "silu"] = "relu"
    dropout: float = 0.1
    """Probability of dropping an entry of a residual branch in training, in [0, 1)."""
    episode_embedding: int = 0
    """Largest number of episodes told apart by a learnt embedding of the episode index; 0 for none."""
    action_distribution: Literal["deterministic", "gaussian"] = "deterministic"
    """Tanh-bounded action with mean squared error, or a Gaussian likelihood around it."""
    implementation: Implementation = "auto"
    """Attention implementation."""
    query_chunk_size: int = 512
    """Tokens a query chunk of blockwise attention."""
    key_chunk_size: int = 512
    """Tokens a key chunk of blockwise attention."""
    feedforward_chunk_size: int = 2048
    """Tokens a chunk of the blockwise feedforward; where activations keep everything, layers take the row whole."""
    activations: Activations = "auto"
    """What each layer keeps for the backward pass: everything, its input and its attention's result, the same two in
    the host's memory, its input alone (the rest is computed again), or its input in the host's memory. auto is the
    fastest that fits by the plan that `bpt-rl plan` prints; a run keeps what it began with."""
    head_groups: int = 1
    """Groups of heads that are projected and attend one after another, a divisor of the key and value heads: more
    groups, smaller temporaries; not with offload_attention."""
    layer_groups: int = 1
    """Groups of layers, a divisor of num_layers, of which only the first layer's input is kept until the backward
    pass reaches them: less is kept, for one more forward pass; 1 for none."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of activations and matrix products; parameters stay float32."""

    def __post_init__(self) -> None:
        positive(self, "embed_dim", "num_layers", "num_heads", "query_chunk_size", "key_chunk_size")
        positive(self, "feedforward_chunk_size")
        not_negative(self, "feedforward_dim", "episode_embedding")
        if self.embed_dim % (2 * self.num_heads):
            raise ValueError(
                f"embed_dim must be a multiple of 2 * num_heads, since rotary positions turn pairs; got "
                f"{self.embed_dim} and {self.num_heads}. Choose a multiple of {2 * self.num_heads}."
            )
        if self.num_kv_heads < 0 or self.num_heads % max(self.num_kv_heads, 1):
            raise ValueError(
                f"num_kv_heads must divide num_heads; got {self.num_kv_heads} and {self.num_heads}. "
                "Use a divisor, or 0 for one key head per query head."
            )
        if self.head_groups < 1 or (self.num_kv_heads or self.num_heads) % self.head_groups:
            raise ValueError(
                f"head_groups must divide the key and value heads; got {self.head_groups} and "
                f"{self.num_kv_heads or self.num_heads}. Use a divisor."
            )
        if self.head_groups > 1 and self.activations == "offload_attention":
            raise ValueError(
                "activations = offload_attention moves the attention's result of all heads at once; got head_groups "
                f"{self.head_groups}. Use activations = offload, or head_groups = 1."
            )
        if self.layer_groups < 1 or self.num_layers % self.layer_groups:
            raise ValueError(
                f"layer_groups must divide num_layers; got {self.layer_groups} and {self.num_layers}. Use a divisor."
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must lie in [0, 1); got {self.dropout}. 0 switches it off.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which trajectories a batch is made of, and how."""

    store: str = "data/store.h5"
    """HDF5 store built by `bpt-rl data build`."""
    task: str = "walker_run"
    """Task whose relabelled reward is used; the store must hold it."""
    num_trajectories: int = 4
    """Trajectories a chain (n): exactly so many in training, if there is no mixture, and by default at evaluation."""
    mixture: tuple[int, ...] = ()
    """Numbers of trajectories a chain that training mixes, num_trajectories the largest: a row's number is drawn, all
    alike, and the row is filled with chains of so many, so that each number gets its share of the steps. None trains on
    num_trajectories alone."""
    draw: Draw = "uniform"
    """How a chain's trajectories are drawn, no episode twice. uniform: all alike; by_length: in proportion to their
    steps; return_stratified: one from each of n equal bands of return; without_replacement: all alike, none again
    before the others; consecutive: a stretch of one collector's episodes, in the order of collection."""
    stride: int = 1
    """With draw = consecutive: episodes from one of the stretch to the next."""
    collectors: tuple[str, ...] = ()
    """Sources of the store's episodes that may be drawn, like walker/rnd; none means all."""
    top_fraction: float = 1.0
    """Fraction of the episodes, best by return first, that may be drawn; 0.1 for BC-10%."""
    order: Literal["ascending", "collected", "shuffled"] = "ascending"
    """Order of a chain's trajectories: ascending by return (the paper), as collected, or random."""
    relabel: Relabel = "chain_maximum"
    """Return asked of a trajectory: the largest of its chain (the paper), or its own (control). expected_return: of
    each step, its reward and what a learnt value function expects from the next state on, in place of what came."""
    completion: Literal["per_episode", "per_step"] = "per_episode"
    """Completion flag on the last step of an episode that reached the target, or on each step from there."""
    loss_on: Literal["all", "last"] = "all"
    """Trajectories of a chain whose actions are predicted."""
    window: int = 0
    """Steps of the sub-trajectory cut from each trajectory; 0 for whole trajectories."""
    window_start: Literal["inside", "anywhere"] = "inside"
    """First step of a window: any that leaves it whole, or any at all, all alike; it then ends with its episode at
    the latest (the Decision Transformer)."""
    batch_size: int = 16
    """Chains a batch, before packing; of a mixture, as many rows as chains of num_trajectories need."""
    context_length: int = 0
    """Tokens a row of the packed batch; 0 for exactly one chain of the longest trajectories."""
    place: Place = "auto"
    """Where episodes are kept: on the accelerator, in host memory, or in the store and streamed; auto goes by size."""

    def __post_init__(self) -> None:
        positive(self, "num_trajectories", "batch_size", "stride")
        not_negative(self, "window", "context_length")
        if self.mixture and (min(self.mixture) < 1 or max(self.mixture) != self.num_trajectories):
            raise ValueError(
                f"num_trajectories must be the largest number of the mixture, and all positive; got "
                f"{self.num_trajectories} and {', '.join(map(str, self.mixture))}. Set num_trajectories to the largest."
            )
        if self.mixture and self.draw == "without_replacement":
            raise ValueError(
                "Chains drawn without replacement must all be of one size; got a mixture of "
                f"{', '.join(map(str, self.mixture))}. Draw uniform, or leave the mixture out."
            )
        if self.stride != 1 and self.draw != "consecutive":
            raise ValueError(
                f"Only consecutive episodes have a stride; got stride {self.stride} and draw {self.draw!r}. Set draw "
                "to consecutive, or stride to 1."
            )
        if not 0 < self.top_fraction <= 1:
            raise ValueError(f"top_fraction must lie in (0, 1]; got {self.top_fraction}. 1 keeps all.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and clipping by the global norm."""

    num_steps: int = 10_000
    """Gradient steps in all."""
    learning_rate: float = 1e-4
    """Peak, reached after warm-up."""
    warmup_steps: int = 500
    final_learning_rate: float = 0.1
    """Rate at the last step, as a fraction of the peak."""
    weight_decay: float = 1e-4
    beta2: float = 0.95
    """Decay of the mean of squared gradients a step, in (0, 1); the Decision Transformer has 0.999."""
    clip_norm: float = 0.25
    """Largest global norm of the gradient."""
    accumulation: int = 1
    """Micro-batches whose gradients are averaged for one step."""
    place: Literal["device", "host"] = "device"
    """Where float32 parameters and AdamW's moments lie between updates: on the device, or in the host's pinned memory,
    so that the device holds only a copy of the parameters, its kernels in model.compute_dtype, while it differentiates.
    Equal but for rounding."""

    def __post_init__(self) -> None:
        positive(self, "num_steps", "learning_rate", "clip_norm", "accumulation")
        not_negative(self, "final_learning_rate", "weight_decay")
        if not 0 < self.beta2 < 1:
            raise ValueError(f"beta2 must lie in (0, 1); got {self.beta2}. 0.95 is usual for transformers.")
        if not 0 <= self.warmup_steps < self.num_steps:
            raise ValueError(
                f"warmup_steps must be smaller than num_steps; got {self.warmup_steps} and {self.num_steps}. "
                "Use about a twentieth of num_steps."
            )


AgentName = Literal["at", "dt", "ad", "bc", TDAgentName]
CHAIN_AGENTS: tuple[AgentName, ...] = ("at", "ad")
"""Agents whose contexts hold several episodes."""
CONDITIONED_AGENTS: tuple[AgentName, ...] = ("at", "dt")
"""Agents that are asked for a return."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run."""

    run: str = "runs/at"
    """Run folder. If it holds checkpoints of the same configuration, training goes on from the last."""
    agent: AgentName = "at"
    """at: Agentic Transformer; dt: Decision Transformer; ad: algorithm distillation; bc: behaviour cloning (an MLP);
    td3, td3_bc, crr, cql, iql: learning from single transitions, which reads td.* in place of model.* and optimizer.*,
    and of data.* the store, the task and the place."""
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    td: TDConfig = dataclasses.field(default_factory=TDConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    expected_return: ExpectedReturnConfig = dataclasses.field(default_factory=ExpectedReturnConfig)
    return_scale: Literal["largest_return", "mean_return", "none"] = "largest_return"
    """Returns-to-go are divided by this statistic of the data before they enter the model."""
    checkpoint_every: int = 1000
    """Gradient steps between checkpoints."""
    keep_checkpoints: int = 2
    log_every: int = 20
    """Gradient steps between lines of metrics.jsonl."""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Where metrics go beside metrics.jsonl; each needs its extra installed."""

    def __post_init__(self) -> None:
        if self.data.relabel != "expected_return" and self.expected_return != ExpectedReturnConfig():
            raise ValueError(
                "expected_return.* is read where data.relabel is expected_return; got relabel "
                f"{self.data.relabel!r} and {self.expected_return}. Leave expected_return.* out, or relabel so."
            )
        if self.mesh.num_devices > 1 and self.agent not in (*CHAIN_AGENTS, *CONDITIONED_AGENTS):
            raise ValueError(
                f"Agents with a transformer train on several devices; got agent {self.agent!r} and mesh {self.mesh}. "
                "Leave mesh.* out, or train at, dt or ad."
            )
        if self.mesh.num_devices > 1 and self.optimizer.place == "host":
            raise ValueError(
                "Several devices keep the optimizer's state among them; got optimizer.place 'host' and mesh "
                f"{self.mesh}. Use mesh.context or mesh.fsdp to split it, or one device."
            )
        positive(self, "checkpoint_every", "keep_checkpoints", "log_every")
        not_negative(self, "seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """What a training run would need; no file is read but the configuration's own."""

    tokens: int = 0
    """Tokens of a row, one row for each of mesh.data * mesh.fsdp; 0 for the rows that data.* make of the task's full
    episodes."""
    device: Literal["h100", "this"] = "this"
    """An H100 of 80 GB, of whose memory JAX is given 95%, or the first device of this machine; with mesh.*, as many of
    them as that, whether they are here or not."""
    host_gib: float = 0
    """Memory of the host that the step may take, GiB, shared by the devices that are in it; 0 for what is free on this
    machine, or for as much as a step takes beside an H100."""

    def __post_init__(self) -> None:
        super().__post_init__()
        not_negative(self, "tokens", "host_gib")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Rollouts of a trained run in DMC."""

    num_episodes: int = 0
    """Episodes of a chain, in one context (n); 0 means the run's num_trajectories for at and ad, 4 for others."""
    num_chains: int = 16
    """Chains rolled out in parallel, each in an environment of its own."""
    target: Literal["largest", "quantile", "explicit"] = "largest"
    """Target return: the data's largest, their `target_quantile`, or `target_value`."""
    target_quantile: float = 0.9
    target_value: float = 0.0
    """Return asked for, unscaled, if target is explicit."""
    target_multiple: float = 1.0
    """Factor on the target return."""
    target_sweep: tuple[float, ...] = ()
    """Also roll out chains of `sweep_episodes` that ask for these multiples of the target: is it obtained?"""
    sweep_episodes: int = 1
    context_order: ContextOrder = "none"
    """Trajectories of the training data that each context begins with. random: drawn; ascending: the same, by return,
    as in training; shuffled: the same, in another order; consecutive: a stretch of one collector's, with the stride of
    training; best, worst: the data's, ascending."""
    num_context_trajectories: int = 0
    """How many of them, before the episodes of the chain."""
    context_capacity: int = 0
    """Trajectories that fit into a context, given and played; 0 for all."""
    full_context: FullContext = "refuse"
    """What to do with a chain that outgrows context_capacity: refuse it, or drop the oldest trajectories, whole."""
    sample: bool = False
    """Draw actions from a Gaussian head instead of taking their mean; agents without one take their action."""
    seed: int = -1
    """Seed of the environments and of drawn actions; training never uses it. -1 for 1,000,000 and the run's own: so
    runs of several seeds differ in start states too, and intervals over them speak of those as well."""
    num_workers: int = 0
    """Simulator processes; 0 means one a core."""
    max_environments: int = 128
    """Environments at once, unless there are more chains: a policy that knows nothing of the episodes before plays a
    chain's episodes side by side."""
    memoryless: bool = True
    """Also roll out the control: the same checkpoint, its context cleared before each episode."""
    random: bool = True
    """Also roll out uniform-random actions."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig, repr=False)
    """Devices that share the chains (data) and each chain's cache (context); all have all parameters, so that fsdp is
    1. Numbers change by rounding alone, and a record is named without it."""

    def __post_init__(self) -> None:
        positive(self, "num_chains", "target_multiple", "sweep_episodes", "max_environments")
        not_negative(self, "num_episodes", "num_workers", "num_context_trajectories", "context_capacity")
        if self.seed != -1:
            not_negative(self, "seed")
        if not 0 <= self.target_quantile <= 1:
            raise ValueError(f"target_quantile must lie in [0, 1]; got {self.target_quantile}. 0.9 is usual.")
        if (self.num_context_trajectories == 0) != (self.context_order == "none"):
            raise ValueError(
                "A context has an order just if it has trajectories; got context_order "
                f"{self.context_order!r} and num_context_trajectories {self.num_context_trajectories}. Set both or "
                "neither."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DownloadConfig:
    """Fetching one of ExoRL's zips."""

    out: str = "data/exorl"
    """Folder that receives {domain}/{collector}.zip."""
    mirror: str = dataclasses.field(default_factory=lambda: os.environ.get("BPT_RL_EXORL_MIRROR", ""))
    """URL of a folder with {domain}/{collector}.zip, http or https; $BPT_RL_EXORL_MIRROR if set, else ExoRL's own."""
    num_tries: int = 6
    """Failed tries in a row before it gives up; one that brought new bytes starts the count anew."""
    first_wait: float = 1.0
    """Seconds before the second try; doubled for each after it, unless the server names a time."""
    timeout: float = 30.0
    """Seconds without a byte after which a try has failed."""

    def __post_init__(self) -> None:
        positive(self, "num_tries", "timeout")
        not_negative(self, "first_wait")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Relabelling episodes into an HDF5 store."""

    source: tuple[str, ...] = ("data/exorl/walker/ornstein_uhlenbeck/buffer",)
    """Folders or zips of episodes, all of one domain, read one after another; or minari:DATASET_ID, one Minari
    dataset with Box spaces, whose actions are mapped from their bounds to [-1, 1], those outside to the nearest."""
    out: str = "data/store.h5"
    tasks: tuple[str, ...] = ()
    """Tasks to relabel; none means every named task of the domain."""
    domain: str = ""
    """Needed only if no task is named and the folder's path does not say the domain."""
    action_repeat: int = 1
    """Control steps an agent's action spans: rows are merged, rewards added; it must be constant there."""
    subset: str = "full"
    """Which episodes: full, first-1M (steps), first-5k (episodes), stratified-1M (steps, spread evenly over the
    ranking by return under the first task), any first-N-steps, first-N-episodes, stratified-N-steps,
    stratified-N-episodes, or list:FILE with one file name a line. The name travels to every result."""
    num_workers: int = 0
    """Relabelling processes; 0 means one a core."""

    def __post_init__(self) -> None:
        positive(self, "action_repeat")
        not_negative(self, "num_workers")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """Writing a store as a Minari dataset."""

    task: str = ""
    """Task whose rewards the dataset holds; none means the first of the store."""
    dataset_id: str = ""
    """NAMESPACE/NAME-vNUMBER in the folder that $MINARI_DATASETS_PATH names, else ~/.minari/datasets; none means one
    made of source, subset and task."""
