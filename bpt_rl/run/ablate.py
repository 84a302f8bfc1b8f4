"""Ablation over the number of trajectories: a grid of runs, each trained and evaluated once."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from gymnasium.vector import VectorEnv

from bpt_rl.ablate_config import AblateConfig
from bpt_rl.config import TrainConfig
from bpt_rl.datasets.store import Store
from bpt_rl.run import records
from bpt_rl.run.evaluate import evaluate_run
from bpt_rl.run.evaluated_run import check_simulated
from bpt_rl.run.train import train

Progress = Callable[[int, int], None]
"""Called with gradient steps done and gradient steps in all, over the whole grid."""


def cells(config: AblateConfig) -> Iterator[TrainConfig]:
    """Yields the training configuration of each cell of the grid, one seed after another.

    With `equal = "tokens"` the chains of a batch shrink as the trajectories of a chain grow, so that every cell
    trains on equally many trajectories a step.

    Raises:
      ValueError: If the batch of the largest count is not a whole number of chains in some cell.
    """
    base = config.train
    total = base.data.batch_size * max(config.num_trajectories)
    for seed in config.seeds:
        for count in config.num_trajectories:
            batch_size, rest = (
                (base.data.batch_size, 0) if config.equal == "gradient_steps" else divmod(total, count)
            )
            if rest:
                raise ValueError(
                    f"Equal tokens need a whole number of chains in every batch; got {total} trajectories a batch "
                    f"and chains of {count}. Use counts that divide {total}, or equal = 'gradient_steps'."
                )
            yield dataclasses.replace(
                base,
                run=str(Path(config.out) / f"{base.agent}_n{count}_seed{seed}"),
                seed=seed,
                data=dataclasses.replace(base.data, num_trajectories=count, batch_size=batch_size),
            )


def ablate(
    config: AblateConfig,
    *,
    environments: VectorEnv | None = None,
    report_progress: Progress | None = None,
    command: str = "",
) -> list[Path]:
    """Trains and evaluates the cells that are not finished; returns the run folders of all.

    A cell is finished when an evaluation of its last gradient step, under the same evaluation configuration and
    from the same data, lies in its run folder.

    Args:
      config: The grid.
      environments: For the evaluations, to be used again; made for each cell if None.
      report_progress: Told of gradient steps.
      command: Command line that repeats this, for the record.

    Raises:
      FileNotFoundError: If the store does not exist.
      ValueError: If the grid has no whole batches, the task has no simulator, or a cell was begun with another
        configuration or data.
    """
    grid = list(cells(config))
    with Store.open(config.train.data.store) as store:
        check_simulated(store.source)
        digest = store.digest
    num_steps = config.train.optimizer.num_steps
    for index, cell in enumerate(grid):

        def report(step: int, _: int, __: Mapping[str, float], index: int = index) -> None:
            if report_progress:
                report_progress(index * num_steps + step, len(grid) * num_steps)

        if not _is_finished(Path(cell.run), cell, config, digest):
            train(cell, report, command=command)
            evaluate_run(Path(cell.run), config.evaluate, environments=environments, command=command)
            records.write_json(
                Path(cell.run) / "cell.json", {"evaluate": dataclasses.asdict(config.evaluate)}
            )
        report(num_steps, num_steps, {})
    return [Path(cell.run) for cell in grid]


def _is_finished(path: Path, cell: TrainConfig, config: AblateConfig, digest: str) -> bool:
    marker, folder = path / "cell.json", records.RunFolder(path)
    if not marker.is_file() or not any(folder.evaluations_path.glob("*.json")):
        return False
    # As JSON, which knows no tuples.
    asked = json.loads(json.dumps(dataclasses.asdict(config.evaluate)))
    same_evaluation = json.loads(marker.read_text())["evaluate"] == asked
    return same_evaluation and folder.config() == cell and folder.statistics().digest == digest
