"""Running a grid: real cells in this process, made-up ones (`benchmarks/stub_cells.py`) in processes that die."""

import dataclasses
import functools
import importlib.util
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bpt_rl import config_toml
from bpt_rl.ablate_config import SHARED_FOLDERS, AblateConfig, GridConfig
from bpt_rl.config import DataConfig, EvaluateConfig, TrainConfig
from bpt_rl.run.ablate import ablate, describe_result
from bpt_rl.run.cell import train_and_evaluate
from bpt_rl.run.grid import expand
from bpt_rl.run.grid_folder import GridFolder
from bpt_rl.run.launcher_local import LocalLauncher, Slot, slots
from bpt_rl.run.launchers import InlineLauncher
from bpt_rl.run.records import RunFolder

COUNT, SEED = "train.data.num_trajectories", "train.seed"
STUBS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def stubs():
    spec = importlib.util.spec_from_file_location("stub_cells", STUBS / "stub_cells.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def made_up(store_path, tmp_path, monkeypatch):
    """A grid of made-up cells; what plays them in other processes finds its way and writes a log."""
    paths = os.pathsep.join(filter(None, (str(STUBS), os.environ.get("PYTHONPATH"))))
    monkeypatch.setenv("PYTHONPATH", paths)
    monkeypatch.setenv("STUB_LOG", str(tmp_path / "played"))

    def make(**changes):
        data = DataConfig(store=str(store_path), task="cartpole_balance", batch_size=2)
        values = {"out": str(tmp_path / "grid"), "axes": {COUNT: (1, 2), SEED: (0, 1)}}
        return GridConfig(**(values | {"train": TrainConfig(data=data)} | changes))

    return make


def played(tmp_path):
    return [line.split()[0] for line in (tmp_path / "played").read_text().splitlines()]


def inline(runner, told=None):
    return lambda jobs: InlineLauncher(runner, told)


def local(config, runner, number=2):
    places = [Slot(environment={}) for _ in range(number)]
    return lambda jobs: LocalLauncher(places, GridFolder(Path(config.out)).logs_path, f"stub_cells:{runner}")


def not_called(jobs):
    raise AssertionError(jobs)


def files(path, pattern="**/*"):
    return {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in path.glob(pattern) if p.is_file()}


def test_cells_are_trained_and_evaluated_once_and_an_interrupted_grid_goes_on(
    tiny, tmp_path, store_path, environments
):
    evaluate = EvaluateConfig(num_chains=3, num_episodes=1, memoryless=False, random=False, seed=1_000_000)
    axes = {COUNT: (1, 2)}
    runner = functools.partial(train_and_evaluate, environments=environments)

    def grid(out, axes=axes):
        # The perceptron compiles fastest.
        train = tiny("", agent="bc")
        return GridConfig(out=str(tmp_path / out), axes=axes, train=train, evaluate=evaluate)

    def stop_within_the_second_cell(done):
        # Its third of six steps; the training is four fifths of a job.
        if done >= 1 + 0.8 * 3 / 6:
            raise KeyboardInterrupt

    config = grid("grid")
    out = tmp_path / "grid"
    first, second = (out / "cells" / cell.train.run for cell in expand(config))
    with pytest.raises(KeyboardInterrupt):
        ablate(config, inline(runner, stop_within_the_second_cell))
    finished = files(first)
    assert len(files(first, "evaluations/*.json")) == 1
    assert not files(second, "evaluations/*.json")

    progress = []
    result = ablate(config, inline(runner, progress.append), command="again")
    assert result.run_folders == [first, second]
    # The first cell is passed over; the second goes on behind its checkpoint of step 2.
    assert progress == pytest.approx([0, *(0.8 * step / 6 for step in (3, 4, 5, 6)), 0.8])
    assert files(first) == finished
    assert [line["step"] for line in RunFolder(second).metrics()] == [1, 2, 3, 4, 5, 6]
    for path, count in ((first, 1), (second, 2)):
        [record] = RunFolder(path).evaluations()
        assert (record["num_trajectories"], record["step"]) == (count, 6)

    everything = files(out)
    assert ablate(config, not_called).cells == result.cells
    assert files(out) == everything
    uninterrupted = ablate(grid("other"), inline(runner))
    assert uninterrupted.folder.table_path.read_bytes() == result.folder.table_path.read_bytes()

    # Another evaluation: evaluated again, not trained again, beside the first.
    other = grid("grid", axes={**axes, "evaluate.seed": (1_000_000, 7)})
    result = ablate(other, inline(runner))
    assert (len(result.cells), result.run_folders) == (4, [first, second])
    for path in (first, second):
        assert len(files(path, "evaluations/*.json")) == 2
        assert {record["environment_seed"] for record in RunFolder(path).evaluations()} == {1_000_000, 7}
    checkpoints = {p: v for p, v in everything.items() if "checkpoints" in p.parts}
    assert files(out, "cells/*/checkpoints/**/*") == checkpoints


def test_a_cell_that_fails_is_tried_twice_and_named_at_the_end(made_up, stubs, tmp_path):
    config, notes = made_up(), []
    result = ablate(config, inline(stubs.fail), report_progress=lambda *_, note: notes.append(note))
    assert any(f"0 failed, 1 tried again, see {config.out}/failures" in note for note in notes)
    assert notes[-1] == f"2 failed, 0 tried again, see {config.out}/failures"
    assert [f.cell.title for f in result.failures] == [
        "num_trajectories 1, seed 1",
        "num_trajectories 2, seed 1",
    ]
    text = describe_result(result)
    assert text.startswith("2 of 4 cells are finished.")
    assert "2 failed, each tried twice" in text
    assert "num_trajectories 1, seed 1: FloatingPointError: seed 1 never ends well" in text
    failure = result.folder.failure(result.failures[0].cell.address)
    assert failure["tries"] == 2
    assert "Traceback" in failure["details"]
    assert "seed 1 never ends well" in result.folder.page_path.read_text()
    assert len(result.folder.table_path.read_text().splitlines()) > 20
    # The same command tries it again.
    again = ablate(config, inline(stubs.play))
    assert again.failures == []
    assert result.folder.failure(result.failures[0].cell.address) is None
    assert len(played(tmp_path)) == 4


def test_a_process_that_dies_loses_its_cell_alone_and_the_table_stays_the_same(made_up, stubs, tmp_path):
    config = made_up()
    result = ablate(config, local(config, "die_once"))
    assert (result.failures, len(played(tmp_path))) == ([], 4)
    whole = ablate(made_up(out=str(tmp_path / "whole")), inline(stubs.play))
    assert whole.folder.table_path.read_bytes() == result.folder.table_path.read_bytes()

    config = made_up(out=str(tmp_path / "dead"))
    result = ablate(config, local(config, "die"))
    assert {f.cell.train.seed for f in result.failures} == {1}
    assert len(result.failures) == 2
    assert "its process ended with signal SIGKILL, perhaps out of memory" in result.failures[0].error
    assert "about to die" in result.failures[0].details


def test_two_processes_with_one_folder_run_every_cell_once(made_up, stubs, tmp_path, monkeypatch):
    monkeypatch.setenv("STUB_SECONDS", "0.05")
    config = made_up(axes={COUNT: (1, 2), SEED: tuple(range(10))})
    script = tmp_path / "other.py"
    script.write_text(
        "import pathlib, sys\n"
        "from bpt_rl import config_toml\n"
        "from bpt_rl.ablate_config import GridConfig\n"
        "from bpt_rl.run.ablate import ablate\n"
        "from bpt_rl.run.launchers import InlineLauncher\n"
        "import stub_cells\n"
        "config = config_toml.load(GridConfig, sys.argv[1])\n"
        "pathlib.Path(sys.argv[1] + '.ready').touch()\n"
        "ablate(config, lambda jobs: InlineLauncher(stub_cells.play))\n"
    )
    # Two grids of the same cells: each ends with a table of its own.
    theirs = dataclasses.replace(config, name="theirs")
    (tmp_path / "grid.toml").write_text(config_toml.to_toml(theirs))
    other = subprocess.Popen([sys.executable, str(script), str(tmp_path / "grid.toml")])
    while not (tmp_path / "grid.toml.ready").exists():
        assert other.poll() is None
        time.sleep(0.01)
    result = ablate(config, inline(stubs.play))
    assert other.wait(60) == 0
    assert sorted(played(tmp_path)) == sorted(cell.address for cell in result.cells)
    processes = {line.split()[1] for line in (tmp_path / "played").read_text().splitlines()}
    assert processes == {str(other.pid), str(os.getpid())}
    table = result.folder.table_path.read_bytes()
    assert GridFolder.of(theirs).table_path.read_bytes() == table
    assert {p.name for p in (tmp_path / "grid" / "theirs").iterdir()} >= {"ablation.html", "costs.csv"}
    whole = made_up(axes=config.axes, out=str(tmp_path / "whole"))
    assert ablate(whole, inline(stubs.play)).folder.table_path.read_bytes() == table


def test_grids_of_one_folder_share_cells_and_each_has_its_own_table_and_page(made_up, stubs, tmp_path, cli):
    out = tmp_path / "grid"
    axes = {"narrow": {COUNT: (1, 2), SEED: (0,)}, "wide": {COUNT: (1, 2), SEED: (0, 1)}}
    configs = {name: made_up(axes=axes[name], name=name) for name in axes}
    ablate(configs["narrow"], inline(stubs.play))
    narrow = files(out / "narrow")
    ablate(configs["wide"], inline(stubs.play))
    # What the first had finished is not run again, and its own files are as they were.
    assert len(played(tmp_path)) == len(set(played(tmp_path))) == 4
    assert files(out / "narrow") == narrow
    for name, config in configs.items():
        own = GridFolder.of(config)
        assert {path.name for path in (out / name).iterdir()} == {
            *("table.csv", "costs.csv", "ablation.html", "grid.toml", "stamp")
        }
        assert config_toml.load(GridConfig, str(own.config_path)) == config
        alone = dataclasses.replace(config, out=str(tmp_path / f"alone_{name}"))
        expected = ablate(alone, inline(stubs.play)).folder
        assert own.table_path.read_bytes() == expected.table_path.read_bytes()
    names = {path.name for path in out.iterdir()}
    assert names - {"narrow", "wide"} <= set(SHARED_FOLDERS) and not names & {"table.csv", "ablation.html"}
    # Each is current: neither is written again.
    before = files(out)
    for config in configs.values():
        ablate(config, not_called)
    assert files(out) == before

    # The command line names a grid by its file; what lies beside its page goes on where it came from.
    path = tmp_path / "third.toml"
    path.write_text(config_toml.to_toml(made_up(axes={COUNT: (2, 1), SEED: (0, 1)})))
    shown = cli.succeed(f"ablate {path} --report-only")
    assert f"Page: {out}/third/ablation.html\nTable: {out}/third/table.csv\n" in shown
    assert files(out / "wide") == {p: v for p, v in before.items() if p.parent.name == "wide"}
    again = cli.succeed(f"ablate {out}/third/grid.toml")
    assert f"Page: {out}/third/ablation.html\n" in again
    assert f"Page: {out}/fourth/ablation.html\n" in cli.succeed(f"ablate {path} --name fourth")
    tables = {(out / name / "table.csv").read_bytes() for name in ("third", "fourth")}
    assert len(tables) == 1 and (out / "wide" / "table.csv").read_bytes() not in tables


class _Recorder(InlineLauncher):
    """Keeps the jobs that it is given."""

    def __init__(self, runner):
        super().__init__(runner)
        self.jobs = []

    def start(self, job):
        self.jobs.append(job)
        super().start(job)


def test_cells_that_differ_in_their_seed_alone_are_trained_together(made_up, stubs):
    config = made_up(axes={COUNT: (1, 2), SEED: (0, 1, 2)}, seeds_at_once=2)
    recorder = _Recorder(stubs.fail)
    result = ablate(config, lambda jobs: recorder)
    found = [
        [(t["config"]["data"]["num_trajectories"], t["config"]["seed"]) for t in job.trainings]
        for job in recorder.jobs
    ]
    # Seeds whose training fails together are tried again alone.
    assert found[:4] == [[(1, 0), (1, 1)], [(1, 2)], [(2, 0), (2, 1)], [(2, 2)]]
    assert sorted(found[4:]) == [[(1, 0)], [(1, 1)], [(2, 0)], [(2, 1)]]
    assert [(f.cell.train.data.num_trajectories, f.cell.train.seed) for f in result.failures] == [
        (1, 1),
        (2, 1),
    ]


def test_seeds_trained_together_come_out_as_cells_of_their_own(tiny, tmp_path, environments):
    evaluate = EvaluateConfig(num_chains=3, num_episodes=1, memoryless=False, random=False)
    base = GridConfig(
        out=str(tmp_path), axes={SEED: (0, 1)}, train=tiny("", agent="bc"), evaluate=evaluate, seeds_at_once=2
    )
    result = ablate(base, inline(functools.partial(train_and_evaluate, environments=environments)))
    assert [RunFolder(path).config().seed for path in result.run_folders] == [0, 1]
    rows = result.folder.costs_path.read_text().splitlines()
    names = rows[0].split(",")
    assert [row.split(",")[names.index("trained_together")] for row in rows[1:]] == ["2", "2"]
    assert [row.split(",")[names.index("gradient_steps")] for row in rows[1:]] == ["6", "6"]


def test_processes_share_devices_or_cores(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda,cpu")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    monkeypatch.setenv("XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB", "100")
    made = slots(0, 2, job_memory=1)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in made] == ["2", "2", "5", "5"]
    assert {slot.environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] for slot in made} == {"0.4750"}
    assert {slot.environment["XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"] for slot in made} == {"25"}
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in slots(3, 1, job_memory=1)] == ["2", "5", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4")
    shared = slots(0, 1, job_memory=1, job_devices=2)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in shared] == ["0,1", "2,3"]
    with pytest.raises(ValueError, match=r"got 8 by train\.mesh or evaluate\.mesh and 5 on"):
        slots(0, 1, job_memory=1, job_devices=8)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert [slot.cores for slot in slots(0, 1, job_memory=1)] == [(0, 4), (1, 5), (2, 6), (3, 7)]
    # No more processes than memory has room for, but one at least.
    assert len(slots(0, 1, job_memory=1 << 60)) == 1


