"""A picture of what `bpt-rl bench context` and `step` measured: memory and step time against the context, log-log."""

import itertools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullLocator

from bpt_rl.datasets.capacity import GIB
from bpt_rl.run.devices import H100
from bpt_rl.run.picture_style import PICTURE_STYLE

Row = Mapping[str, Any]

_STYLE: dict[str, Any] = {
    **PICTURE_STYLE,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.8,
    "lines.markersize": 6,
}
_LOOKS = {
    "full": ("#6b7280", "p"),
    "memory_efficient": ("#b07c00", "P"),
    "bpt": ("#d55e00", "s"),
    "save_attention": ("#0072b2", "o"),
    "offload_attention": ("#3a9fd8", "^"),
    "recompute": ("#00815f", "D"),
    "offload": ("#a8467f", "v"),
}
"""Colour and marker of each method; colours of the report (Okabe and Ito)."""
_INK = "#1b1f24"
_RANKS = ("failed", "does not fit", "compiled", "executed")
"""What of two rows about the same is drawn: the one that knows more."""


def plot_contexts(records: Sequence[Path], out: Path) -> Path:
    """Returns `out`, a PNG of the rows of all records, methods side by side.

    Raises:
      FileNotFoundError: If there is no such record.
      ValueError: If a file is no record of `bench context` or `bench step`, or they are of different models.
      OSError: If the picture cannot be written.
    """
    loaded = [_load(path) for path in records]
    subject = _check_one_subject(loaded)
    rows = best_rows(row for record in loaded for row in record["rows"])
    devices = sorted({record["device"] for record in loaded})
    # Not pyplot: it would open a display where there is one.
    with mpl.rc_context(_STYLE):
        # Where nothing ran, there is no time to draw.
        draw = (
            [_draw_memory, _draw_time]
            if any(map(_seconds, itertools.chain(*rows.values())))
            else [_draw_memory]
        )
        figure = Figure(figsize=(1 + 5.3 * len(draw), 5.4))
        panels = figure.subplots(1, len(draw), squeeze=False)[0]
        for draw_panel, axes in zip(draw, panels, strict=True):
            draw_panel(axes, rows)
        figure.suptitle(f"A whole training step, {', '.join(devices)}\n{subject}", fontsize=11)
        figure.legend(
            handles=_legend(rows), loc="outside lower center", ncols=3 if len(draw) == 1 else 5, frameon=False
        )
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=130)
    return out


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(
            f"A record must be a JSON file that `bpt-rl bench` wrote; there is none at {path}. Name another."
        )
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        bench = record["bench"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"A record must be JSON with a field bench; {path} is not. Name another.") from error
    if bench not in ("context", "step"):
        raise ValueError(
            f"A record must be of `bench context` or `bench step`; {path} is of {bench!r}. Name another."
        )
    return record if bench == "context" else record | {"rows": rows_of_steps(record)}


def rows_of_steps(record: Mapping[str, Any]) -> Sequence[Row]:
    """Returns the rows of a record of `bench step` as those of `bench context`.

    Left out are forward passes alone, several rows a batch, and what failed to compile.
    """
    config = record["config"]
    if config.get("forward_only"):
        return []
    limit = H100.memory if H100.name in record["device"] else None
    model, is_moved = config["train"]["model"], config["train"]["optimizer"].get("place") == "host"
    size = 2 if model["compute_dtype"] == "bfloat16" else 4
    inputs = model["num_layers"] * model["embed_dim"] * size  # bytes a token
    rows = []
    for row in record["rows"]:
        if row["num_rows"] > 1 or row["argument_bytes"] is None:
            continue
        num_bytes = row["argument_bytes"] + row["temporary_bytes"]
        fits = limit is None or num_bytes <= limit
        status = "executed" if row["step_seconds"] else "compiled" if fits else "does not fit"
        is_paper = (row["implementation"], row["activations"]) == ("blockwise", "recompute")
        rows.append(
            {
                "method": "bpt" if is_paper else row["activations"],
                "tokens": row["tokens"],
                "status": status,
                "device_bytes": num_bytes,
                "floor_bytes": None if is_moved else row["argument_bytes"] * 4 // 3 + inputs * row["tokens"],
                "limit_bytes": limit,
                "step_seconds": row["step_seconds"],
                "expected_seconds": None,
                "floor_seconds": row.get("floor_seconds"),
            }
        )
    return rows


def _check_one_subject(records: Sequence[Mapping[str, Any]]) -> str:
    """Returns what was measured, in words, and refuses to draw two models as one."""
    said = set()
    for record in records:
        config = record["config"]
        model, vocabulary_size = config["train"]["model"], config.get("vocabulary_size", 0)
        kind = f"language model, vocabulary of {vocabulary_size:,}" if vocabulary_size else model["layout"]
        said.add(
            f"{model['num_layers']} layers of width {model['embed_dim']}, {model['num_heads']} heads, "
            f"{model['compute_dtype']}, {kind}"
        )
    if len(said) > 1:
        raise ValueError(
            f"Records of one picture must be of one model; got {' and '.join(sorted(said))}. Draw two pictures."
        )
    return said.pop()


