import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest

from bpt_rl.envs import reward_functions, rewards, tasks
from bpt_rl.envs.features import FEATURES
from bpt_rl.envs.processes import map_in_order
from bpt_rl.envs.reward_formulas import FAMILIES, tolerance
from bpt_rl.envs.reward_functions import canonical_name, find, register

SIGMOIDS = (
    "gaussian",
    "hyperbolic",
    "long_tail",
    "reciprocal",
    "cosine",
    "linear",
    "quadratic",
    "tanh_squared",
)


@pytest.fixture(autouse=True)
def _forget_registered_functions(monkeypatch):
    monkeypatch.setattr(reward_functions, "_registered", {})


def random_states(domain, seed=0):
    """Returns features around the sizes at which rewards change, and actions, of shape [5, 40]."""
    generator = np.random.default_rng(seed)
    features = {name: generator.normal(size=(5, 40)) * 2 for name in FEATURES[domain]}
    features |= {
        name: np.sin(features[name]) for name in features if name in ("torso_upright", "pole_cosine")
    }
    if domain in ("point_mass_maze", "jaco"):
        features = {name: values * 0.08 for name, values in features.items()}
    return features, generator.uniform(-1, 1, (5, 40, tasks.DOMAINS[domain].action_dim))


def reward_of(task, domain, seed=0):
    features, action = random_states(domain, seed)
    return find(task)(features, None, action)


@pytest.mark.parametrize("sigmoid", SIGMOIDS)
def test_tolerance_equals_that_of_dm_control(sigmoid):
    from dm_control.utils import rewards as suite

    x = np.concatenate([np.random.default_rng(0).normal(size=200) * 5, [-1e3, -1, 0, 1, 2, 1e3]])
    bounds = [(0, 0), (-1, 2), (1, np.inf), (-np.inf, 1)]
    for bound, margin, value in itertools.product(bounds, [0, 0.5, 4], [0.1, 0.5, 0.0]):
        if value or sigmoid in ("cosine", "linear", "quadratic"):
            options = {"bounds": bound, "margin": margin, "sigmoid": sigmoid, "value_at_margin": value}
            with np.errstate(over="ignore"):  # dm_control's cosh
                expected = suite.tolerance(x, **options)
            np.testing.assert_allclose(tolerance(x, **options), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(
    "options",
    [{"bounds": (2, 1)}, {"margin": -1}, {"margin": 1, "value_at_margin": 0}, {"value_at_margin": 1}],
)
def test_tolerance_refuses_what_has_no_meaning(options):
    with pytest.raises(ValueError, match="tolerance needs bounds in order, margin >= 0"):
        tolerance(np.zeros(3), **options)


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("walker_height(height=1.2)", "walker_stand"),
        ("walker_speed(speed=1)", "walker_walk"),
        ("walker_speed(speed=8)", "walker_run"),
        ("walker_spin(momentum=5)", "walker_flip"),
        ("cheetah_speed(speed=10)", "cheetah_run"),
        ("cheetah_speed(speed=-10)", "cheetah_run_backward"),
        ("cheetah_spin(momentum=-5)", "cheetah_flip_backward"),
        ("quadruped_speed(speed=0.5,heading=0)", "quadruped_walk"),
        ("quadruped_speed(speed=5,heading=0)", "quadruped_run"),
        ("quadruped_height(height=1)", "quadruped_jump"),
        ("cartpole_position(position=0)", "cartpole_swingup"),
        ("point_mass_maze_reach(x=-0.15,y=0.15)", "point_mass_maze_reach_top_left"),
        ("jaco_reach(x=0.09,y=-0.09,z=0.001)", "jaco_reach_bottom_right"),
    ],
)
def test_a_family_at_the_stock_parameters_is_the_stock_task(family, named):
    domain = tasks.domain_of(named)
    assert tasks.domain_of(family) == domain
    found = reward_of(family, domain)
    np.testing.assert_array_equal(found, reward_of(named, domain))
    assert found.shape == (5, 40)
    assert found.std() > 0


