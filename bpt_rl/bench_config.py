"""Configurations of `bpt-rl bench`: what is measured, in which sizes, and how often."""

import dataclasses
from typing import Literal

from bpt_rl.config import Activations, Implementation, TrainConfig

Method = Literal[
    "full", "memory_efficient", "bpt", "save_attention", "offload_attention", "recompute", "offload"
]


def _check_counts(**counts: int | tuple[int, ...]) -> None:
    for name, count in counts.items():
        if min(count if isinstance(count, tuple) else (count,), default=0) < 1:
            raise ValueError(f"{name} must be positive and not empty; got {count}. Choose 1 or more.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepBenchConfig:
    """Training steps of one agent, on synthetic batches of one chain a row."""

    tokens: tuple[int, ...] = (4096,)
    """Lengths of a row, in tokens; multiples of the layout's tokens a step."""
    activations: tuple[Activations, ...] = ()
    """What layers keep; none means what the model says."""
    implementations: tuple[Implementation, ...] = ()
    """Attention implementations; none means that of the model."""
    num_rows: int = 1
    """Rows of a micro-batch."""
    num_steps: int = 3
    """Steps timed; the median counts, or the first that takes 20 seconds, which is then the last."""
    num_warmup_steps: int = 1
    """Steps before them that are not timed."""
    forward_only: bool = False
    """Run the forward pass alone, for its loss; times, rates and memory are then its own."""
    compile_only: bool = False
    """Compile each step and report the memory it asks for, but run none."""
    profile: bool = False
    """Run one more step and read from its profile how long GPUs send, and how much of that they hide."""
    floors: bool = True
    """Also time attention and a large matrix product alone, for the share of the step that they would take."""
    out: str = "results/bench_step.json"
    """JSON file to write, after each measurement."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """The agent, its model and optimiser. The task gives the sizes; no store is read."""

    def __post_init__(self) -> None:
        _check_counts(tokens=self.tokens, num_rows=self.num_rows, num_steps=self.num_steps)
        if self.num_warmup_steps < 0:
            raise ValueError(
                f"num_warmup_steps must not be negative; got {self.num_warmup_steps}. 1 is usual."
            )
        if self.train.agent == "bc":
            raise ValueError(
                "The agent must have a transformer, as at and dt have; got bc. Name another preset."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ContextBenchConfig:
    """Memory and time of a whole training step against the length of its one row, method by method."""

    tokens: tuple[int, ...] = (4096, 8192, 16_384, 32_768)
    """Lengths of the row; for an agent, multiples of the layout's tokens a step."""
    methods: tuple[Method, ...] = (
        "full",
        "memory_efficient",
        "bpt",
        "save_attention",
        "offload_attention",
        "recompute",
        "offload",
    )
    """full: the whole matrix of each head; memory_efficient: blockwise attention, and a feedforward of the whole row
    (Rabe and Staats); bpt: both blockwise (the paper). These compute each layer again in the backward pass. The others
    are this project's, with the attention of the model (auto: cuDNN where it can run) and that level of
    model.activations."""
    vocabulary_size: int = 0
    """Entries of a language model's vocabulary, which is then measured on a random text; 0 for the agent."""
    longest: bool = False
    """Double each method's last length that fits, compiling only, until it does not."""
    max_tokens: int = 4_194_304
    """Longest row that is tried so."""
    max_step_seconds: float = 60.0
    """Steps that should take longer are only compiled; twice the length of a measured one should take four times."""
    num_steps: int = 1
    """Steps timed, after one that is not; the median counts, or the first that takes 20 seconds, as the only one."""
    compile_only: bool = False
    """Compile each step and report the memory it asks for, but run none."""
    floors: bool = True
    """Also time attention and a large matrix product alone, for the share of the step that they would take."""
    out: str = "results/bench_context.json"
    """JSON file to write, after each measurement, with a PNG of the same name beside it at the end."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """The agent, or the language model's backbone and optimiser. The task gives the sizes; no store is read."""

    def __post_init__(self) -> None:
        _check_counts(tokens=self.tokens, methods=len(self.methods), num_steps=self.num_steps)
        _check_counts(max_tokens=self.max_tokens)
        if not self.max_step_seconds > 0:
            raise ValueError(
                f"max_step_seconds must be positive; got {self.max_step_seconds}. compile_only runs no step."
            )
        if self.vocabulary_size < 0:
            raise ValueError(
                f"vocabulary_size must not be negative; got {self.vocabulary_size}. 0 measures the agent."
            )
        if self.train.agent == "bc" and not self.vocabulary_size:
            raise ValueError(
                "The agent must have a transformer, as at and dt have; got bc. Name another preset."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlotConfig:
    """A picture of records."""

    out: str = "results/bench_context.png"
    """PNG file to write."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionBenchConfig:
    """Attention alone, causal, each row one sequence."""

    tokens: tuple[int, ...] = (1024, 4096)
    """Lengths of the sequence."""
    implementations: tuple[Implementation, ...] = ("reference", "blockwise", "cudnn")
    num_rows: int = 1
    num_heads: int = 8
    """Query heads."""
    num_kv_heads: int = 8
    """Key and value heads, a divisor of num_heads."""
    head_dim: int = 128
    dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"
    """Type of query, key and value."""
    chunk_size: int = 512
    """Tokens of a query and of a key chunk of blockwise attention."""
    num_calls: int = 5
    """Calls timed, after one that is not; the median counts, or the first that takes 5 seconds, as the only one."""
    out: str = "results/bench_attention.json"
    """JSON file to write, after each measurement."""

    def __post_init__(self) -> None:
        _check_counts(tokens=self.tokens, num_rows=self.num_rows, num_heads=self.num_heads)
        _check_counts(num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, chunk_size=self.chunk_size)
        _check_counts(num_calls=self.num_calls)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads must divide num_heads; got {self.num_kv_heads} and {self.num_heads}. Use a divisor."
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeBenchConfig:
    """The transformer on the tokens of one step, against a filled key-value cache."""

    tokens: tuple[int, ...] = (4096,)
    """Capacities of the cache, in tokens a row; it is full after the last call, but for what devices leave free."""
    num_rows: tuple[int, ...] = (1,)
    """Rows decoded at once: environments."""
    num_kv_heads: tuple[int, ...] = ()
    """Key and value heads; none means those of the model."""
    num_calls: int = 20
    """Steps timed, after one that is not; the median counts."""
    copy_bytes: int = 2**30
    """Size of the array whose copying gives the bandwidth to compare with."""
    out: str = "results/bench_decode.json"
    """JSON file to write, after each measurement."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """Only its model is used, and its mesh: the devices that share rows and caches."""

    def __post_init__(self) -> None:
        _check_counts(tokens=self.tokens, num_rows=self.num_rows, num_calls=self.num_calls)
        _check_counts(copy_bytes=self.copy_bytes, num_kv_heads=self.num_kv_heads or 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutBenchConfig:
    """Rollouts of an agent with fresh parameters: steps are timed in contexts of several lengths."""

    num_episodes: tuple[int, ...] = (4, 16, 32)
    """Episodes of a chain (n)."""
    num_chains: int = 16
    """Chains in parallel, each in an environment of its own."""
    num_parts: tuple[int, ...] = (2,)
    """Parts that chains act in; 1 waits for all simulators before each call of the policy."""
    num_workers: int = 0
    """Simulator processes; 0 means one a core."""
    num_positions: int = 8
    """Places in a chain where steps are timed."""
    num_steps: int = 20
    """Steps of every chain that are timed at each place, after two that are not."""
    uncached: bool = True
    """Also time forward passes over the whole chain so far, at three lengths."""
    uncached_chains: int = 1
    """Chains in such a pass; its time is scaled up to all chains."""
    out: str = "results/bench_rollout.json"
    """JSON file to write, after each measurement."""
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    """The agent and its model. The task is simulated; no store is read."""

    def __post_init__(self) -> None:
        _check_counts(num_episodes=self.num_episodes, num_chains=self.num_chains, num_parts=self.num_parts)
        _check_counts(num_positions=self.num_positions, num_steps=self.num_steps)
        _check_counts(uncached_chains=self.uncached_chains)
        if max(self.num_parts) > self.num_chains:
            raise ValueError(
                f"Each of num_parts needs a chain; got {max(self.num_parts)} parts and num_chains {self.num_chains}. "
                "Use fewer parts."
            )
        if self.num_workers < 0:
            raise ValueError(f"num_workers must not be negative; got {self.num_workers}. 0 means one a core.")
        if self.train.agent not in ("at", "dt", "ad"):
            raise ValueError(
                f"The agent must have a transformer, as at, dt and ad have; got {self.train.agent}. Name another "
                "preset."
            )
