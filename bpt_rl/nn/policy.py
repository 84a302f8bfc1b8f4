"""The policy that sees at evaluation what its model saw in training."""

from typing import Any

from flax import nnx

from bpt_rl.config import FullContext, TrainConfig
from bpt_rl.nn.cached_policy import CachedPolicy
from bpt_rl.nn.normalization import Normalizer
from bpt_rl.nn.trajectory_model import TrajectoryModel
from bpt_rl.nn.windowed_policy import WindowedPolicy


def make_policy(
    graph: nnx.GraphDef[TrajectoryModel],
    params: Any,
    config: TrainConfig,
    normalizer: Normalizer,
    *,
    num_episodes: int,
    clear_context: bool,
    full_context: FullContext,
    sample_seed: int | None,
) -> CachedPolicy | WindowedPolicy:
    """Returns a cached policy over whole episodes, or a windowed one for a model trained on windows.

    Raises:
      ValueError: If actions are to be drawn from a deterministic head, or devices are to share a window.
    """
    if sample_seed is not None and config.model.action_distribution != "gaussian":
        raise ValueError(
            "Drawing actions needs a Gaussian head; the model was trained with action_distribution "
            f"{config.model.action_distribution!r}. Evaluate it without --sample."
        )
    completion = config.data.completion
    if config.data.window:
        if config.mesh.num_devices > 1:
            raise ValueError(
                "Devices share the cache of whole episodes, and a policy over windows has none; got data.window "
                f"{config.data.window} and {config.mesh}. Leave mesh.* out."
            )
        return WindowedPolicy(
            graph,
            params,
            normalizer,
            window=config.data.window,
            completion=completion,
            sample_seed=sample_seed,
        )
    return CachedPolicy(
        graph,
        params,
        normalizer,
        num_episodes=num_episodes,
        clear_context=clear_context,
        completion=completion,
        full_context=full_context,
        sample_seed=sample_seed,
        mesh=config.mesh,
    )
