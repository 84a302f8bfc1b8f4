"""The cells that a grid is made of."""

import json
import shutil
from pathlib import Path

import pytest

from bpt_rl.ablate_config import GridConfig
from bpt_rl.config import DataConfig, EvaluateConfig, ModelConfig, OptimizerConfig, TrainConfig
from bpt_rl.mesh_config import MeshConfig
from bpt_rl.run.grid import CELL_SCHEMA, _unsaid, expand, trainings
from bpt_rl.run.job import Job

COUNT, SEED = "train.data.num_trajectories", "train.seed"


@pytest.fixture
def grid_of(store_path):
    """Keywords are fields of GridConfig."""

    def make(axes=(), **changes):
        data = DataConfig(store=str(store_path), batch_size=2, task="cartpole_balance")
        return GridConfig(**({"axes": dict(axes), "train": TrainConfig(data=data)} | changes))

    return make


def test_every_combination_is_a_cell_and_the_last_axis_varies_fastest(grid_of):
    cells = expand(grid_of({COUNT: (1, 2), SEED: (0, 3)}))
    assert [(c.train.data.num_trajectories, c.train.seed) for c in cells] == [(1, 0), (1, 3), (2, 0), (2, 3)]
    assert [cell.values for cell in cells[:2]] == [{COUNT: 1, SEED: 0}, {COUNT: 1, SEED: 3}]
    assert {cell.train.data.task for cell in cells} == {"cartpole_balance"}
    assert len(expand(grid_of())) == 1


def test_equal_tokens_give_every_cell_as_many_trajectories_a_batch(grid_of):
    cells = expand(grid_of({COUNT: (1, 2, 4)}))
    assert [cell.train.data.batch_size for cell in cells] == [8, 4, 2]
    cells = expand(grid_of({COUNT: (1, 2, 4), "train.data.batch_size": (1, 3)}))
    assert [cell.train.data.batch_size for cell in cells] == [4, 12, 2, 6, 1, 3]


def test_equal_gradient_steps_give_every_cell_as_many_chains_a_batch(grid_of):
    cells = expand(grid_of({COUNT: (3, 4)}, equal="gradient_steps"))
    assert [(cell.train.data.num_trajectories, cell.train.data.batch_size) for cell in cells] == [
        (3, 2),
        (4, 2),
    ]


def test_a_batch_that_is_no_whole_number_of_chains_is_refused(grid_of):
    with pytest.raises(ValueError, match=r"got 8 trajectories a batch and chains of 3\. Use counts"):
        expand(grid_of({COUNT: (3, 4)}))


def test_linked_settings_vary_together(grid_of):
    linked = {
        "evaluate.context_order": ("none", "best"),
        "evaluate.num_context_trajectories": (0, 2),
    }
    cells = expand(grid_of({SEED: (0, 1)}, linked=(linked,)))
    found = [(c.evaluate.context_order, c.evaluate.num_context_trajectories, c.train.seed) for c in cells]
    assert found == [("none", 0, 0), ("none", 0, 1), ("best", 2, 0), ("best", 2, 1)]


def test_cells_that_differ_in_their_evaluation_share_a_training(grid_of):
    cells = expand(grid_of({SEED: (0, 1), "evaluate.target_multiple": (1.0, 0.5)}))
    assert [len(group) for group in trainings(cells).values()] == [2, 2]
    assert len({cell.address for cell in cells}) == 4
    assert len({cell.train.run for cell in cells}) == 2


def test_a_preset_lies_below_the_settings_of_the_grid_and_those_below_its_axes(grid_of, tmp_path):
    preset = tmp_path / "wide.toml"
    preset.write_text('agent = "dt"\n[model]\nembed_dim = 64\nnum_layers = 7\n[optimizer]\nclip_norm = 3.0\n')
    base = grid_of().train
    train = TrainConfig(data=base.data, model=ModelConfig(num_layers=2))
    axes = {"preset": (str(preset),), "train.optimizer.clip_norm": (5.0,)}
    [cell] = expand(grid_of(axes, train=train))
    assert (cell.train.agent, cell.train.model.embed_dim) == ("dt", 64)
    assert (cell.train.model.num_layers, cell.train.optimizer.clip_norm) == (2, 5.0)


def test_agents_of_transitions_and_of_trajectories_take_of_one_grid_what_they_read(grid_of):
    base = grid_of().train
    train = TrainConfig(
        data=base.data,
        mesh=MeshConfig(data=2),
        model=ModelConfig(embed_dim=64),
        optimizer=OptimizerConfig(num_steps=900),
    )
    axes = {
        "preset": ("at_small", "td3"),
        COUNT: (1, 4),
        "evaluate.target_multiple": (1.0, 0.5),
        SEED: (0, 1),
    }
    evaluate = EvaluateConfig(target_sweep=(0.5,), mesh=MeshConfig(context=4))
    cells = expand(grid_of(axes, train=train, evaluate=evaluate))
    at, td3 = ([c for c in cells if c.train.agent == agent] for agent in ("at", "td3"))
    assert (len(at), len(td3)) == (8, 2)
    assert [cell.values for cell in td3] == [{"preset": "td3", SEED: 0}, {"preset": "td3", SEED: 1}]
    assert {cell.train.model.embed_dim for cell in at} == {64}
    assert {Job.of("out", [[cell]]).num_devices for cell in at} == {4}
    assert {Job.of("out", [[cell]]).num_devices for cell in td3} == {1}
    assert {cell.train.optimizer for cell in td3} == {OptimizerConfig()}
    assert {cell.train.td.num_updates for cell in td3} == {500_000}
    assert {cell.evaluate.target_sweep for cell in td3} == {()}
    assert {cell.evaluate.target_sweep for cell in at} == {(0.5,)}


