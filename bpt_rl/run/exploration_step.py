"""What of exploring runs on the device: acting, remembering and learning, each one compiled call."""

import functools
from typing import Any, NamedTuple

import jax
from jaxtyping import Float

from bpt_rl.agents.base import Explorer
from bpt_rl.agents.ddpg import DDPG, LearnerState
from bpt_rl.collect_config import ExplorationConfig
from bpt_rl.nn.replay import Replay, ReplayState

Metrics = dict[str, Float[jax.Array, ""]]


class ExplorationState(NamedTuple):
    """All that is learnt; a pytree. Replay and keys are made anew from the recorded episodes and the seed."""

    learner: LearnerState
    explorer: Any


class ExplorationStep:
    """Compiled functions of one explorer; holds configuration only.

    Everything random is drawn from the seed and the number of the step: `step` counts the steps of all environments
    together, from 0.
    """

    def __init__(
        self, config: ExplorationConfig, explorer: Explorer, *, sizes: tuple[int, int, int], seed: int
    ) -> None:
        """Compiles nothing yet.

        Args:
          config: Of learner and replay.
          explorer: Pays the reward.
          sizes: Length of an observation, of an action, and steps of an episode.
          seed: Of parameters, noise, skills and batches.

        Raises:
          ValueError: If the replay is too small for n-step transitions.
        """
        self._config, self._explorer = config, explorer
        self._observation_dim, self._action_dim, episode_steps = sizes
        self._learner = DDPG(config, self._observation_dim, self._action_dim, explorer)
        self._replay = Replay(
            num_slots=config.replay_steps // config.num_environments,
            num_environments=config.num_environments,
            episode_steps=episode_steps,
            num_step_return=config.num_step_return,
            discount=config.discount,
        )
        self._key = jax.random.key(seed)
        self.act = jax.jit(self._act, donate_argnums=1)
        self.learn = jax.jit(self._learn, donate_argnums=0)
        self.remember = jax.jit(self._replay.add, donate_argnums=0)
        self.draw_skills = jax.jit(self._draw_skills)
        self.init = jax.jit(self._init)

    @property
    def num_slots(self) -> int:
        """Steps of each environment that the replay holds."""
        return self._replay.num_slots

    def init_replay(self) -> ReplayState:
        """Returns the empty replay."""
        return self._replay.init(self._observation_dim, self._action_dim, self._explorer.skill_dim)

    def num_updates_before(self, step: int) -> int:
        """Returns the gradient steps of all steps before this one."""
        every = self._config.update_every
        first = -(-self._first_update // every) * every
        return max(0, -(-(step - first) // every)) * self._config.updates_at_once

    def learns_at(self, step: int) -> bool:
        """Returns whether gradient steps belong to this step; none do before there is a transition to draw."""
        return step >= self._first_update and step % self._config.update_every == 0

    @property
    def _first_update(self) -> int:
        config = self._config
        return max(-(-config.first_steps // config.num_environments), config.num_step_return)

    def draws_skills_at(self, episode_step: int) -> bool:
        """Returns whether new skills are drawn at this step of an episode."""
        every = self._explorer.skill_steps
        return episode_step == 0 or (every > 0 and episode_step % every == 0)

    def _init(self) -> ExplorationState:
        learner_key, explorer_key = jax.random.split(self._key)
        return ExplorationState(self._learner.init(learner_key), self._explorer.init(explorer_key))

    def _keys(self, step: Any, purpose: int) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(self._key, step), purpose)

    def _draw_skills(self, state: ExplorationState, step: Any) -> Float[jax.Array, "N Z"]:
        return self._explorer.draw_skills(state.explorer, self._keys(step, 0), self._config.num_environments)

    def _act(
        self,
        state: ExplorationState,
        replay: ReplayState,
        observation: Float[Any, "N O"],
        skill: Float[Any, "N Z"],
        step: Any,
    ) -> tuple[Float[jax.Array, "N A"], ReplayState]:
        """Returns actions, and the replay with them."""
        is_uniform = step * self._config.num_environments < self._config.first_steps
        key = self._keys(step, 1)
        action = self._learner.act(state.learner, observation, skill, key, is_uniform=is_uniform)
        return action, self._replay.add(replay, observation, action, skill)

    def _learn(
        self, state: ExplorationState, replay: ReplayState, step: Any
    ) -> tuple[ExplorationState, Metrics]:
        """Returns the state after the gradient steps that belong to a step, and their mean metrics."""
        keys = jax.random.split(self._keys(step, 2), self._config.updates_at_once)
        state, metrics = jax.lax.scan(functools.partial(self._update, replay), state, keys)
        return state, jax.tree.map(lambda values: values.mean(), metrics)

    def _update(
        self, replay: ReplayState, state: ExplorationState, key: jax.Array
    ) -> tuple[ExplorationState, Metrics]:
        replay_key, explorer_key, learner_key = jax.random.split(key, 3)
        batch = self._replay.sample(replay, replay_key, self._config.batch_size)
        explorer, reward, metrics = self._explorer.update(state.explorer, batch, explorer_key)
        learner, learner_metrics = self._learner.update(state.learner, batch, reward, learner_key)
        metrics = {"intrinsic_reward": reward.mean(), **learner_metrics, **metrics}
        return ExplorationState(learner, explorer), metrics
