"""What every verb of the command line shares: its description, and how its arguments become a configuration."""

import dataclasses
import difflib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Verb:
    """One verb of the command line."""

    run: Callable[["Call"], None]
    summary: str
    arguments: str
    example: str


@dataclasses.dataclass(frozen=True)
class Call:
    """A verb, as it was typed."""

    name: str
    """Like "data build"."""
    verb: Verb
    arguments: Sequence[str]
    """Behind the name."""

    @property
    def command(self) -> str:
        """The whole command line, for the record."""
        return shlex.join(["bpt-rl", *self.name.split(), *self.arguments])


@dataclasses.dataclass(frozen=True)
class Nothing:
    """No options."""


def parse(config_type: type[T], call: Call, options: Sequence[str], default: T | None = None) -> T:
    """Returns the configuration that the options make of the default; `--help` and mistakes end the process."""
    import tyro

    verb = call.verb
    description = f"{verb.summary}\n\nExample: {verb.example}"
    usage = f"bpt-rl {call.name} {verb.arguments}".replace("[options]", "").strip()
    try:
        return tyro.cli(
            config_type,
            prog=usage,
            args=list(options),
            default=default or config_type(),
            description=description,
        )
    except SystemExit:
        # tyro finds what is near only if the groups before the name are right.
        for sentence in _misspelt(default or config_type(), options):
            print(sentence, file=sys.stderr)
        raise


def _misspelt(config: object, arguments: Sequence[str]) -> Iterator[str]:
    """Yields a sentence for each option that there is none of; it names the nearest."""
    known = {"help": "help"} | {name: name.rpartition(".")[2] for name in _option_names(config)}
    for argument in arguments:
        if not argument.startswith("--"):
            continue
        group, dot, last = argument[2:].partition("=")[0].replace("_", "-").rpartition(".")
        if {group + dot + last, group + dot + last.removeprefix("no-")} & known.keys():
            continue

        def likeness(name: str, option: str = group + dot + last, last: str = last) -> tuple[float, float]:
            # An option without a group may be of any: of those alike the first, not the one of the shortest name.
            pairs = ((last, known[name]), (option, name) if "." in option else ("", ""))
            ratios = [difflib.SequenceMatcher(None, *pair).ratio() for pair in pairs]
            return ratios[0], ratios[1]

        yield f"bpt-rl: there is no option {argument.partition('=')[0]}. Nearest: --{max(known, key=likeness)}."


def _option_names(config: object, prefix: str = "") -> Iterator[str]:
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value, name = getattr(config, field.name), prefix + field.name.replace("_", "-")
        if dataclasses.is_dataclass(value):
            yield from _option_names(value, f"{name}.")
        elif isinstance(value, Mapping) and value:
            yield from (f"{name}.{key}".replace("_", "-") for key in value)
        elif isinstance(value, tuple) and any(isinstance(item, Mapping) for item in value):
            yield from (f"{name}.{i}.{key}".replace("_", "-") for i, item in enumerate(value) for key in item)
        else:
            yield name


def split(call: Call, needed: str) -> tuple[list[str], list[str]]:
    """Returns the leading positional arguments and the options behind them.

    Raises:
      ValueError: If there is no positional argument, and no call for help.
    """
    arguments = call.arguments
    first_option = next((i for i, a in enumerate(arguments) if a.startswith("-")), len(arguments))
    positional, options = list(arguments[:first_option]), list(arguments[first_option:])
    if not positional and not {"-h", "--help"} & set(options):
        raise ValueError(f"`bpt-rl {call.name}` needs {needed}; got none. Example: {call.verb.example}")
    return positional, options
