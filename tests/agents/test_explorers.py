import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bpt_rl.agents.aps import Aps
from bpt_rl.agents.base import Explorer
from bpt_rl.agents.diayn import Diayn
from bpt_rl.agents.disagreement import Disagreement
from bpt_rl.agents.icm import Icm
from bpt_rl.agents.icm_apt import IcmApt
from bpt_rl.agents.proto import Proto
from bpt_rl.agents.rnd import Rnd
from bpt_rl.agents.smm import Smm
from bpt_rl.collect_config import ExplorerName

CLASSES = {
    "rnd": Rnd,
    "icm": Icm,
    "disagreement": Disagreement,
    "icm_apt": IcmApt,
    "proto": Proto,
    "diayn": Diayn,
    "aps": Aps,
    "smm": Smm,
}
SKILLS = {"diayn": (16, 50, False), "aps": (10, 5, True), "smm": (4, 0, False)}
"""Entries, steps (0: an episode), whether the critic has successor features."""
READS = {
    "rnd": {"observation"},
    "icm": {"observation", "action", "next_observation"},
    "disagreement": {"observation", "action", "next_observation"},
    "icm_apt": {"observation", "action", "next_observation"},
    "proto": {"observation", "next_observation"},
    "diayn": {"next_observation", "skill"},
    "aps": {"next_observation", "skill"},
    "smm": {"observation", "skill"},
}
"""What may change rewards, be it through the step of the networks before."""


def assert_finite(tree):
    for leaf in jax.tree.leaves(tree):
        assert np.isfinite(leaf).all()


def test_every_name_of_an_explorer_is_tested():
    assert set(CLASSES) == set(typing.get_args(ExplorerName))


@pytest.mark.parametrize("name", CLASSES)
def test_explorers_meet_the_protocol(explorers, name):
    explorer = explorers.explorer(name)
    assert isinstance(explorer, Explorer)
    assert type(explorer) is CLASSES[name]
    found = (explorer.skill_dim, explorer.skill_steps, explorer.has_successor_features)
    assert found == SKILLS.get(name, (0, 0, False))
    state = explorers.start(name)
    skills = explorers.draw(name, 0)
    assert (skills.shape, skills.dtype) == ((4096, explorer.skill_dim), np.float32)
    batch = explorers.batch(name, 0)

    def body(state, key):
        state, reward, metrics = explorer.update(state, batch, key)
        return state, (reward, metrics)

    # A state that changed its shapes or types would be refused.
    last, (reward, metrics) = jax.eval_shape(
        lambda state: jax.lax.scan(body, state, jax.random.split(jax.random.key(0), 4)), state
    )
    assert jax.tree.structure(last) == jax.tree.structure(state)
    assert (reward.shape, reward.dtype) == ((4, 6), np.float32)
    assert "explorer_loss" in metrics
    assert {(x.shape, x.dtype) for x in metrics.values()} == {((4,), np.dtype(np.float32))}


@pytest.mark.parametrize("name", CLASSES)
def test_rewards_read_what_they_should_and_nothing_else(explorers, name):
    state, batch = explorers.start(name), explorers.batch(name, 0)
    _, reward, _ = explorers.step(name)(state, batch, 3)
    for field in batch._fields:
        changed = batch._replace(**{field: jnp.roll(getattr(batch, field) * 1.1, 1, axis=0)})
        if field == "skill":
            changed = batch._replace(skill=jnp.roll(batch.skill, 1, axis=-1))
        after, other, _ = explorers.step(name)(state, changed, 3)
        # Rewards of prototypes are 0 with so few observations; their queue tells.
        same = np.array_equal(reward, other)
        if name == "proto":
            same = np.array_equal(after.queue, explorers.step(name)(state, batch, 3)[0].queue)
        assert same == (field not in READS[name]), field


@pytest.mark.parametrize("name", CLASSES)
def test_loss_falls_on_one_batch_and_all_networks_but_the_frozen_move(explorers, name):
    first = explorers.start(name)
    last, _, metrics = explorers.train(name, first, explorers.batch(name, 0), 50)
    losses = [m["explorer_loss"] for m in metrics]
    assert losses[-1] < losses[0] - 0.02 * abs(losses[0])
    for (path, old), new in zip(jax.tree.leaves_with_path(first), jax.tree.leaves(last), strict=True):
        is_frozen = name == "rnd" and path[0].name == "target"
        assert np.array_equal(old, new) == is_frozen, path


@pytest.mark.parametrize("name", CLASSES)
def test_equal_and_large_observations_leave_everything_finite(explorers, name):
    state, batch = explorers.start(name), explorers.batch(name, 0)
    equal = batch._replace(
        observation=jnp.zeros((6, 3)), next_observation=jnp.zeros((6, 3)), action=jnp.zeros((6, 2))
    )
    large = batch._replace(observation=1e4 * batch.observation, next_observation=1e4 * batch.next_observation)
    for hard in (equal, large):
        assert_finite(explorers.train(name, state, hard, 10))


def test_random_network_distillation_tells_seen_from_unseen(explorers):
    seen, unseen = (explorers.batch("rnd", seed) for seed in (0, 1))
    state, _, _ = explorers.train("rnd", explorers.start("rnd"), seen, 200)
    # Both steps start from one state, so that both errors are divided by nearly the same deviation.
    rewards = [explorers.step("rnd")(state, batch, 0)[1].mean() for batch in (seen, unseen)]
    assert rewards[0] < 0.5 * rewards[1]


