"""The verbs that measure: `bpt-rl bench ...`."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bpt_rl import bench_config, config_toml
from bpt_rl.command import Call, Verb, parse, split
from bpt_rl.config import TrainConfig


def _preset(call: Call) -> tuple[TrainConfig, list[str]]:
    """Returns the training configuration that comes first, and the options behind it."""
    names, options = split(call, "a configuration: a TOML file or a preset")
    return config_toml.load(TrainConfig, names[0]) if names else TrainConfig(), [*names[1:], *options]


def _step(call: Call) -> None:
    train, options = _preset(call)
    config = parse(bench_config.StepBenchConfig, call, options, bench_config.StepBenchConfig(train=train))
    from bpt_rl.run.bench_step import STEP_COLUMNS, measure_steps, step_variants

    _measure(call, config, measure_steps(config), num_rows=len(step_variants(config)), columns=STEP_COLUMNS)


def _context(call: Call) -> None:
    names, options = split(
        call, "a configuration: a TOML file or a preset, or a GPT: gpt_1.3B, gpt_2.7B or gpt_6.7B"
    )
    default = _context_default(names[0]) if names else bench_config.ContextBenchConfig()
    config = parse(bench_config.ContextBenchConfig, call, [*names[1:], *options], default)
    from bpt_rl.run.bench_context import (
        CONTEXT_COLUMNS,
        LONGEST_COLUMNS,
        check_contexts,
        longest_rows,
        measure_contexts,
    )
    from bpt_rl.run.bench_plots import plot_contexts
    from bpt_rl.run.bench_record import table

    check_contexts(config)
    num_rows = len(config.tokens) * len(config.methods)
    rows = _measure(call, config, measure_contexts(config), num_rows=num_rows, columns=CONTEXT_COLUMNS)
    print(f"\n{table(longest_rows(rows), LONGEST_COLUMNS)}")
    record = Path(config.out)
    print(f"Plot: {plot_contexts([record], record.with_suffix('.png'))}")


def _context_default(name: str) -> bench_config.ContextBenchConfig:
    if not name.startswith("gpt_"):
        return bench_config.ContextBenchConfig(train=config_toml.load(TrainConfig, name))
    from bpt_rl.nn.language_model import GPT_SHAPES, GPT_VOCABULARY_SIZE

    shape = name.removeprefix("gpt_")
    if shape not in GPT_SHAPES:
        raise ValueError(
            f"A GPT must be one of {', '.join(f'gpt_{known}' for known in GPT_SHAPES)}; got {name!r}. Name one of them."
        )
    train = TrainConfig(model=GPT_SHAPES[shape])
    return bench_config.ContextBenchConfig(train=train, vocabulary_size=GPT_VOCABULARY_SIZE)


def _plot(call: Call) -> None:
    records, options = split(call, "a record that `bpt-rl bench context` wrote")
    config = parse(bench_config.PlotConfig, call, options)
    from bpt_rl.run.bench_plots import plot_contexts

    print(f"Plot: {plot_contexts([Path(record) for record in records], Path(config.out))}")


def _attention(call: Call) -> None:
    config = parse(bench_config.AttentionBenchConfig, call, call.arguments)
    from bpt_rl.run.bench_attention import ATTENTION_COLUMNS, measure_attention

    num_rows = len(config.tokens) * len(config.implementations)
    _measure(call, config, measure_attention(config), num_rows=num_rows, columns=ATTENTION_COLUMNS)


def _decode(call: Call) -> None:
    train, options = _preset(call)
    config = parse(bench_config.DecodeBenchConfig, call, options, bench_config.DecodeBenchConfig(train=train))
    from bpt_rl.run.bench_decode import DECODE_COLUMNS, decode_variants, measure_decoding

    num_rows = len(decode_variants(config))
    _measure(call, config, measure_decoding(config), num_rows=num_rows, columns=DECODE_COLUMNS)


def _rollout(call: Call) -> None:
    train, options = _preset(call)
    config = parse(
        bench_config.RolloutBenchConfig, call, options, bench_config.RolloutBenchConfig(train=train)
    )
    from bpt_rl.run.bench_rollout import ROLLOUT_COLUMNS, measure_rollouts

    num_rows = len(config.num_episodes) * len(config.num_parts)
    _measure(call, config, measure_rollouts(config), num_rows=num_rows, columns=ROLLOUT_COLUMNS)


def _measure(
    call: Call, config: Any, rows: Iterable[Any], *, num_rows: int, columns: Sequence[Any]
) -> list[Any]:
    """Returns the rows, each written as soon as it is there, and prints them."""
    from bpt_rl.run.bench_record import check_writable, table, write_record
    from bpt_rl.run.console import Stages

    path = Path(config.out)
    done: list[Any] = []
    bench = call.name.removeprefix("bench ")
    check_writable(path)
    with Stages(1) as stages, stages.stage(call.name) as advance:
        for row in rows:
            done.append(row)
            write_record(path, config, done, bench=bench, command=call.command)
            advance(len(done), max(num_rows, len(done)))
    print(table(done, columns))
    print(f"Record: {path}")
    return done


BENCH_VERBS: Mapping[str, Verb] = {
    "bench step": Verb(
        _step,
        "Measure time and memory of the training step, by context length and what layers keep.",
        "CONFIG [options]",
        "bpt-rl bench step at_350m --tokens 32_768 131_072 --activations save_attention recompute",
    ),
    "bench context": Verb(
        _context,
        "Measure the training step of an agent, or of a GPT like gpt_1.3B, against the context's length, by method.",
        "CONFIG [options]",
        "bpt-rl bench context at_350m --tokens 16_384 65_536 --methods bpt save_attention --longest",
    ),
    "bench plot": Verb(
        _plot,
        "Draw records of `bench context` and `bench step` in one picture: memory and time against context.",
        "RECORD... [options]",
        "bpt-rl bench plot results/bench_context.json --out results/bench_context.png",
    ),
    "bench attention": Verb(
        _attention,
        "Measure attention alone, each implementation beside the others.",
        "[options]",
        "bpt-rl bench attention --tokens 8192 32_768 --implementations blockwise cudnn",
    ),
    "bench decode": Verb(
        _decode,
        "Measure decoding a step against a filled cache, beside the bandwidth of copying.",
        "CONFIG [options]",
        "bpt-rl bench decode at_350m --tokens 131_072 --num-rows 1 4",
    ),
    "bench rollout": Verb(
        _rollout,
        "Measure environment steps a second of an agent, beside the uncached way, physics alone and decoding alone.",
        "CONFIG [options]",
        "bpt-rl bench rollout at_paper --num-episodes 4 16 --num-chains 16",
    ),
}
