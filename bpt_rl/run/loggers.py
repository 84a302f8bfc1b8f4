"""Where training metrics go: metrics.jsonl always, TensorBoard and Weights & Biases on request."""

import contextlib
import dataclasses
import importlib
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bpt_rl.config import TrainConfig
from bpt_rl.run.records import RunFolder

Log = Callable[[Mapping[str, float]], None]
"""Takes one line of metrics; `step` is among them."""


@contextlib.contextmanager
def open_loggers(config: TrainConfig, folder: RunFolder) -> Iterator[Log]:
    """Yields a function that writes a line of metrics to every configured place.

    Raises:
      ModuleNotFoundError: If a place needs a package that is not installed.
    """
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(folder.metrics_path.open("a"))
        sinks: list[Log] = []
        if "tensorboard" in config.logger:
            writer = _require("tensorboardX", "tensorboard").SummaryWriter(str(folder.path / "tensorboard"))
            stack.callback(writer.close)

            def to_tensorboard(line: Mapping[str, float]) -> None:
                for name, value in line.items():
                    if name != "step":
                        writer.add_scalar(name, value, line["step"])

            sinks.append(to_tensorboard)
        if "wandb" in config.logger:
            run = _require("wandb", "wandb").init(dir=folder.path, config=dataclasses.asdict(config))
            stack.callback(run.finish)
            sinks.append(lambda line: run.log(dict(line), step=int(line["step"])))

        def log(line: Mapping[str, float]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()
            for sink in sinks:
                sink(line)

        yield log


def _require(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"logger {extra!r} needs the package {module}, which is not installed. "
            f"Install it with: pip install 'bpt-rl[{extra}]'."
        ) from error
