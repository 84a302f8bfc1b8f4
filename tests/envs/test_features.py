import threading

import numpy as np
import pytest

from bpt_rl.envs import tasks
from bpt_rl.envs.features import FEATURES, physical_features, recomputed_observation
from bpt_rl.envs.replicas import NUM_REPLICAS

UNKNOWN = {"quadruped": [*range(48, 51), *range(54, 78)], "jaco": list(range(12, 18))}
"""Entries of the observation that the state alone does not decide."""


def measured(domain, environment):
    """Returns the features as dm_control's own methods and sensors give them in the present state."""
    physics = environment.physics
    named = physics.named.data
    match domain:
        case "cartpole":
            angle = physics.pole_angle_cosine()[0]
            return [physics.cart_position(), named.qvel["slider"][0], angle, physics.angular_vel()[0]]
        case "walker":
            speed = physics.horizontal_velocity()
            return [physics.torso_height(), physics.torso_upright(), speed, named.subtree_angmom["torso"][1]]
        case "cheetah":
            torso = [named.xpos["torso", "z"], named.xmat["torso", "zz"]]
            return [*torso, physics.speed(), named.subtree_angmom["torso"][1]]
        case "quadruped":
            centre = named.sensordata["center_of_mass"][2]
            return [physics.torso_upright(), *physics.torso_velocity(), centre]
        case "point_mass_maze":
            return named.geom_xpos["mass", :2]
        case _:
            return named.site_xpos["jaco_arm/jaco_hand/pinchsite"]


@pytest.mark.parametrize("domain", tasks.DOMAINS)
def test_features_equal_what_dm_control_measures_in_wild_states(wild, domain):
    recorded = wild(tasks.tasks_of(domain)[0])
    found = physical_features(domain, recorded.physics)
    assert found.shape == (61, len(FEATURES[domain]))
    assert found.dtype == np.float64
    environment = tasks.make(tasks.tasks_of(domain)[0], seed=1)
    environment.reset()
    expected = []
    for state in recorded.physics:
        environment.physics.set_state(state)
        environment.physics.forward()
        expected.append(np.array(measured(domain, environment), np.float64))
    environment.close()
    # The same sums in the same order; cartpole's closed form rounds sine and cosine in another way.
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-14)
    assert found.std(axis=0).min() > 0


@pytest.mark.parametrize("domain", tasks.DOMAINS)
@pytest.mark.parametrize("kind", ["episode", "wild"])
def test_recomputed_observation_equals_the_recorded_one(request, kind, domain):
    recorded = request.getfixturevalue(kind)(tasks.tasks_of(domain)[0])
    columns, values = recomputed_observation(domain, recorded.physics)
    # One rounding to float32, of sums that may differ in their last float64 digit.
    np.testing.assert_allclose(values, recorded.observation[:, columns], rtol=2.4e-7, atol=1e-12)
    missing = set(range(tasks.DOMAINS[domain].observation_dim)) - set(columns.tolist())
    assert sorted(missing) == UNKNOWN.get(domain, [])


@pytest.mark.parametrize("domain", tasks.DOMAINS)
def test_recomputed_observation_tells_rows_apart(episode, domain):
    recorded = episode(tasks.tasks_of(domain)[0])
    columns, values = recomputed_observation(domain, recorded.physics)
    error = np.abs(values[1:] - recorded.observation[:-1, columns]).max(axis=1)
    assert error.min() > 1e-4


@pytest.mark.parametrize("num_rows", [1, NUM_REPLICAS - 1, NUM_REPLICAS, NUM_REPLICAS + 1])
@pytest.mark.parametrize("domain", ["walker", "quadruped", "jaco"])
def test_features_of_a_state_do_not_depend_on_the_others(wild, domain, num_rows):
    physics = wild(tasks.tasks_of(domain)[0]).physics
    whole = physical_features(domain, physics)
    order = np.random.default_rng(0).permutation(len(physics))[:num_rows]
    np.testing.assert_array_equal(physical_features(domain, physics[order]), whole[order])


def test_every_replica_measures_alike():
    state = np.random.default_rng(0).normal(size=57)
    features = physical_features("quadruped", np.tile(state, (NUM_REPLICAS, 1)))
    np.testing.assert_array_equal(features, np.tile(features[:1], (NUM_REPLICAS, 1)))


def test_threads_do_not_disturb_each_other():
    physics = np.random.default_rng(0).normal(size=(4, 2000, 18))
    expected = [physical_features("walker", one) for one in physics]
    found = {}

    def measure(i):
        found[i] = physical_features("walker", physics[i])

    threads = [threading.Thread(target=measure, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(4):
        np.testing.assert_array_equal(found[i], expected[i])


def test_states_are_not_written_into():
    physics = np.random.default_rng(0).normal(size=(40, 4))
    before = physics.copy()
    for domain in ("cartpole", "point_mass_maze"):
        physical_features(domain, physics)[:] = 0
        recomputed_observation(domain, physics)[1][:] = 0
    np.testing.assert_array_equal(physics, before)


@pytest.mark.parametrize("function", [physical_features, recomputed_observation])
def test_states_of_another_domain_are_refused(function):
    with pytest.raises(ValueError, match=r"physics of jaco must have shape \[T\+1, 18\]; got \[5, 4\]"):
        function("jaco", np.zeros((5, 4)))
    with pytest.raises(ValueError, match=r"got 'wlker'\. Nearest valid one: 'walker'"):
        function("wlker", np.zeros((5, 4)))