@pytest.mark.parametrize("name", ["diayn", "smm"])
def test_discriminators_recognise_skills_that_lead_to_different_places(explorers, name):
    batch = explorers.batch(name, 0)
    num_skills = batch.skill.shape[1]
    places = 2 * jnp.eye(3)[jnp.arange(6) % 3]
    batch = batch._replace(
        observation=places, next_observation=places, skill=jnp.eye(num_skills)[jnp.arange(6) % 3]
    )
    state, reward, metrics = explorers.train(name, explorers.start(name), batch, 300)
    wrong = batch._replace(skill=jnp.roll(batch.skill, 1, axis=-1))
    _, reward_of_wrong, _ = explorers.step(name)(state, wrong, 7)
    if name == "diayn":
        assert metrics[-1]["skill_accuracy"] == 1
        # At best log 16, for certainty.
        assert 0.5 * np.log(16) < reward.min() <= reward.max() <= np.log(16)
        assert reward_of_wrong.max() < 0
    else:
        assert metrics[-1]["skill_loss"] < 0.5 * np.log(4)
        assert metrics[-1]["density_loss"] < metrics[0]["density_loss"]


def test_state_marginal_matching_pays_for_rare_places_and_recognised_skills(explorers):
    step, batch = explorers.step("smm"), explorers.batch("smm", 0)
    common = batch._replace(observation=jnp.zeros((6, 3)), skill=jnp.eye(4)[jnp.zeros(6, jnp.int32)])
    state, _, _ = explorers.train("smm", explorers.start("smm"), common, 100)
    one_rare = common._replace(observation=common.observation.at[5, 2].set(3.0))
    _, reward, _ = step(state, one_rare, 7)
    assert reward[5] > reward[:5].max() + 1
    # The same codes beside a discriminator that knows nothing.
    ignorant = state._replace(discriminator=jax.tree.map(jnp.zeros_like, state.discriminator))
    assert (step(state, common, 7)[1] > step(ignorant, common, 7)[1]).all()


def test_prototypes_stay_of_length_one_and_their_target_follows(explorers):
    state = explorers.start("proto")
    after, _, _ = explorers.step("proto")(state, explorers.batch("proto", 0), 0)
    np.testing.assert_allclose(np.linalg.norm(after.networks.prototypes, axis=1), 1, rtol=1e-6)
    for old, new, predictor in zip(
        *map(jax.tree.leaves, (state.target, after.target, after.networks.predictor)), strict=True
    ):
        np.testing.assert_allclose(
            new, 0.95 * np.asarray(old) + 0.05 * np.asarray(predictor), rtol=1e-5, atol=1e-7
        )


def test_the_queue_of_prototypes_forgets_the_oldest_candidates(explorers):
    state, step = explorers.start("proto"), explorers.step("proto")
    queues = [np.asarray(state.queue)]
    for seed in range(5):
        batch = explorers.batch("proto", seed)
        state, _, _ = step(state, batch, seed)
        queues.append(np.asarray(state.queue))
        changed = np.flatnonzero((queues[-1] != queues[-2]).any(axis=1))
        place = 512 * (seed % 4)
        np.testing.assert_array_equal(changed, np.arange(place, place + 512))
        features = np.asarray(state.networks.features(batch.next_observation))
        distances = np.abs(queues[-1][place : place + 512, None] - features).max(axis=-1)
        assert distances.min(axis=1).max() < 1e-5


def test_candidates_are_drawn_with_the_stated_probabilities(explorers):
    start, batch = explorers.start("proto"), explorers.batch("proto", 0)
    features = np.asarray(start.networks.features(batch.next_observation), np.float64)
    # All prototypes alike, so that each draws from one distribution over the six observations.
    towards = jnp.asarray(np.tile(features[0], (512, 1)), jnp.float32)
    start = start._replace(networks=start.networks._replace(prototypes=towards))
    counts, expected, variance = np.zeros(6), np.zeros(6), np.zeros(6)
    for number in range(8):
        state, _, _ = explorers.step("proto")(start, batch, number)
        features = np.asarray(state.networks.features(batch.next_observation), np.float64)
        scores = np.exp(np.asarray(state.networks.prototypes) @ features.T)
        probabilities = scores / scores.sum(axis=1, keepdims=True)
        candidates = np.abs(np.asarray(state.queue)[:512, None] - features).max(axis=-1).argmin(axis=1)
        counts += np.bincount(candidates, minlength=6)
        expected += probabilities.sum(axis=0)
        variance += (probabilities * (1 - probabilities)).sum(axis=0)
    assert expected.max() > 2 * expected.min()
    assert (np.abs(counts - expected) < 5 * np.sqrt(variance)).all()


@pytest.mark.parametrize("name", ["diayn", "smm"])
def test_skills_are_one_hot_and_all_alike_in_number(explorers, name):
    skills = np.asarray(explorers.draw(name, 0))
    assert ((skills == 0) | (skills == 1)).all()
    np.testing.assert_array_equal(skills.sum(axis=1), 1)
    share = 1 / skills.shape[1]
    assert (np.abs(skills.sum(axis=0) - 4096 * share) < 5 * np.sqrt(4096 * share * (1 - share))).all()


def test_skills_of_aps_have_length_one_and_any_direction(explorers):
    skills = np.asarray(explorers.draw("aps", 0))
    np.testing.assert_allclose(np.linalg.norm(skills, axis=1), 1, rtol=1e-6)
    # Uniform on the sphere: mean 0, covariance 1/10, five standard errors of 4096 draws.
    np.testing.assert_allclose(skills.mean(axis=0), 0, atol=5 * np.sqrt(0.1 / 4096))
    np.testing.assert_allclose(skills.T @ skills / 4096, np.eye(10) / 10, atol=5 * 0.14 / np.sqrt(4096))


@pytest.mark.parametrize("name", SKILLS)
def test_skills_follow_the_key(explorers, name):
    first, again, other = (explorers.draw(name, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
