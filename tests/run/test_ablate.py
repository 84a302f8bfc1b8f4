import dataclasses
import shutil

import pytest

from bpt_rl.ablate_config import AblateConfig
from bpt_rl.config import BuildConfig, DataConfig, EvaluateConfig, TrainConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.run.ablate import ablate, cells
from bpt_rl.run.records import RunFolder


class InterruptionError(Exception):
    pass


def grid_of(**changes):
    train = TrainConfig(data=DataConfig(batch_size=2, task="cartpole_balance"))
    return AblateConfig(**({"out": "grid", "num_trajectories": (1, 2, 4), "train": train} | changes))


def test_equal_tokens_give_every_cell_as_many_trajectories_a_batch():
    made = list(cells(grid_of(seeds=(0, 3))))
    assert [cell.run for cell in made] == [
        f"grid/at_n{count}_seed{seed}" for seed in (0, 3) for count in (1, 2, 4)
    ]
    assert [cell.seed for cell in made] == [0, 0, 0, 3, 3, 3]
    assert [cell.data.num_trajectories for cell in made[:3]] == [1, 2, 4]
    assert [cell.data.batch_size for cell in made[:3]] == [8, 4, 2]
    assert {cell.data.task for cell in made} == {"cartpole_balance"}


def test_equal_gradient_steps_give_every_cell_as_many_chains_a_batch():
    made = list(cells(grid_of(equal="gradient_steps", num_trajectories=(3, 4))))
    assert [(cell.data.num_trajectories, cell.data.batch_size) for cell in made] == [(3, 2), (4, 2)]


def test_a_batch_that_is_no_whole_number_of_chains_is_refused_before_anything_is_trained(tmp_path):
    grid = grid_of(out=str(tmp_path / "grid"), num_trajectories=(3, 4))
    with pytest.raises(ValueError, match=r"got 8 trajectories a batch and chains of 3\. Use counts"):
        ablate(grid)
    assert not list(tmp_path.iterdir())


def files(path, pattern="**/*"):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.glob(pattern) if p.is_file()}


def test_cells_are_trained_and_evaluated_once_and_an_interrupted_grid_goes_on(
    tiny, tmp_path, store_path, environments
):
    store = shutil.copy(store_path, tmp_path / "store.h5")
    out = tmp_path / "grid"
    train = tiny("", store=str(store))
    evaluate = EvaluateConfig(num_chains=3, memoryless=False, random=False)
    grid = AblateConfig(out=str(out), num_trajectories=(1, 2), train=train, evaluate=evaluate)
    first, second = out / "at_n1_seed0", out / "at_n2_seed0"

    def stop_within_the_second_cell(done, total):
        assert total == 12
        if done == 6 + 3:
            raise InterruptionError

    with pytest.raises(InterruptionError):
        ablate(grid, environments=environments, report_progress=stop_within_the_second_cell)
    finished = files(first)
    assert len(files(first, "evaluations/*.json")) == 1
    assert not files(second, "evaluations/*.json")

    progress = []
    folders = ablate(
        grid,
        environments=environments,
        report_progress=lambda done, _: progress.append(done),
        command="again",
    )
    assert folders == [first, second]
    # The first cell is passed over; the second goes on behind its checkpoint of step 2.
    assert progress == [6, 9, 10, 11, 12, 12]
    assert files(first) == finished
    assert [line["step"] for line in RunFolder(second).metrics()] == [1, 2, 3, 4, 5, 6]
    for path, count in ((first, 1), (second, 2)):
        [record] = RunFolder(path).evaluations()
        assert (record["num_trajectories"], record["num_episodes"], record["step"]) == (count, count, 6)

    everything = files(out)
    assert ablate(grid, environments=environments) == folders
    assert files(out) == everything

    # Another evaluation: evaluated again, not trained again.
    other = dataclasses.replace(grid, evaluate=dataclasses.replace(evaluate, target_multiple=0.5))
    for _ in range(2):
        ablate(other, environments=environments)
        for path in folders:
            assert len(files(path, "evaluations/*.json")) == 2
            assert RunFolder(path).evaluations()[-1]["target_rule"].endswith("times 0.5")
    assert files(out, "*/checkpoints/**/*") == {
        p: v for p, v in everything.items() if "checkpoints" in p.parts
    }

    # Other data below the same name: no cell of it is mixed with finished ones.
    buffer = store_path.parent / "cartpole" / "ornstein_uhlenbeck" / "buffer"
    build_store(
        BuildConfig(
            source=(str(buffer),), out=str(store), action_repeat=20, subset="first-5-episodes", num_workers=1
        )
    )
    with pytest.raises(ValueError, match="goes on with the data it began with"):
        ablate(other, environments=environments)
