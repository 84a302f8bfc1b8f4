"""What the numbers of a group say in plain language: each claim decided by an interval, or left undecided."""

import dataclasses
import html
import math
from collections.abc import Sequence
from typing import Literal

from bpt_rl.run import protocols
from bpt_rl.run.protocols import Estimate
from bpt_rl.run.report_groups import Group
from bpt_rl.run.report_numbers import ReportedNumber, count, reported, reported_of_data

Answer = Literal["yes", "no", "undecided", "not measured", "does not apply"]


@dataclasses.dataclass(frozen=True)
class Check:
    """One question put to a group's numbers."""

    question: str
    answer: Answer
    evidence: str
    """HTML: the rest of a sentence."""
    margin: ReportedNumber | None = None
    """What decides it: above zero says yes."""


def number(group: Group, name: str, context: str) -> ReportedNumber | None:
    """Returns a protocol's number of a group, or None where that context was not rolled out.

    A chain of one episode has neither improvement nor slope.

    Args:
      group: Runs of one experiment.
      name: One of `protocols.PROTOCOLS`, or `null max`, which reads the context's episodes as memoryless.
      context: `chain`, `memoryless` or `random`.
    """
    is_null = name == "null max"
    logs = group.memoryless_logs() if is_null and context == "memoryless" else group.logs(context)
    if not logs or (name in ("improvement", "slope") and group.evaluation["num_episodes"] < 2):
        return None
    titles = {"chain": group.chain_title.lower(), "random": "random policy"}
    title = titles.get(context, "memoryless control")
    if is_null:
        # Largest of the chain's n, whatever number of episodes the control was played in a row.
        num_episodes = group.evaluation["num_episodes"]
        estimate, name = protocols.null_max_of(logs, num_episodes), f"null max of {num_episodes}"
    else:
        estimate = protocols.estimate(name, logs)
    title = f"{name}, {title}"
    if is_null and not group.has_memory and context == "memoryless":
        context = "chain"
    return _reported(group, estimate, title, context=context, signed=name in ("improvement", "slope"))


def data_number(group: Group, name: Literal["mean", "best"]) -> ReportedNumber:
    """Returns the mean or the largest return of the training data."""
    data = group.evaluation["data"]
    value = data["mean_return" if name == "mean" else "largest_return"]
    return reported_of_data(
        float(value), protocol=f"data {name}", subset=data["subset"], num_episodes=data["num_episodes"]
    )


def checks(group: Group) -> list[Check]:
    """Returns the four questions a result must answer, with their evidence."""
    return [_against_random(group), _against_data(group), _context_helps(group), _beyond_luck(group)]


def subject(groups: Sequence[Group]) -> Group:
    """Returns the group that the verdict is about, whatever its result: the AT of the longest context."""
    candidates = [group for group in groups if group.config.agent == "at"] or list(groups)
    return max(candidates, key=lambda group: group.config.data.num_trajectories)


def verdict(groups: Sequence[Group]) -> str:
    """Returns the report's first paragraph as HTML."""
    if not groups:
        return (
            "<p>None of these runs has been evaluated, so nothing can be said of their returns. "
            "Run <code>bpt-rl evaluate RUN</code> and write the report again.</p>"
        )
    group = subject(groups)
    found = checks(group)
    evaluation = group.evaluation
    mean = _some(number(group, "mean", "chain"))
    episodes = count(evaluation["num_episodes"], "episode")
    sample = f"{count(evaluation['num_chains'], 'chain')} and {count(len(group.runs), 'training seed')}"
    returns = f"returns {mean.render_inline()} an episode, averaged over {episodes}, {sample}."
    if group.has_memory:
        last = _some(number(group, "last", "chain"))
        returns = (
            f"returns {last.render_inline()} in the last of {episodes} of one context, and "
            f"{mean.render_inline()} averaged over them, with {sample}."
        )
    lead = (
        f"On <strong>{html.escape(evaluation['task'])}</strong>, "
        f"{html.escape(group.agent_title)} ({html.escape(group.subtitle)}) {returns}"
    )
    others = "It is the longest context reported here; the others stand in the tables." if groups[1:] else ""
    answers = " ".join(_SENTENCE[check.question, check.answer] + check.evidence for check in found)
    return f"<p>{lead} {others}</p><p>{answers}</p>"


