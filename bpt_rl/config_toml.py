"""Configurations as TOML: reading presets and files, writing resolved ones."""

import dataclasses
import difflib
import importlib.resources
import json
import tomllib
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

T = TypeVar("T")


def load(config_type: type[T], name_or_path: str) -> T:
    """Returns the configuration of a TOML file or of a shipped preset.

    Args:
      config_type: Dataclass to fill; fields that the file leaves out keep their defaults.
      name_or_path: Path of a TOML file, or the bare name of a preset in `configs/`.

    Raises:
      FileNotFoundError: If there is neither such a file nor such a preset.
      ValueError: If the file is not TOML, or a key or value does not fit.
    """
    path = Path(name_or_path)
    if path.is_file():
        text = path.read_text(encoding="utf-8")
    else:
        resource = importlib.resources.files("bpt_rl.configs").joinpath(f"{name_or_path}.toml")
        if not resource.is_file():
            names = preset_names()
            near = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.0)
            raise FileNotFoundError(
                f"A configuration must be a TOML file or a preset; got {name_or_path!r}. "
                f"Presets: {', '.join(names)}. Nearest: {near[0]}."
            )
        text = resource.read_text(encoding="utf-8")
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"A configuration must be valid TOML; {name_or_path}: {error}. Mend it.") from error
    return from_mapping(config_type, values)


def preset_names() -> list[str]:
    """Returns the names of the presets in `configs/`."""
    folder = importlib.resources.files("bpt_rl.configs")
    names = (entry.name for entry in folder.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def from_mapping(config_type: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Returns a dataclass filled from nested mappings, as TOML and JSON give them.

    Raises:
      ValueError: If a key is unknown (the nearest valid one is named) or a value has the wrong type.
    """
    hints = typing.get_type_hints(config_type)
    arguments = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1, cutoff=0.0)
            raise ValueError(
                f"A configuration key must be a field of {config_type.__name__}; got {prefix + key!r}. "
                f"Nearest valid key: {prefix + near[0]!r}."
            )
        arguments[name] = _convert(hints[name], value, prefix + name)
    return config_type(**arguments)


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_mapping(typing.cast(type, hint), value, f"{where}.")
    origin = typing.get_origin(hint)
    if hint is Any:
        return tuple(value) if isinstance(value, list) else value
    if origin is Mapping and isinstance(value, Mapping):
        item = typing.get_args(hint)[1]
        return {name: _convert(item, v, f"{where}.{name}") for name, v in flat(value).items()}
    if origin is tuple and isinstance(value, list | tuple):
        item, *rest = typing.get_args(hint)
        if rest == [Ellipsis]:
            return tuple(_convert(item, v, where) for v in value)
    if origin is Literal:
        choices = typing.get_args(hint)
        if value in choices:
            return value
        raise ValueError(f"{where} must be one of {', '.join(map(str, choices))}; got {value!r}.")
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    expected = hint.__name__ if typing.get_origin(hint) is None else hint
    raise ValueError(f"{where} must be of type {expected}; got {value!r}. Change it in the configuration.")


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested tables as one, with names like "data.store"."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def to_toml(config: Any) -> str:
    """Returns a configuration dataclass as TOML text that `load` reads back."""
    lines: list[str] = []
    _write_table(dataclasses.asdict(config), "", lines)
    return "\n".join(lines).lstrip("\n") + "\n"


def _write_table(table: Mapping[str, Any], prefix: str, lines: list[str]) -> None:
    for key, value in table.items():
        if not isinstance(value, Mapping):
            lines.append(f"{key} = {_toml_value(value)}")
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines.append(f"\n[{prefix}{key}]")
            _write_table(value, f"{prefix}{key}.", lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        # A JSON string is a TOML string but for the one control character that JSON leaves as it is.
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {_toml_value(v)}" for name, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    return repr(value)
