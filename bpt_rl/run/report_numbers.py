"""Numbers fit to be published: none without its protocol, subset, seed count and interval."""

import dataclasses
import html
import math
from typing import Literal

from bpt_rl.run.protocols import Estimate

Interval = Literal["chains", "seeds", "episodes", "resampled seeds", "pairs of seeds", "one sample", "exact"]
INTERVAL_TEXT: dict[str, str] = {
    "chains": "95% t interval over chains",
    "seeds": "95% t interval over the means of seeds",
    "episodes": "95% t interval over episodes",
    "resampled seeds": "95% bootstrap interval over seeds",
    "pairs of seeds": "95% score interval over pairs of seeds",
    "one sample": "one sample, no interval",
    "exact": "exact for the subset, no interval",
}
_UNBOUNDED = ("one sample", "exact")
MINUS = "\N{MINUS SIGN}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportedNumber:
    """A return and all that a reader must know of it. Cannot be made without any of it."""

    value: float
    low: float
    high: float
    protocol: str
    subset: str
    """Data subset that the agent was trained on, or that the number describes."""
    num_seeds: int
    """Training seeds; 0 only for an exact number of the data and for actions that no training made."""
    num_chains: int
    """Chains of each seed; 0 only for an exact number."""
    num_episodes: int
    """Episodes a chain, or of the data."""
    interval: Interval
    num_failures: int = 0
    """Episodes among them that their simulator ended, counted with what they had collected."""
    trained: bool = True
    """Whether a trained policy was rolled out."""
    signed: bool = False
    """Whether this is a difference, shown with its sign."""

    def __post_init__(self) -> None:
        if not math.isfinite(self.value):
            raise ValueError(f"A reported number must be finite; got {self.value}. Look at the episode log.")
        for name in ("protocol", "subset"):
            if not getattr(self, name).strip():
                raise ValueError(f"A reported number must name its {name}; got an empty one. Say what it is.")
        exact = self.interval == "exact"
        for name in ("num_seeds", "num_chains", "num_episodes"):
            excused = name != "num_episodes" and (exact or (name == "num_seeds" and not self.trained))
            if getattr(self, name) < 1 and not excused:
                raise ValueError(
                    f"A reported number must give its {name}; got {getattr(self, name)}. Count them."
                )
        self._check_interval()

    def _check_interval(self) -> None:
        if self.interval not in INTERVAL_TEXT:
            raise ValueError(
                f"A reported number must say its interval; got {self.interval!r}. "
                f"Use one of {', '.join(INTERVAL_TEXT)}."
            )
        bounded = math.isfinite(self.low) and math.isfinite(self.high) and self.low <= self.high
        if bounded == (self.interval in _UNBOUNDED):
            raise ValueError(
                "A reported number must have ordered bounds unless it is exact or of one sample; "
                f"got [{self.low}, {self.high}] and {self.interval!r}. Estimate it with `protocols`."
            )

    @property
    def text(self) -> str:
        """Value and interval."""
        value = format_return(self.value, self.signed)
        if self.interval in _UNBOUNDED:
            return value
        return f"{value} {self._bounds}"

    @property
    def _bounds(self) -> str:
        return f"[{format_return(self.low, self.signed)}, {format_return(self.high, self.signed)}]"

    @property
    def label(self) -> str:
        """Protocol, subset, episodes, chains, seeds and kind of interval, in words."""
        if self.interval == "exact":
            size = count(self.num_episodes, "episode")
            return f"{self.protocol}; subset {self.subset}; {size}; {INTERVAL_TEXT['exact']}"
        sample = f"{count(self.num_episodes, 'episode')} a chain, {count(self.num_chains, 'chain')}"
        seeds = count(self.num_seeds, "training seed") if self.trained else "no training"
        failed = f"; {self._failed}" if self.num_failures else ""
        return f"{self.protocol}; subset {self.subset}; {sample}; {seeds}; {INTERVAL_TEXT[self.interval]}{failed}"

    @property
    def _failed(self) -> str:
        return f"{count(self.num_failures, 'episode')} ended by the simulator"

    def render_inline(self) -> str:
        """Returns HTML for running text: value and interval, its label for readers and machines."""
        label = html.escape(self.label, quote=True)
        note = " (one sample, no interval)" if self.interval == "one sample" else ""
        return f'<span class="inline-number" title="{label}">{self.text}{note}</span>'

    def render(self) -> str:
        """Returns HTML: the value, its interval below it, its label for readers and machines."""
        label = html.escape(self.label, quote=True)
        if self.interval not in _UNBOUNDED:
            note = self._bounds
        else:
            note = "exact" if self.interval == "exact" else INTERVAL_TEXT["one sample"]
        failed = f'<small class="failed">{self.num_failures} failed</small>' if self.num_failures else ""
        return (
            f'<span class="number" title="{label}" data-protocol="{html.escape(self.protocol, quote=True)}" '
            f'data-value="{self.value!r}">'
            f"<b>{format_return(self.value, self.signed)}</b><small>{html.escape(note)}</small>{failed}"
            f'<span class="sr">({label})</span></span>'
        )


def reported(
    estimate: Estimate,
    *,
    subset: str,
    num_seeds: int,
    num_chains: int,
    num_episodes: int,
    protocol: str = "",
    num_failures: int = 0,
    trained: bool = True,
    signed: bool = False,
) -> ReportedNumber:
    """Returns an estimate as a reported number; `protocol` replaces the estimate's own name."""
    return ReportedNumber(
        value=estimate.value,
        low=estimate.low,
        high=estimate.high,
        protocol=protocol or estimate.protocol,
        subset=subset,
        num_seeds=num_seeds,
        num_chains=num_chains,
        num_episodes=num_episodes,
        interval=estimate.basis if estimate.has_interval else "one sample",
        num_failures=num_failures,
        trained=trained,
        signed=signed,
    )


def reported_of_data(value: float, *, protocol: str, subset: str, num_episodes: int) -> ReportedNumber:
    """Returns a number of the data itself, known exactly."""
    return ReportedNumber(
        value=value,
        low=math.nan,
        high=math.nan,
        protocol=protocol,
        subset=subset,
        num_seeds=0,
        num_chains=0,
        num_episodes=num_episodes,
        interval="exact",
    )


def format_return(value: float, signed: bool = False) -> str:
    """Returns a return with about three digits, a true minus sign and, if signed, a plus."""
    size = abs(value)
    digits = 0 if size >= 999.5 else 1 if size >= 9.95 else 2
    text = f"{size:,.{digits}f}"
    if not text.strip("0."):
        return text
    return f"{MINUS if value < 0 else '+' if signed else ''}{text}"


def count(number: int, noun: str) -> str:
    """Returns `1 seed`, `2 seeds`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"
