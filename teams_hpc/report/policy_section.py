"""The sections of the report about the policy: how it learnt, what it does, what it is good for."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from teams_hpc.report.page import Html, figure, section, table, tag
from teams_hpc.report.plots import lines, stacked_bars, stacked_rows
from teams_hpc.report.story import RULES
from teams_hpc.rewriting.operations import OPERATIONS
from teams_hpc.rewriting.reviewer import SANITY_ACCURACY

Manifest = Mapping[str, Any]
Curves = Mapping[str, Sequence[Mapping[str, Any]]]

_MOST_SATURATED = 0.95
_MOST_NAMED = 8


def policy_section(
    policy: Manifest, select: Manifest, curves: Curves, *, is_graded: bool = True
) -> Html:
    """Reward curves of the members, and the chosen one against the baselines.

    Args:
        policy: Manifest of the stage `policy`.
        select: Manifest of the stage `select`.
        curves: Lines of `metrics.jsonl` by member folder, in order.
        is_graded: Whether verdicts are likelihoods; generated ones are 0 or 1.
    """
    if not select:
        return Html("")
    members = policy.get("members", [])
    named = {
        _name(number, members): metrics for number, metrics in enumerate(curves.values()) if metrics
    }
    report = select["report"]
    levels = {
        name.replace("_", "-"): report["policies"][name]["mean_reward"]["value"]
        for name in ("uniform", "round_robin")
        if report["policies"]
    }
    reward = lines(
        _series(named, "mean_reward", select["chosen"]),
        x_label="iteration",
        y_label="mean reward a step",
        levels=levels,
    )
    return section(
        "The policy",
        figure(
            reward,
            "Training reward of each member (sampled actions, training seeds); dashed: baselines "
            "on the report seeds.",
        ),
        *_comparison(select),
        *_choices(select),
        *_members(policy, select),
        *_judgement(policy, select, named, is_graded=is_graded),
    )


def _name(number: int, members: Sequence[Manifest]) -> str:
    """`member 3`, with the name of its variant if it has one."""
    variant = members[number].get("variant") if number < len(members) else None
    return f"member {number} ({variant})" if variant else f"member {number}"


def _series(
    named: Curves, key: str, chosen: int
) -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    """Curves of at most eight members, the chosen one among them."""
    shown = dict(list(named.items())[:_MOST_NAMED])
    if chosen >= _MOST_NAMED and chosen < len(named):
        name, metrics = list(named.items())[chosen]
        shown = {**dict(list(shown.items())[:-1]), name: metrics}
    return {
        name: ([line["iteration"] for line in metrics], [line[key] for line in metrics])
        for name, metrics in shown.items()
    }


def _comparison(select: Manifest) -> Iterator[Html]:
    report = select["report"]
    if not report["policies"]:
        yield tag("p", report["note"], "warning")
        return
    yield tag(
        "p",
        f"Member {select['chosen']} was chosen on {select['select']['num_seeds']} seeds and is "
        f"measured here on {report['num_seeds']} others (episodes of each: "
        f"{report['num_episodes']}), against baselines on the same seeds and keys. "
        "Intervals: paired bootstrap over seeds.",
    )
    rows = []
    for name, found in report["policies"].items():
        difference = report["differences"].get(name)
        rows.append(
            (
                name.replace("_", "-"),
                interval_digits(found["mean_reward"]),
                interval_digits(difference) if difference else "–",
                "–" if difference is None else "yes" if difference["is_better"] else "no",
            )
        )
    heading = ("policy", "mean reward a step (95 %)", "learned minus it (95 %)", "learned better")
    yield table(heading, rows)


def _choices(select: Manifest) -> Iterator[Html]:
    """Which operations the chosen policy takes: by step, and by kind of seed."""
    learned = select["report"]["policies"].get("learned")
    if learned is None:
        return
    by_step = learned["operations_by_step"]
    steps = [str(step) for step in range(1, len(by_step) + 1)]
    yield figure(
        stacked_bars(steps, _shares(by_step), x_label="step of the episode", y_label="share"),
        "Which operations the chosen policy takes, by step, on the report seeds.",
    )
    by_kind = learned.get("operations_by_kind", {})
    if not by_kind:  # selected by an earlier version
        return
    num_steps = max(1, len(by_step) * select["report"]["num_episodes"])
    names = [f"{kind} ({sum(counts) // num_steps})" for kind, counts in by_kind.items()]
    yield figure(
        stacked_rows(names, _shares(list(by_kind.values())), x_label="share"),
        "The same by kind of seed, read off its first telling word, with the number of seeds. An "
        "episode may leave its seed's kind through breadth.",
    )


def _shares(counts: Sequence[Sequence[int]]) -> dict[str, list[float]]:
    return {
        str(name): [line[code] / max(1, sum(line)) for line in counts]
        for code, name in enumerate(OPERATIONS)
    }


def _members(policy: Manifest, select: Manifest) -> Iterator[Html]:
    """How each member did where one was chosen, its variant beside it."""
    trained = policy.get("members", [])
    rows = []
    for found in select["select"]["members"]:
        number = found["member"]
        of_training = trained[number] if number < len(trained) else {}
        rows.append(
            (
                f"{number}{' (chosen)' if number == select['chosen'] else ''}",
                found.get("variant", "–"),
                interval_digits(found["mean_reward"])
                if found["mean_reward"]
                else f"{found['score']:.3f}",
                _digits(of_training.get("mean_reward_first")),
                _digits(of_training.get("mean_reward_final")),
            )
        )
    heading = ("member", "variant", "on the choosing seeds (95 %)", "first iteration", "last ten")
    yield tag("h3", "Members: mean reward a step")
    yield table(heading, rows)


def _judgement(
    policy: Manifest, select: Manifest, named: Curves, *, is_graded: bool
) -> Iterator[Html]:
    """Can the reward be trusted: plain cases judged right, verdicts that grade."""
    yield tag("h3", "Can the reviewer be trusted?")
    accuracies = [member["sanity_accuracy"] for member in policy.get("members", [])]
    accuracies.append(select["sanity_accuracy"])
    share = select["saturated_share"]
    least, right = min(accuracies), select["sanity_accuracy"]
    is_doubtful = least < SANITY_ACCURACY or (is_graded and share > _MOST_SATURATED)
    yield tag(
        "p",
        f"Sanity set (texts with themselves, unrelated texts): {100 * right:.0f} % judged right at "
        f"selection, {100 * least:.0f} % at the worst of {len(accuracies)} times; "
        f"{100 * SANITY_ACCURACY:.0f} % is needed. Saturated verdicts (below 0.02 or above 0.98): "
        f"{100 * share:.0f} % of those at selection"
        f"{'.' if is_graded else '; generated verdicts are 0 or 1 by nature.'}",
        "warning" if is_doubtful else "",
    )
    yield figure(
        lines(
            _series(named, "saturated_share", select["chosen"]),
            x_label="iteration",
            y_label="share of verdicts saturated",
            are_shares=True,
        ),
        "Verdicts in training that say hardly more than yes or no; above 0.95 rewards hardly grade "
        "rewrites.",
    )
    reasons = select["report"]["policies"].get("learned", {}).get("zero_reasons", {})
    rows = [(name.replace("_", " "), count) for name, count in reasons.items()]
    if rows:
        yield tag("p", "Steps of the chosen policy on the report seeds that a rule gave nothing:")
        yield table(("reason", "steps"), rows)


def _digits(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def interval_digits(interval: Mapping[str, float]) -> str:
    """`0.531 (0.470 to 0.590)`."""
    return f"{interval['value']:.3f} ({interval['low']:.3f} to {interval['high']:.3f})"


def generations_section(comparison: Manifest) -> Html:
    """This run's generation against that of another run, which another policy steered."""
    if not comparison:
        return Html("")
    ours, other = (name.replace("_", "-") for name in comparison["policies"])
    rows = []
    for name, found in comparison["measures"].items():
        cells = (interval_digits(found[key]) for key in ("ours", "other", "difference"))
        difference = found["difference"]
        is_clear = difference["low"] > 0 or difference["high"] < 0
        rows.append((_measure_name(name), *cells, "yes" if is_clear else "no"))
    heading = ("", f"{ours} (this run)", other, "difference (95 %)", "clear of 0")
    calls, kept = comparison["expert_calls"], comparison["kept"]
    return section(
        f"Generation: {ours} against {other}",
        tag(
            "p",
            f"Two runs over the same {comparison['num_seeds']} seeds that differ in what chooses "
            f"operations. {ours}: {kept[0]:,} rows kept for {calls[0]:,} expert calls; {other}: "
            f"{kept[1]:,} for {calls[1]:,}. Diversity is that of kept instructions which equally "
            "many expert calls made. Intervals resample whole seeds.",
        ),
        table(heading, rows),
        tag(
            "p",
            "Higher is more varied: distinct-n, embedding spread (mean cosine distance of hidden "
            "states). Lower is more varied: self-similarity (mean cosine with the most similar "
            "other).",
        ),
    )


def _measure_name(name: str) -> str:
    reason, comma, rest = name.partition(",")
    return f"{RULES.get(reason, reason)}{comma}{rest}"
