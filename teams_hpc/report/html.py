"""The stage `report`: one self-contained HTML page that a person enjoys reading."""

from pathlib import Path
from typing import Any

from teams_hpc.config import Config, TransformersEngineConfig, dump_yaml
from teams_hpc.config.digest import file_digest
from teams_hpc.evaluation.comparison import compare_generations
from teams_hpc.llm.ledger import WIZARDLM_CALLS
from teams_hpc.llm.load import as_embedding_engine, load_engine
from teams_hpc.report import page, policy_section, sections, story
from teams_hpc.report.usage import collect_usage
from teams_hpc.rewriting.seeds import read_seeds
from teams_hpc.runtime.metrics import Progress, read_metrics
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.atomic import read_json, write_json, write_text
from teams_hpc.storage.run_dir import RunDir, read_manifest, write_manifest

_NUM_CHAINS = 3


def write_report(run_dir: RunDir, config: Config, index: int, stop: StopFlag) -> None:
    """Render the report of a run whose other stages are done, and its manifest."""
    progress = Progress(run_dir.progress("report"), unit="page")
    path = _write_with_manifest(run_dir, config)
    progress.update(1, 1, str(path))


def rewrite_report(run_dir: RunDir, config: Config) -> Path:
    """Write the page again; where the stage is done, its manifest goes along with the new page."""
    if read_manifest(run_dir, "report") is None:
        return render_report(run_dir, config)
    return _write_with_manifest(run_dir, config)


def _write_with_manifest(run_dir: RunDir, config: Config) -> Path:
    path = render_report(run_dir, config)
    write_manifest(run_dir, "report", {"files": {path.name: file_digest(path)}})
    return path


def render_report(run_dir: RunDir, config: Config) -> Path:
    """Write `report/report.html` from what there is now; returns its path."""
    manifests = {
        stage: read_manifest(run_dir, stage) or {}
        for stage in ("policy", "select", "generate", "dataset", "sft", "evaluate")
    }
    seeds = read_seeds(config.seeds.path, config.seeds.limit).seeds
    evaluation = manifests["evaluate"]
    curves = {
        path.parent.name: list(read_metrics(path))
        for path in sorted(run_dir.policy.glob("member-*/metrics.jsonl"))
    }
    parts = [
        _header(config, manifests),
        sections.roles_section(config, manifests["generate"]),
        policy_section.policy_section(
            manifests["policy"],
            manifests["select"],
            curves,
            is_graded=config.reviewer.verdict == "likelihood",
        ),
        story.generation_section(manifests["generate"]),
        policy_section.generations_section(_comparison(run_dir)),
        story.example_chains(run_dir.shard(0), {seed.id: seed for seed in seeds}, _NUM_CHAINS),
        _dataset_section(manifests["dataset"]),
        story.lengths_section(seeds, run_dir),
        sections.diversity_section(evaluation.get("diversity", {})),
        sections.sft_section(manifests["sft"], list(read_metrics(run_dir.sft / "metrics.jsonl"))),
        sections.membership_section(evaluation.get("membership", {}), _roc_curves(run_dir)),
        sections.benchmarks_section(evaluation.get("benchmarks", {})),
        sections.ledger_section(collect_usage(run_dir)),
        sections.provenance_section(
            read_json(run_dir.provenance) if run_dir.provenance.exists() else {}, dump_yaml(config)
        ),
    ]
    write_text(run_dir.report, page.document(f"{config.name}: report", page.join(parts)))
    return run_dir.report


def compare_with(run_dir: RunDir, config: Config, other: RunDir) -> None:
    """Compare the generation with that of another run; reports from now on show it.

    Raises:
        UsageError: The two can't be compared.
        EngineError: The instructor, whose hidden states measure the spread, can't be loaded.
    """
    is_local = isinstance(config.instructor, TransformersEngineConfig)
    engine = load_engine(config.instructor) if is_local else None
    try:
        found = compare_generations(
            run_dir,
            other,
            num_bootstrap=config.policy.num_bootstrap,
            seed=config.seed,
            eyes=as_embedding_engine(engine) if engine else None,
        )
    finally:
        if engine is not None:
            engine.close()
    run_dir.comparison.parent.mkdir(exist_ok=True)
    write_json(run_dir.comparison, {"other": other.root.name, **found})


def _comparison(run_dir: RunDir) -> dict[str, Any]:
    return dict(read_json(run_dir.comparison)) if run_dir.comparison.exists() else {}


def _roc_curves(run_dir: RunDir) -> dict[str, Any]:
    path = run_dir.evaluate / "membership.json"
    if not path.exists():
        return {}
    details = read_json(path)
    return {name: details[name] for name in ("tuned", "base")}


def _header(config: Config, manifests: dict[str, Any]) -> page.Html:
    generate, dataset = manifests["generate"], manifests["dataset"]
    sft, evaluation = manifests["sft"], manifests["evaluate"]
    cards = []
    if generate:
        counts = generate["counts"]
        note = f"of {counts['attempted']:,} attempted steps"
        cards.append(page.card("kept rewrites", f"{counts['kept']:,}", note))
    if dataset:
        counts = dataset["counts"]
        note = f"and {counts['held_out']:,} held out"
        cards.append(page.card("training pairs", f"{counts['train']:,}", note))
    if evaluation:
        queries = evaluation["queries"]
        note = f"{100 * queries['share_of_wizardlm']:.3f} % of WizardLM's {WIZARDLM_CALLS:,}"
        cards.append(page.card("expert calls", f"{queries['expert_calls']:,}", note))
    held_out = sft.get("held_out_loss") or {}
    if held_out.get("before") is not None:
        change = f"{held_out['before']:.2f} → {held_out['after']:.2f}"
        cards.append(page.card("held-out loss", change, f"after {sft['steps']} steps"))
    if evaluation:
        found = evaluation["membership"]["tuned"]
        shown = f"{found['auc']['value']:.2f}" if found["auc"] else "–"
        note = "0.5 is a blind guess" if found["auc"] else found["note"]
        cards.append(page.card("membership AUC", shown, note))
    title = page.join(
        [
            page.tag("h1", config.name),
            page.tag("p", "Instruction-tuning data made with reinforcement learning (TeaMs-RL)."),
        ]
    )
    return page.join([page.tag("header", title), page.tag("div", page.join(cards), "cards")])


def _dataset_section(dataset: dict[str, Any]) -> page.Html:
    if not dataset:
        return page.Html("")
    rows = [(name.replace("_", " "), count) for name, count in dataset["counts"].items()]
    return page.section(
        "Data set",
        page.table(("rows", "count"), rows),
        page.tag(
            "p",
            "Every row read is in exactly one of the lines below it: dropped for one reason, held "
            "out, or used for training.",
        ),
    )
