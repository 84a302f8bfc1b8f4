"""The whole way, from nothing to a report: what `bpt-rl demo` does."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from gymnasium.vector import VectorEnv

from bpt_rl.ablate_config import DemoConfig, GridConfig
from bpt_rl.config import BuildConfig, EvaluateConfig, TrainConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.envs.tasks import make_vector
from bpt_rl.run.ablate import ablate
from bpt_rl.run.cell import train_and_evaluate
from bpt_rl.run.collect import collect
from bpt_rl.run.console import Advance, Stages
from bpt_rl.run.evaluate import evaluate_run
from bpt_rl.run.evaluation_record import describe_record
from bpt_rl.run.film_sources import film_evaluation
from bpt_rl.run.job import Job
from bpt_rl.run.launchers import InlineLauncher, Launcher
from bpt_rl.run.open_runs import Progress
from bpt_rl.run.records import RunFolder
from bpt_rl.run.report import write_report
from bpt_rl.run.train import train


def demo(config: DemoConfig, *, command: str = "") -> Path:
    """Returns the path of the report, after collecting, relabelling, training, evaluating and ablating.

    Called again after an interruption, it keeps the episodes, checkpoints and finished cells that are there.

    Args:
      config: Of every station.
      command: Command line that repeats this, for the record.
    """
    out = Path(config.out)
    ablation, baselines = _plan(config, out)
    with Stages(len(config.algorithms) + 4 + len(baselines)) as stages:
        _make_store(config, out, stages)
        with stages.stage("start the simulators") as advance:
            environments = make_vector(
                config.task,
                ablation.evaluate.num_chains,
                config.seed,
                config.collect.action_repeat,
            )
            advance(1, 1)
        try:
            runs = _train_and_evaluate(ablation, baselines, environments, stages, command)
        finally:
            environments.close()
        with stages.stage("draw two episodes, write the report") as advance:
            films = film_evaluation(_longest(runs))
            advance(1, 2)
            report = write_report(runs, out / "report.html")
            advance(2, 2)
    for run in runs:
        print(describe_record(RunFolder(run).evaluations()[-1]))
    print(films)
    return report


def _plan(config: DemoConfig, out: Path) -> tuple[GridConfig, list[TrainConfig]]:
    def placed(run: TrainConfig) -> TrainConfig:
        data = dataclasses.replace(run.data, store=str(out / "store.h5"), task=config.task)
        return dataclasses.replace(run, run=str(out / run.agent), seed=config.seed, data=data)

    ablation = dataclasses.replace(config.ablation, out=str(out), train=placed(config.ablation.train))
    return ablation, [placed(config.dt), placed(config.bc)]


def _make_store(config: DemoConfig, out: Path, stages: Stages) -> None:
    buffers = []
    for algorithm in config.algorithms:
        collection = dataclasses.replace(
            config.collect, algorithm=algorithm, out=str(out / "exorl"), seed=config.seed
        )
        with stages.stage(f"collect {collection.task}, {algorithm}") as advance:
            buffers.append(str(collect(collection, advance)))
    build = BuildConfig(
        source=tuple(buffers),
        out=str(out / "store.h5"),
        tasks=(config.task,),
        action_repeat=config.collect.action_repeat,
        num_workers=config.collect.num_workers,
    )
    with stages.stage(f"relabel for {config.task}") as advance:
        build_store(build, advance)


def _train_and_evaluate(
    ablation: GridConfig,
    baselines: list[TrainConfig],
    environments: VectorEnv,
    stages: Stages,
    command: str,
) -> list[Path]:
    def make_launcher(jobs: Sequence[Job]) -> Launcher:
        runner = functools.partial(train_and_evaluate, environments=environments)
        return InlineLauncher(runner, lambda done: advance(done, len(jobs)))

    with stages.stage(f"train and evaluate {ablation.train.agent}: the ablation") as advance:
        grid = ablate(ablation, make_launcher, command=command)
        for failure in grid.failures:
            raise ValueError(
                f"A cell of the demo failed, {failure.cell.title}: {failure.error} More in {grid.folder.path}/failures."
            )
        runs = list(grid.run_folders)
    for baseline in baselines:
        with stages.stage(f"train and evaluate {baseline.agent}") as advance:
            train(baseline, _with_loss(advance), command=command)
            evaluate = _evaluation_of(baseline, ablation.evaluate)
            evaluate_run(Path(baseline.run), evaluate, environments=environments, command=command)
        runs.append(Path(baseline.run))
    return runs


def _longest(runs: Sequence[Path]) -> Path:
    """Returns the run whose chains have the most trajectories."""
    return max(runs, key=lambda run: RunFolder(run).config().data.num_trajectories)


def _evaluation_of(baseline: TrainConfig, evaluate: EvaluateConfig) -> EvaluateConfig:
    """Returns what of an evaluation makes sense for an agent whose context holds no trajectories."""
    return dataclasses.replace(
        evaluate,
        # The ablation's cells have played them.
        random=False,
        context_order="none",
        num_context_trajectories=0,
        context_capacity=0,
        target_sweep=evaluate.target_sweep if baseline.agent == "dt" else (),
    )


def _with_loss(advance: Advance) -> Progress:
    def report(step: int, total: int, values: Mapping[str, float]) -> None:
        advance(step, total, note=f"loss {values['loss']:.3f}")

    return report
