import pytest

from bpt_rl.config import BuildConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.datasets.description import describe, visited_features
from bpt_rl.datasets.store import Store
from bpt_rl.envs import features

TASKS = ("cartpole_swingup", "cartpole_balance")


@pytest.fixture
def path(folder, tmp_path):
    return build_store(
        BuildConfig(source=(str(folder),), out=str(tmp_path / "s.h5"), tasks=TASKS, num_workers=1)
    )


def test_describe_gives_plain_values_of_a_path_and_of_a_store(path):
    with Store.open(path) as store:
        returns = store.returns("cartpole_balance")
        assert describe(store) == describe(path)
    found = describe(path)
    assert (found["num_episodes"], found["num_steps"], found["episode_steps"]) == (3, 120, [20, 60])
    assert found["returns"]["cartpole_balance"]["max"] == returns.max()
    assert found["bytes"] == path.stat().st_size


def test_visited_features_are_those_of_every_state_of_a_small_store(path, episodes):
    with Store.open(path) as store:
        visited = visited_features(store)
    assert tuple(visited) == features.FEATURES["cartpole"]
    position = [state for episode in episodes for state in episode.physics[:, 0].tolist()]
    assert visited["cart_position"].tolist() == position
    spread = describe(path)["features"]["cart_position"]
    assert (spread["min"], spread["max"]) == (min(position), max(position))