def test_a_cell_without_a_result_has_failed(made_up):
    result = ablate(made_up(axes={}), inline(lambda job, report: None))
    assert [f.error for f in result.failures] == ["RuntimeError: the cell ended without a result"]


def test_the_command_line_tells_what_would_run_and_what_is_done(made_up, stubs, tmp_path, cli):
    axes = {"preset": ("at_small", "td3"), SEED: (0, 1)}
    config = made_up(axes=axes)
    path = tmp_path / "grid.toml"
    path.write_text(config_toml.to_toml(config))
    out = cli.succeed(f"ablate {path} --dry-run")
    rows = [re.split(r"  +", line) for line in out.splitlines()]
    assert rows[:2] == [
        ["cell", "state", "step memory", "training"],
        ["preset at_small, seed 0", "missing", rows[1][2], "-"],
    ]
    assert rows[1][2].endswith("iB")
    assert rows[3] == ["preset td3, seed 0", "missing", "-", "-"]
    assert "4 cells of 4 trainings; 4 are missing" in out
    assert "- not planned: td3 is no transformer" in out
    assert not (tmp_path / "grid").exists()

    ablate(config, inline(stubs.play))
    assert "4 cells of 4 trainings; 0 are missing" in cli.succeed(f"ablate {path} --dry-run")
    # Of what is finished a page can be had at any time, and nothing is started.
    kept = next((tmp_path / "grid" / "results").glob("*.json"))
    kept.rename(tmp_path / kept.name)
    out = cli.succeed(f"ablate {path} --report-only")
    assert out.startswith("3 of 4 cells are finished.")
    assert "3 of 4 cells finished" in (tmp_path / "grid" / "grid" / "ablation.html").read_text()
    (tmp_path / kept.name).rename(kept)
    with pytest.raises(ValueError, match="dry_run and report_only together"):
        AblateConfig(dry_run=True, report_only=True)
    # Nothing is missing, so nothing is started.
    assert cli.succeed(f"ablate {path}").startswith("4 of 4 cells are finished.")
    assert len(played(tmp_path)) == 4
    message = r"no option --axes\.train\.sed\. Nearest: --axes\.train\.seed\."
    assert re.search(message, cli.refuse(f"ablate {path} --axes.train.sed 3"))
    path.write_text(path.read_text().replace("train.seed = [0, 1]", "train.sed = [0, 1]"))
    assert "Nearest valid one: 'train.seed'" in cli.refuse(f"ablate {path}")
