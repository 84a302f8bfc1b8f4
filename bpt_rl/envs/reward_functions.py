"""Rewards by name: of named tasks, of parametrised families, and of a user's own functions.

A task is written in one of four ways:

  walker_run                           a named task
  walker_speed(speed=-3)               a task of a family of `bpt_rl.envs.reward_formulas`
  walker_crouch                        a function given to `register`
  my/rewards.py:walker_crouch          a function of that name in a file, loaded when it is first asked for

A function takes `features` (name to float64 array [...], see `bpt_rl.envs.features`), `observation` [..., O] (None
where there is none) and `action` [..., A] in [-1, 1], and returns one finite number for each state, [...].
"""

import dataclasses
import difflib
import functools
import importlib.util
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from bpt_rl.envs.reward_formulas import FAMILIES, NAMED, Family, Formula, Parameter

_FAMILY_TASK = re.compile(r"\s*(\w+)\s*\((.*)\)\s*")
_FILE_TASK = re.compile(r"(.+\.py):(\w+)")
_registered: dict[str, "RewardFunction"] = {}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardFunction:
    """A reward as a function of what is stored of a state."""

    task: str
    """Canonical name."""
    domain: str
    function: Formula
    origin: str = ""
    """Where a user's own function comes from; empty for the formulas of this package."""

    def __call__(
        self,
        features: Mapping[str, Float[np.ndarray, "..."]],
        observation: Float[np.ndarray, "... O"] | None,
        action: Float[np.ndarray, "... A"],
    ) -> Float[np.ndarray, "..."]:
        """Returns the reward of each state, float64.

        Raises:
          ValueError: If a user's own function fails, or returns another shape or a number that is not finite.
        """
        if not self.origin:
            return self.function(features, observation, action)
        shape = action.shape[:-1]
        try:
            reward = np.asarray(self.function(features, observation, action), np.float64)
        except Exception as error:
            hint = " Pass an observation, or read features alone." if observation is None else " Mend it."
            raise ValueError(f"{self._rule()} it raised {type(error).__name__}: {error}.{hint}") from error
        if reward.shape != shape:
            raise ValueError(
                f"{self._rule()} it returned shape {reward.shape} for {shape} states. Work on the last axis only."
            )
        bad = np.argwhere(~np.isfinite(reward))
        if bad.size:
            raise ValueError(
                f"{self._rule()} it returned {reward[tuple(bad[0])]} at {tuple(bad[0].tolist())}. "
                "Bound it where it divides."
            )
        return reward

    def _rule(self) -> str:
        return (
            f"A reward function must return one finite number a state; {self.task} of {self.origin} is wrong:"
        )


def find(task: str) -> RewardFunction | None:
    """Returns the reward function of a task in any of the four spellings; None if no formula has that name.

    Raises:
      FileNotFoundError: If the file of a task is not there.
      ValueError: If a family is unknown or lacks a parameter, a number is out of range, or a file is no
        Python or has no such function.
    """
    in_file = _FILE_TASK.fullmatch(task)
    if in_file:
        return _from_file(str(Path(in_file[1]).absolute()), in_file[2])
    of_family = _FAMILY_TASK.fullmatch(task)
    if of_family:
        return _of_family(of_family[1], of_family[2], task)
    if task in _registered:
        return _registered[task]
    for domain, formulas in NAMED.items():
        name = task.removeprefix(f"{domain}_")
        if name != task and name in formulas:
            return RewardFunction(task=task, domain=domain, function=formulas[name])
    if task in FAMILIES:
        raise ValueError(f"{_rule_of(task)}; got {task!r}. Add the parameters.")
    return None


def canonical_name(task: str) -> str:
    """Returns the one spelling that equal tasks share, fit to name a dataset of a store.

    `walker_speed( speed = 3.0 )` gives `walker_speed(speed=3)` and `my/rewards.py:walker_crouch` gives
    `walker_crouch`. A name without a formula is returned as it is.

    Raises:
      FileNotFoundError: As `find`.
      ValueError: As `find`.
    """
    found = find(task)
    return found.task if found else task


def is_of_this_process(task: str) -> bool:
    """Returns whether a task is the bare name of a registered function, which other processes do not know."""
    return task in _registered