def test_an_address_is_of_the_content_alone(grid_of, store_path, tmp_path):
    [cell] = expand(grid_of())
    copy = tmp_path / "copy.h5"
    shutil.copy(store_path, copy)
    data = DataConfig(store=str(copy), batch_size=2, task="cartpole_balance")
    elsewhere = TrainConfig(
        run="runs/other",
        log_every=7,
        checkpoint_every=9,
        keep_checkpoints=1,
        data=data,
        mesh=MeshConfig(context=2),
    )
    again = grid_of(
        train=elsewhere, out="elsewhere", evaluate=EvaluateConfig(num_workers=3, mesh=MeshConfig(data=2))
    )
    assert [c.address for c in expand(again)] == [cell.address]
    others = [
        {"axes": {SEED: (1,)}},
        {"axes": {"train.data.task": ("cartpole_swingup",)}},
        {"axes": {"train.model.dropout": (0.0,)}},
        {"axes": {"evaluate.seed": (1,)}},
        {"axes": {"evaluate.seed": (1_000_000,)}},
        {"axes": {"evaluate.num_chains": (3,)}},
    ]
    addresses = [expand(grid_of(**other))[0].address for other in others]
    assert len({cell.address, *addresses}) == 7


def test_what_addresses_leave_out_changes_with_the_schema_of_cells_alone():
    """An address leaves defaults out, so that a new setting keeps cells finished: a changed one must be said."""
    known = json.loads(Path(__file__).with_name("cell_defaults.json").read_text())
    now = {"train": _unsaid()[TrainConfig], "evaluate": _unsaid()[EvaluateConfig]}
    now = json.loads(json.dumps(now))
    changed = [
        f"{group}.{name}"
        for group in now
        for name in known[group].keys() & now[group].keys()
        if known[group][name] != now[group][name]
    ]
    assert known["schema"] == CELL_SCHEMA, "write cell_defaults.json anew"
    assert not changed, "name the old default in _ONCE_DEFAULT"


def test_other_data_below_the_same_name_are_other_cells(grid_of, store_path, tmp_path):
    from bpt_rl.config import BuildConfig
    from bpt_rl.datasets.build import build_store

    buffer = store_path.parent / "cartpole" / "ornstein_uhlenbeck" / "buffer"
    path = tmp_path / "store.h5"
    addresses = []
    for subset in ("first-6-episodes", "first-5-episodes"):
        tasks = ("cartpole_balance", "cartpole_swingup")
        build_store(
            BuildConfig(
                source=(str(buffer),),
                out=str(path),
                tasks=tasks,
                action_repeat=20,
                subset=subset,
                num_workers=1,
            )
        )
        data = DataConfig(store=str(path), batch_size=2, task="cartpole_balance")
        addresses += [cell.address for cell in expand(grid_of(train=TrainConfig(data=data)))]
    assert addresses[0] == expand(grid_of())[0].address != addresses[1]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (
            {"train.data.num_trajectory": (1,)},
            r"got 'train\.data\.num_trajectory'\. Nearest valid one: 'train\.da",
        ),
        ({"seed": (1,)}, r"got 'seed'\. Nearest valid one: 'train\.seed'"),
        ({"train.run": ("a",)}, r"got 'train\.run'\. Nearest valid one"),
        ({SEED: ("a",)}, r"train\.seed must be of type int; got 'a'.*In the cell of train\.seed = 'a'"),
        ({"train.data.draw": ("best",)}, r"train\.data\.draw must be one of uniform.* got 'best'"),
        ({COUNT: (0,)}, r"num_trajectories must be positive"),
        ({"train.data.task": ("cartpole_balance", "walker_run")}, "walker_run"),
        ({"preset": ("at_smal",)}, "Nearest: at_small"),
        (
            {"evaluate.num_context_trajectories": (0, 2)},
            "A context has an order just if .*In the cell of evaluate",
        ),
    ],
)
def test_what_is_no_cell_is_refused(grid_of, axes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        expand(grid_of(axes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {SEED: ()}}, r"An axis needs a value.*got 0 of train\.seed"),
        ({"axes": {SEED: (1, 1)}}, "must not repeat a value; got train.seed"),
        ({"linked": ({SEED: (1, 2), COUNT: (1,)},)}, "equally many; got 2 of train.seed, 1 of train.data"),
        ({"axes": {SEED: (1,)}, "linked": ({SEED: (1,)},)}, r"on one axis; got train\.seed on two"),
        ({"seeds_at_once": 0}, "seeds_at_once must be positive"),
        (
            {"name": "cells"},
            r"a folder of its own, none of cells, results, .*; got 'cells'\. Use another --n",
        ),
        ({"name": "../cells"}, r"got '\.\./cells'"),
        ({"name": "a/b"}, r"got 'a/b'"),
        ({"name": ".."}, r"got '\.\.'"),
    ],
)
def test_what_is_no_axis_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        GridConfig(**changes)


def test_simulators_are_shared_out_where_their_number_is_open(grid_of):
    for asked, expected in ((0, 3), (2, 2)):
        cells = expand(grid_of(evaluate=EvaluateConfig(num_workers=asked)))
        [training] = Job.of("out", [cells]).with_simulators(3).trainings
        assert [e["config"]["num_workers"] for e in training["evaluations"]] == [expected]