_RANDOM = "Twice the random policy?"
_DATA = "Above the data's mean?"
_MEMORY = "Does context help?"
_LUCK = "Largest return beyond luck?"
_SENTENCE: dict[tuple[str, Answer], str] = {
    (_RANDOM, "yes"): "It beats the random policy twice over: ",
    (_RANDOM, "no"): "It does not reach twice the random policy: ",
    (_RANDOM, "undecided"): "Whether it beats the random policy twice over cannot be told: ",
    (_RANDOM, "not measured"): "It was not compared with random actions: ",
    (_DATA, "yes"): "It beats the mean of the data it learnt from: ",
    (_DATA, "no"): "It falls short of the mean of the data it learnt from: ",
    (_DATA, "undecided"): "It cannot be told from the mean of the data it learnt from: ",
    (_MEMORY, "yes"): "Earlier episodes in context help: ",
    (_MEMORY, "no"): "Earlier episodes in context do harm: ",
    (_MEMORY, "undecided"): "There is no evidence that earlier episodes in context help: ",
    (_MEMORY, "not measured"): "Nothing can be said about the use of context: ",
    (_MEMORY, "does not apply"): "There is no use of context to speak of: ",
    (_LUCK, "yes"): "The largest return of a chain is more than luck: ",
    (_LUCK, "no"): "The largest return of a chain is below what luck gives: ",
    (_LUCK, "undecided"): "The largest return of a chain is no more than luck can explain: ",
    (_LUCK, "not measured"): "How much of the largest return is luck was not measured: ",
    (_LUCK, "does not apply"): "The largest of several returns is luck alone: ",
}


def judged(group: Group) -> str:
    """Returns the protocol a group is judged by, fixed before any result.

    `last` where a context holds several episodes: the one that has all the others to go by. `mean` elsewhere.
    """
    return "last" if group.has_memory else "mean"


def _against_random(group: Group) -> Check:
    random = number(group, "mean", "random")
    if random is None:
        return Check(_RANDOM, "not measured", "random actions were not rolled out.")
    name = judged(group)
    margin = protocols.difference(
        name, group.logs("chain"), group.logs("random"), control_name="mean", factor=2.0
    )
    own = _some(number(group, name, "chain"))
    evidence = f"{own.render_inline()} against {random.render_inline()} for uniform-random actions."
    title = f"{name}, less twice the random policy's mean"
    return _check(_RANDOM, _reported(group, margin, title, against="random"), evidence)


def _against_data(group: Group) -> Check:
    name = judged(group)
    own, data = _some(number(group, name, "chain")), data_number(group, "mean")
    chains = protocols.estimate(name, group.logs("chain"))
    low, high = chains.low - data.value, chains.high - data.value
    margin = dataclasses.replace(chains, value=chains.value - data.value, low=low, high=high)
    subset = html.escape(str(group.evaluation["data"]["subset"]))
    evidence = f"{own.render_inline()} against {data.render_inline()} (subset {subset})."
    return _check(_DATA, _reported(group, margin, f"{name}, less the data's mean", signed=True), evidence)


def _context_helps(group: Group) -> Check:
    name = judged(group)
    control = number(group, name, "memoryless")
    if control is None or not group.has_memory:
        return _unmeasured(group, _MEMORY)
    margin = protocols.difference(name, group.logs("chain"), group.logs("memoryless"))
    title = f"{name}, context kept less memoryless control"
    gain = _reported(group, margin, title, against="memoryless")
    evidence = (
        "with its context cleared before each episode the same checkpoint returns "
        f"{control.render_inline()}, a difference of {gain.render_inline()}."
    )
    return _check(_MEMORY, gain, evidence)


def _beyond_luck(group: Group) -> Check:
    null = number(group, "null max", "memoryless")
    if null is None or not group.has_memory:
        return _unmeasured(group, _LUCK)
    margin = protocols.beyond_luck(group.logs("chain"), group.logs("memoryless"))
    evidence = (
        f"{_some(number(group, 'max', 'chain')).render_inline()}, where the largest of "
        f"{group.evaluation['num_episodes']} episodes drawn from the memoryless control is "
        f"{null.render_inline()}."
    )
    return _check(_LUCK, _reported(group, margin, "max, less the null max", against="memoryless"), evidence)


def _unmeasured(group: Group, question: str) -> Check:
    if group.has_memory:
        return Check(question, "not measured", "the memoryless control was not rolled out.")
    return Check(question, "does not apply", "no episode is remembered in the next.")


def _check(question: str, margin: ReportedNumber, evidence: str) -> Check:
    return Check(question, _sign(margin), evidence, margin)


def _sign(margin: ReportedNumber) -> Answer:
    if math.isnan(margin.low):
        return "undecided"
    return "yes" if margin.low > 0 else "no" if margin.high < 0 else "undecided"


def _reported(
    group: Group,
    estimate: Estimate,
    title: str,
    *,
    context: str = "chain",
    against: str = "",
    signed: bool = False,
) -> ReportedNumber:
    evaluation = group.evaluation
    trained = context != "random"
    return reported(
        estimate,
        subset=evaluation["data"]["subset"],
        num_seeds=len(group.runs) if trained else 0,
        num_chains=evaluation["num_chains"],
        num_episodes=evaluation["num_episodes"],
        protocol=title,
        num_failures=sum(len(group.failures(name)) for name in (context, against) if name),
        trained=trained,
        signed=signed or bool(against),
    )


def _some(found: ReportedNumber | None) -> ReportedNumber:
    if found is None:
        raise ValueError(
            "An evaluation must hold the log `chain`; this one does not. "
            "Evaluate the run again with `bpt-rl evaluate`."
        )
    return found