def best_rows(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Returns each method's rows from short to long; of several of one length, the last that knows most."""
    best: dict[tuple[str, int], Row] = {}
    for row in rows:
        key = (row["method"], row["tokens"])
        if key not in best or _RANKS.index(row["status"]) >= _RANKS.index(best[key]["status"]):
            best[key] = row
    methods = sorted({method for method, _ in best}, key=list(_LOOKS).index)
    return {method: [best[key] for key in sorted(best) if key[0] == method] for method in methods}


def _draw_memory(axes: Axes, methods: Mapping[str, Sequence[Row]]) -> None:
    rows = [row for rows in methods.values() for row in rows]
    for method, own in methods.items():
        points = [
            (row["tokens"], row["device_bytes"] / GIB, row["status"]) for row in own if row["device_bytes"]
        ]
        _draw_method(axes, method, points)
    floors = {row["tokens"]: row["floor_bytes"] / GIB for row in rows if row["floor_bytes"]}
    _draw_floor(axes, floors, "floor: state, its gradient and the layers' inputs")
    limits = sorted({row["limit_bytes"] for row in rows} - {None})
    for limit, smaller in zip(limits, [0, *limits], strict=False):
        # Two of the same kind differ by what their drivers keep.
        if limit > 1.02 * smaller:
            label = f"the device has {limit / GIB:.1f} GiB"
            axes.axhline(limit / GIB, color=_INK, linewidth=1.1, label=label)
    _dress(axes, sorted({row["tokens"] for row in rows}), "memory of the device, GiB, as compiled")


def _draw_time(axes: Axes, methods: Mapping[str, Sequence[Row]]) -> None:
    floors: dict[int, float] = {}
    for method, own in methods.items():
        points = [(row["tokens"], seconds, row["status"]) for row in own if (seconds := _seconds(row))]
        _draw_method(axes, method, points)
        for row in own:
            if row["floor_seconds"]:
                floors[row["tokens"]] = min(row["floor_seconds"], floors.get(row["tokens"], math.inf))
    _draw_floor(axes, floors, "floor: attention and matrix products, each at its own speed")
    lengths = {row["tokens"] for rows in methods.values() for row in rows}
    _dress(axes, sorted(lengths), "seconds of a step")


def _seconds(row: Row) -> float | None:
    seconds: float | None = row["step_seconds"] or row["expected_seconds"]
    return seconds


def _draw_method(axes: Axes, method: str, points: Sequence[tuple[int, float, str]]) -> None:
    """Draws a line with a filled mark where a step ran, a hollow one where it did not, a cross where none fits."""
    colour, marker = _LOOKS[method]
    axes.plot([x for x, _, _ in points], [y for _, y, _ in points], color=colour, alpha=0.8)
    for x, y, status in points:
        if status == "does not fit":
            axes.plot(x, y, "x", color=colour, markersize=9, markeredgewidth=2.2)
        else:
            face = colour if status == "executed" else "white"
            axes.plot(x, y, marker, color=colour, markerfacecolor=face, markeredgewidth=1.5)


def _draw_floor(axes: Axes, floors: Mapping[int, float], label: str) -> None:
    lengths = sorted(floors)
    if lengths:
        axes.plot(lengths, [floors[n] for n in lengths], ":", color=_INK, linewidth=2.2, label=label)


def _dress(axes: Axes, lengths: Sequence[int], label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticks(lengths, [_length(n) for n in lengths], rotation=45 if len(lengths) > 7 else 0)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(xlabel="context, tokens (1k = 1,024)", ylabel=label)
    if axes.get_legend_handles_labels()[0]:
        # Above the panel, where no line runs.
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=9)


def _length(num_tokens: int) -> str:
    if num_tokens % 1024:
        return f"{num_tokens:,}"
    return f"{num_tokens // 1024}k" if num_tokens < 2**20 else f"{num_tokens / 2**20:g}M"


def _legend(methods: Mapping[str, Sequence[Row]]) -> list[Line2D]:
    handles = [Line2D([], [], color=_LOOKS[m][0], marker=_LOOKS[m][1], label=m) for m in methods]
    rows = [row for rows in methods.values() for row in rows]
    if any(row["status"] == "compiled" for row in rows):
        hollow: dict[str, Any] = {"marker": "o", "linestyle": "", "markerfacecolor": "white"}
        handles.append(Line2D([], [], color=_INK, label="compiled only, time expected", **hollow))
    if any(row["status"] == "does not fit" and row["device_bytes"] for row in rows):
        cross: dict[str, Any] = {"marker": "x", "linestyle": "", "markeredgewidth": 2.2}
        handles.append(Line2D([], [], color=_INK, label="does not fit", **cross))
    return handles