def test_rewards_of_families_are_those_worked_out_by_hand():
    def reward(task, **features):
        action = np.zeros((1, tasks.DOMAINS[find(task).domain].action_dim))
        return find(task)({name: np.array([float(value)]) for name, value in features.items()}, None, action)[
            0
        ]

    standing = {"torso_height": 1.3, "torso_upright": 1}
    # Half the speed asked for: (5/2 + 1)/6.
    assert reward("walker_speed(speed=-3)", horizontal_velocity=-1.5, **standing) == pytest.approx(3.5 / 6)
    assert reward("walker_speed(speed=-3)", horizontal_velocity=3, **standing) == pytest.approx(1 / 6)
    # Half the height below the threshold is the margin, worth a tenth: (3/10 + 1)/4.
    assert reward("walker_height(height=0.8)", torso_height=0.4, torso_upright=1) == pytest.approx(1.3 / 4)
    assert reward("cheetah_speed(speed=-4)", horizontal_velocity=-1) == pytest.approx(0.25)
    # To the left at all the speed asked for; forwards counts as standing, on its side as half.
    left = "quadruped_speed(speed=2,heading=90)"
    still = {"torso_velocity_z": 0, "centre_of_mass_height": 1}
    moving = {"torso_velocity_x": 0, "torso_velocity_y": 2}
    assert reward(left, torso_upright=1, **moving, **still) == pytest.approx(1)
    moving = {"torso_velocity_x": 2, "torso_velocity_y": 0}
    assert reward(left, torso_upright=0, **moving, **still) == pytest.approx(0.25)
    pole = {"pole_cosine": 1, "pole_angular_velocity": 0, "cart_velocity": 0}
    assert reward("cartpole_position(position=0.5)", cart_position=0.5, **pole) == pytest.approx(1)
    # Two metres away a tenth of the position's half is left.
    assert reward("cartpole_position(position=1)", cart_position=-1, **pole) == pytest.approx(0.55)
    assert reward("point_mass_maze_reach(x=0.2,y=0.1)", x=0.2, y=0.13) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("written", "canonical"),
    [
        (" walker_speed( speed = 3.0 ) ", "walker_speed(speed=3)"),
        ("walker_speed(speed=-0.5)", "walker_speed(speed=-0.5)"),
        ("cartpole_position(position=-0.0)", "cartpole_position(position=0)"),
        ("quadruped_speed(heading=90,speed=1e0)", "quadruped_speed(speed=1,heading=90)"),
        ("walker_run", "walker_run"),
        ("no_task", "no_task"),
    ],
)
def test_equal_tasks_have_one_canonical_name(written, canonical):
    assert canonical_name(written) == canonical
    assert canonical_name(canonical) == canonical


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("walker_sped(speed=3)", r"must be one of .*; got .* Nearest valid one: 'walker_speed'\."),
        ("walker_run(speed=3)", "A family of tasks must be one of"),
        ("walker_speed", r"is written walker_speed\(speed=\.\.\.\); got 'walker_speed'"),
        ("walker_speed()", "lacks speed"),
        ("quadruped_speed(speed=1)", r"lacks heading\. Add it"),
        ("walker_speed(sped=1)", r"got 'sped=1' in .* Nearest valid one: 'speed'\."),
        ("walker_speed(4)", "got '4' in"),
        ("walker_speed(speed=1,speed=2)", "each once; got 'speed=2'"),
        ("walker_speed(speed=fast)", r"speed must be a number in \[-100, 100\].* \(m/s.*got 'fast'"),
        ("walker_speed(speed=nan)", "got 'nan'"),
        ("walker_speed(speed=inf)", "got 'inf'"),
        ("walker_speed(speed=0)", "at least 0.01 away from 0"),
        ("cartpole_position(position=2)", r"position must be a number in \[-1.8, 1.8\] \(m\); got '2'"),
        ("point_mass_maze_reach(x=0,y=0.5)", r"y must be a number in \[-0.3, 0.3\]"),
    ],
)
def test_malformed_tasks_are_answered_in_one_sentence(task, message):
    for ask in (find, canonical_name, tasks.domain_of):
        with pytest.raises(ValueError, match=message):
            ask(task)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_takes_its_bounds(name):
    family = FAMILIES[name]
    for end in ("least", "most"):
        task = f"{name}({','.join(f'{key}={getattr(p, end)}' for key, p in family.parameters.items())})"
        reward = reward_of(task, family.domain)
        assert find(task).domain == family.domain
        assert (reward >= 0).all()
        assert (reward <= 1).all()


def test_a_registered_function_relabels_an_episode(episode):
    def walker_crouch(features, observation, action):
        return observation[..., 14] - features["torso_height"] + (action**2).sum(axis=-1)

    register("walker_crouch", walker_crouch)
    recorded = episode("walker_run")
    reward = rewards.relabel("walker_crouch", recorded.physics, recorded.action, recorded.observation)
    # The observation's height is the feature; float32 of values of size one.
    np.testing.assert_allclose(reward, (recorded.action**2).sum(axis=1), atol=1e-6)
    assert tasks.domain_of("walker_crouch") == "walker"
    assert canonical_name("walker_crouch") == "walker_crouch"