def register(task: str, function: Formula) -> RewardFunction:
    """Makes a user's own function the reward of `task` in this process; see the module for what it takes.

    Simulator and builder processes do not see it: for them, write the task as FILE.py:NAME.

    Args:
      task: A new name that begins with the domain, like "walker_crouch". Registering a name again replaces it.
      function: Gives the reward of each state from features, observation and action.

    Raises:
      ValueError: If the name has no domain, is no identifier, or belongs to this package.
    """
    code = getattr(function, "__code__", None)
    origin = f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)
    reward = _owned(task, function, origin)
    _registered[task] = reward
    return reward


def _owned(task: str, function: Formula, origin: str) -> RewardFunction:
    domain = next((domain for domain in NAMED if task.startswith(f"{domain}_")), None)
    if domain is None or not task.isidentifier():
        raise ValueError(
            f"A reward function must be named after its domain, one of {', '.join(NAMED)}; got {task!r}. "
            "Choose a name like 'walker_crouch'."
        )
    if task in FAMILIES or task.removeprefix(f"{domain}_") in NAMED[domain]:
        raise ValueError(
            f"A reward function must have a name of its own; {task!r} is one of this package's. Rename it."
        )
    return RewardFunction(task=task, domain=domain, function=function, origin=origin)


def _from_file(path: str, name: str) -> RewardFunction:
    function = _namespace(path).get(name)
    if not callable(function):
        functions = [key for key, value in _namespace(path).items() if callable(value) and key[0] != "_"]
        raise ValueError(
            f"A task FILE.py:NAME must name a function of the file; {path} has no {name!r}. "
            f"{_nearest(name, functions)}"
        )
    known = _registered.get(name)
    if known and known.function is not function:
        raise ValueError(
            f"Reward functions must have different names; {name!r} of {path} is already that of {known.origin}. "
            "Rename one."
        )
    _registered[name] = _owned(name, function, path)
    return _registered[name]


@functools.cache
def _namespace(path: str) -> Mapping[str, Any]:
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"A task FILE.py:NAME must name a file; there is none at {path}. Check the path."
        )
    specification = importlib.util.spec_from_file_location(Path(path).stem, path)
    if specification is None or specification.loader is None:
        raise ValueError(f"A task FILE.py:NAME must name a Python file; got {path}. Choose another file.")
    module = importlib.util.module_from_spec(specification)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        raise ValueError(
            f"A file of reward functions must load; {path} raised {type(error).__name__}: {error}. Mend it."
        ) from error
    return vars(module)


def _of_family(name: str, arguments: str, task: str) -> RewardFunction:
    if name not in FAMILIES:
        raise ValueError(
            f"A family of tasks must be one of {', '.join(FAMILIES)}; got {task!r}. {_nearest(name, FAMILIES)}"
        )
    family = FAMILIES[name]
    numbers = _numbers(name, family, arguments, task)
    canonical = ",".join(f"{key}={_shortest(numbers[key])}" for key in family.parameters)
    return RewardFunction(
        task=f"{name}({canonical})",
        domain=family.domain,
        function=functools.partial(family.formula, **numbers),
    )


def _numbers(name: str, family: Family, arguments: str, task: str) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for argument in filter(None, map(str.strip, arguments.split(","))):
        key, equals, text = (part.strip() for part in argument.partition("="))
        if key not in family.parameters or not equals or key in numbers:
            raise ValueError(
                f"{_rule_of(name)}, each once; got {argument!r} in {task!r}. {_nearest(key, family.parameters)}"
            )
        numbers[key] = _number(text, key, family.parameters[key], task)
    missing = [key for key in family.parameters if key not in numbers]
    if missing:
        raise ValueError(f"{_rule_of(name)}; {task!r} lacks {missing[0]}. Add it.")
    return numbers


def _number(text: str, key: str, parameter: Parameter, task: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (parameter.least <= number <= parameter.most and abs(number) >= parameter.smallest):
        not_zero = f" and at least {parameter.smallest:g} away from 0" if parameter.smallest else ""
        raise ValueError(
            f"{key} must be a number in [{parameter.least:g}, {parameter.most:g}]{not_zero} "
            f"({parameter.unit}); got {text!r} in {task!r}. Choose another."
        )
    return number


def _rule_of(name: str) -> str:
    parameters = ",".join(f"{key}=..." for key in FAMILIES[name].parameters)
    return f"A task of this family is written {name}({parameters})"


def _shortest(number: float) -> str:
    # Zero without its sign, whole numbers without a point.
    return str(int(number)) if number == int(number) else repr(number)


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.0)
    return f"Nearest valid one: {near[0]!r}." if near else "Write it there."
