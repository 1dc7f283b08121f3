"""The sections of the report about fine-tuning, evaluation, spending and provenance."""

from collections.abc import Mapping
from typing import Any

from teams_hpc.config import Config
from teams_hpc.llm.ledger import WIZARDLM_CALLS, Ledger
from teams_hpc.report.page import Html, figure, section, table, tag, text
from teams_hpc.report.plots import bars, lines, roc

Manifest = Mapping[str, Any]


def interval_text(interval: Mapping[str, Any] | None) -> str:
    """`0.53 (0.47 to 0.59)`, or a dash where nothing was measured."""
    if interval is None:
        return "–"
    return f"{interval['value']:.2f} ({interval['low']:.2f} to {interval['high']:.2f})"


def roles_section(config: Config, generate: Manifest) -> Html:
    """Which roles were models and which the grammar."""
    rows = []
    for role in ("instructor", "reviewer", "expert"):
        engine = getattr(config, role)
        is_grammar = engine.kind == "template"
        what = "deterministic grammar, not a model" if is_grammar else f"model ({engine.kind})"
        rows.append((role, what, str(getattr(engine, "model", "–"))))
    exactness = generate.get("exactness", "")
    words = {
        "exact": "The rows of this run are exact: the same configuration, seeds and models give "
        "the same rows on any number of workers.",
        "statistical": "The rows of this run are statistical: sampling is keyed, but batching may "
        "change a token.",
    }
    return section(
        "Who played which role",
        table(("role", "played by", "model"), rows),
        tag("p", words.get(exactness, "")),
    )


def sft_section(sft: Manifest, metrics: list[dict[str, Any]]) -> Html:
    """Loss curves of the fine-tuning."""
    if not sft:
        return Html("")
    trained = [line for line in metrics if "loss" in line]
    held_out = [line for line in metrics if line.get("held_out_loss") is not None]
    series = {"training": ([m["step"] for m in trained], [m["loss"] for m in trained])}
    if held_out:
        series["held out"] = (
            [m["step"] for m in held_out],
            [m["held_out_loss"] for m in held_out],
        )
    svg = lines(
        series, x_label="optimizer step", y_label="loss, nats a token", markers={"held out"}
    )
    rows = [(key, sft.get(key)) for key in ("steps", "schedule_steps", "attention", "dtype")]
    return section(
        "Fine-tuning",
        figure(
            svg, "Loss on response tokens only; held-out rows come from seeds never trained on."
        ),
        table(("", ""), [(key.replace("_", " "), value) for key, value in rows]),
    )


def membership_section(membership: Manifest, curves: Mapping[str, Any]) -> Html:
    """Does the model give away its training rows?"""
    if not membership:
        return Html("")
    names = {"tuned": "tuned model", "base": "untrained base (control: must be 0.5)"}
    rows: list[tuple[object, ...]] = []
    for key, name in names.items():
        found = membership[key]
        low_rate = found["tpr_at_1_percent_fpr"]
        rows.append(
            (
                name,
                interval_text(found["auc"]) if found["auc"] else found["note"],
                "–" if found["advantage"] is None else f"{found['advantage']:.2f}",
                (found["note"] or "–") if low_rate is None else f"{low_rate:.3f}",
                f"{found['num_members']} / {found['num_non_members']}",
            )
        )
    control = membership["control"]
    reached = "not measurable (n=0)" if control["auc"] is None else f"{control['auc']:.2f}"
    rows.append(
        (
            "over-fitted control (must reach 0.9)",
            reached,
            "–",
            "–",
            f"{control['num_members']} / {control['num_non_members']}",
        )
    )
    drawn = {names[key].split(" (")[0]: value["roc"] for key, value in curves.items()}
    drawn = {name: points for name, points in drawn.items() if points}
    return section(
        "Privacy: membership inference",
        tag(
            "p",
            "An attacker calls an example a member if its loss is low. 0.5 is a blind guess; below "
            "0.5 is no better than 0.5, so the distance from it counts. Intervals resample seeds.",
        ),
        table(("model", "AUC (95 %)", "|AUC - 0.5|", "TPR at 1 % FPR", "members / others"), rows),
        *(tag("p", fault, "warning") for fault in membership["faults"]),
        figure(roc(drawn), "Receiver operating characteristic of the attack.") if drawn else "",
    )


def diversity_section(diversity: Manifest) -> Html:
    """How varied instructions and responses are beside the seeds."""
    if not diversity:
        return Html("")
    keys = ("num_texts", "distinct_1", "distinct_2", "distinct_3", "self_similarity")
    names = ("seeds", "instructions", "responses")
    rows = [
        (name, *(diversity[name][key] for key in keys), diversity[name]["words"].get("median"))
        for name in names
    ]
    heading = ("", "texts", "distinct-1", "distinct-2", "distinct-3", "self-similarity", "words")
    return section(
        "Diversity",
        table(heading, rows),
        tag(
            "p",
            "distinct-n: distinct word n-grams over all (falls as a set grows). Self-similarity: "
            "mean cosine of each text with its most similar other; lower is more varied. Words: "
            "median.",
        ),
        figure(
            bars({k: float(v) for k, v in diversity["operations"].items()}, x_label="rows"),
            "Rows of the data set by the operation that made them.",
        ),
    )


def benchmarks_section(benchmarks: Manifest) -> Html:
    """Scores of lm-evaluation-harness, if any were asked for."""
    rows = [
        (task, metric, *(benchmarks[model][task].get(metric) for model in benchmarks))
        for task in sorted({task for result in benchmarks.values() for task in result})
        for metric in next(iter(benchmarks.values()))[task]
    ]
    return section("Benchmarks", table(("task", "metric", *benchmarks), rows)) if rows else Html("")


def ledger_section(usage: Mapping[str, Ledger]) -> Html:
    """Every call, by stage, role and model."""
    rows = []
    expert_calls = 0
    for stage, ledger in usage.items():
        for row in ledger.to_json():
            expert_calls += row["calls"] if row["role"] == "expert" else 0
            keys = ("calls", "in_doubt", "prompt_tokens", "completion_tokens")
            rows.append((stage, row["role"], row["model"][:24], *(row[key] for key in keys)))
    heading = ("stage", "role", "model", "calls", "in doubt", "prompt tokens", "completion tokens")
    share = 100 * expert_calls / WIZARDLM_CALLS
    return section(
        "Calls and tokens",
        table(heading, rows),
        tag(
            "p",
            f"{expert_calls:,} expert calls are {share:.3f} % of WizardLM's about "
            f"{WIZARDLM_CALLS:,}; the paper reports 5.73 %. In doubt: sent, but a kill came before "
            "the answer was durable.",
        ),
    )


def provenance_section(provenance: Manifest, config_yaml: str) -> Html:
    """Which machine and versions worked on it, and the resolved configuration."""
    rows = [
        (
            line["started"],
            line["host"],
            line["python"],
            ", ".join(f"{name} {version}" for name, version in line["packages"].items()),
            (line["git_commit"] or "–")[:12],
        )
        for line in provenance.get("sessions", [])
    ]
    yaml = Html(f"<details><summary>config.yaml</summary><pre>{text(config_yaml)}</pre></details>")
    return section(
        "Provenance", table(("started", "host", "python", "packages", "commit"), rows), yaml
    )