def test_a_functions_domain_is_what_its_name_begins_with():
    assert register("point_mass_maze_centre", lambda f, o, a: f["x"]).domain == "point_mass_maze"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("crouch", "must be named after its domain, one of cartpole, .*; got 'crouch'"),
        ("walker_low crouch", "must be named after its domain"),
        ("walker_run", "'walker_run' is one of this package's"),
        ("walker_speed", "'walker_speed' is one of this package's"),
    ],
)
def test_names_that_cannot_be_registered_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        register(name, lambda features, observation, action: features["torso_height"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (
            lambda f, o, a: f["height"],
            r"walker_mine of .*test_reward_functions.py:\d+ .* raised KeyError: 'height'",
        ),
        (lambda f, o, a: o[..., 0], "raised TypeError: .* Pass an observation"),
        (lambda f, o, a: f["torso_height"].mean(), r"returned shape \(\) for \(4,\) states"),
        (lambda f, o, a: a, r"returned shape \(4, 6\) for \(4,\) states"),
        (lambda f, o, a: np.where(np.arange(4) == 2, np.nan, 1.0), r"returned nan at \(2,\)"),
        (lambda f, o, a: "high", "raised ValueError: could not convert string"),
    ],
)
def test_a_functions_fault_is_told_with_its_name_and_place(function, message):
    register("walker_mine", function)
    with pytest.raises(ValueError, match=message):
        rewards.relabel("walker_mine", np.ones((5, 18)), np.zeros((5, 6)))


def test_a_function_never_sees_the_dummy_row():
    seen = []
    register("walker_seen", lambda f, o, a: seen.append((f, o, a)) or np.ones(a.shape[:-1]))
    action = np.concatenate([np.zeros((1, 6)), np.ones((4, 6))])
    rewards.relabel("walker_seen", np.ones((5, 18)), action, np.ones((5, 24)))
    [(features, observation, seen_action)] = seen
    assert (seen_action == 1).all()
    assert {len(values) for values in (observation, seen_action, *features.values())} == {4}


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import numpy as np\n"
        "LOADED = []\n"
        "LOADED.append(1)\n"
        "def walker_low(features, observation, action):\n"
        "    return len(LOADED) - features['torso_height']\n"
        "def crouch(features, observation, action):\n"
        "    return features['torso_height']\n"
    )
    return path


def test_a_function_in_a_file_is_a_task_and_the_file_is_loaded_once(own_file, episode):
    recorded = episode("walker_run")
    relabel = functools.partial(rewards.relabel, physics=recorded.physics, action=recorded.action)
    first = relabel(f"{own_file}:walker_low")
    np.testing.assert_array_equal(relabel(f"{own_file}:walker_low"), first)
    assert first[1:].max() < 1
    assert canonical_name(f"{own_file}:walker_low") == "walker_low"
    np.testing.assert_array_equal(relabel("walker_low"), first)


def test_a_function_in_a_file_is_found_in_other_processes(own_file):
    found = list(map_in_order(canonical_name, [f"{own_file}:walker_low"] * 2, num_workers=2))
    assert found == ["walker_low"] * 2


def test_files_without_such_a_function_are_refused(own_file, tmp_path):
    with pytest.raises(ValueError, match=r"has no 'walker_lo'\. Nearest valid one: 'walker_low'"):
        find(f"{own_file}:walker_lo")
    with pytest.raises(ValueError, match=r"named after its domain, .*; got 'crouch'"):
        find(f"{own_file}:crouch")
    with pytest.raises(FileNotFoundError, match=r"there is none at .*nowhere\.py"):
        find(f"{tmp_path}/nowhere.py:walker_low")
    broken = tmp_path / "broken.py"
    broken.write_text("import no_such_module\n")
    with pytest.raises(ValueError, match=r"broken\.py raised ModuleNotFoundError: No module named"):
        find(f"{broken}:walker_low")


def test_two_files_cannot_give_one_name_two_meanings(own_file, tmp_path):
    other = tmp_path / "other.py"
    other.write_text(own_file.read_text())
    find(f"{own_file}:walker_low")
    with pytest.raises(ValueError, match=r"'walker_low' of .*other\.py is already that of .*own\.py"):
        find(f"{other}:walker_low")


def test_formulas_need_no_simulator():
    script = (
        "import sys; from bpt_rl.envs import reward_functions; reward_functions.find('walker_speed(speed=2)'); "
        "assert not {'mujoco', 'dm_control', 'jax', 'bpt_rl.envs.tasks'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
