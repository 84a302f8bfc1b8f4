"""The whole way, from nothing to a report: what `bpt-rl demo` does."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bpt_rl.config import AblateConfig, BuildConfig, DemoConfig, EvaluateConfig, TrainConfig
from bpt_rl.datasets.build import build_store
from bpt_rl.envs.vector import make_vector
from bpt_rl.run.ablate import ablate, cells
from bpt_rl.run.collect import collect
from bpt_rl.run.console import Advance, Stages
from bpt_rl.run.evaluate import describe_record, evaluate_run, render_run
from bpt_rl.run.report import write_report
from bpt_rl.run.train import train

STAGES = ("collect", "build", "at", "dt", "bc", "report")


def demo(config: DemoConfig, *, command: str = "") -> Path:
    """Returns the path of the report, after collecting, relabelling, training, evaluating and ablating.

    Every stage goes on from what an earlier call left in `config.out`.

    Args:
      config: Of every station.
      command: Command line that repeats this, for the record.
    """
    out = Path(config.out)
    collection = dataclasses.replace(config.collect, out=str(out / "exorl"), seed=config.seed)
    store = out / "store.h5"
    with Stages(len(STAGES)) as stages:
        with stages.stage(f"collect {collection.task}, {collection.algorithm}") as advance:
            buffer = collect(collection, advance)
        with stages.stage(f"relabel for {config.task}, build the store") as advance:
            build = BuildConfig(
                source=str(buffer),
                out=str(store),
                tasks=(config.task,),
                action_repeat=collection.action_repeat,
                num_workers=collection.num_workers,
            )
            build_store(build, advance)
        runs, summaries = _train_and_evaluate(config, out, store, stages, command)
        with stages.stage("render an episode, write the report") as advance:
            summaries.append(render_run(runs[0], config.ablation.evaluate))
            advance(1, 2)
            report = write_report(runs, out / "report.html")
            advance(2, 2)
    print("\n".join(summaries))
    return report
