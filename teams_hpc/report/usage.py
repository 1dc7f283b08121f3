"""The ledger of a whole run, added up from what each stage made durable."""

from teams_hpc.llm.ledger import Ledger
from teams_hpc.storage.atomic import read_json
from teams_hpc.storage.run_dir import RunDir, read_manifest

_ASKING_STAGES = ("policy", "select", "generate")


def _policy_usage(run_dir: RunDir) -> Ledger:
    ledger = Ledger()
    for path in sorted(run_dir.policy.glob("member-*/usage.json")):
        ledger.merge(Ledger.from_json(read_json(path)))
    return ledger


def _select_usage(run_dir: RunDir) -> Ledger:
    ledger = Ledger()
    for path in sorted(run_dir.evaluations.glob("*.json")):
        if not path.name.endswith(".started.json"):  # a note of what was begun
            ledger.merge(Ledger.from_json(read_json(path)["usage"]))
    return ledger


def collect_usage(run_dir: RunDir) -> dict[str, Ledger]:
    """Usage by stage, of finished stages and of those at work."""
    usage = {}
    for stage in _ASKING_STAGES:
        manifest = read_manifest(run_dir, stage)
        if manifest is not None:
            usage[stage] = Ledger.from_json(manifest["usage"])
        elif stage == "policy" and run_dir.policy.exists():
            usage[stage] = _policy_usage(run_dir)
        elif stage == "select" and run_dir.evaluations.exists():
            usage[stage] = _select_usage(run_dir)
        elif stage == "generate" and run_dir.shards.exists():
            from teams_hpc.generation.usage import generation_usage

            usage[stage] = generation_usage(run_dir)
    return usage
