"""Every path of a run, and the manifests that make a stage's output exist.

A stage writes `inputs.json` when it starts (what it is made from) and its manifest when it is
done, last of all. Nothing else is trusted to say that a stage is done.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teams_hpc.errors import CorruptFileError
from teams_hpc.storage.atomic import read_json, write_json

MANIFEST_SCHEMA = 1


@dataclass(frozen=True, slots=True)
class RunDir:
    """The layout of one run directory (DESIGN section 5)."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def provenance(self) -> Path:
        return self.root / "provenance.json"

    @property
    def leases(self) -> Path:
        return self.root / "leases"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics"

    @property
    def slurm(self) -> Path:
        """What Slurm and the batch scripts need: scripts, job records, stop markers, output."""
        return self.root / "slurm"

    @property
    def job_records(self) -> Path:
        return self.slurm / "jobs"

    @property
    def stop_markers(self) -> Path:
        """`<job id>-<restart count>`: that start of that job stopped on request, whole."""
        return self.slurm / "stopped"

    @property
    def policy(self) -> Path:
        return self.root / "policy"

    def member(self, index: int) -> Path:
        return self.policy / f"member-{index:03d}"

    @property
    def selected_policy(self) -> Path:
        """safetensors of the chosen member; `select`'s manifest says which."""
        return self.root / "select" / "policy.safetensors"

    @property
    def evaluations(self) -> Path:
        """Of `select`: a file for each policy and split, with its usage."""
        return self.root / "select" / "evaluations"

    @property
    def generate(self) -> Path:
        return self.root / "generate"

    @property
    def plan(self) -> Path:
        return self.generate / "plan.json"

    @property
    def journal(self) -> Path:
        return self.generate / "journal"

    @property
    def shards(self) -> Path:
        return self.generate / "shards"

    def shard(self, unit: int) -> Path:
        return self.shards / f"unit-{unit:05d}.h5"

    @property
    def retry(self) -> Path:
        """What a retry of failed rows has made so far; goes when it is done."""
        return self.generate / "retry"

    @property
    def retry_plan(self) -> Path:
        return self.retry / "plan.json"

    def retried_shard(self, unit: int) -> Path:
        return self.retry / f"unit-{unit:05d}.h5"

    @property
    def dataset(self) -> Path:
        return self.root / "dataset"

    @property
    def dataset_rows(self) -> Path:
        return self.dataset / "dataset.h5"

    @property
    def packed_rows(self) -> Path:
        return self.dataset / "packed.h5"

    @property
    def tokenizer(self) -> Path:
        """Tokenizer the data set was packed with, as a Hugging Face folder."""
        return self.dataset / "tokenizer"

    @property
    def sft(self) -> Path:
        return self.root / "sft"

    @property
    def checkpoints(self) -> Path:
        return self.sft / "checkpoints"

    @property
    def model(self) -> Path:
        """The fine-tuned model as a Hugging Face folder."""
        return self.sft / "model"

    @property
    def base_model(self) -> Path:
        """The model before fine-tuning where it was built from config, else absent."""
        return self.sft / "base"

    @property
    def evaluate(self) -> Path:
        return self.root / "evaluate"

    @property
    def report(self) -> Path:
        return self.root / "report" / "report.html"

    @property
    def comparison(self) -> Path:
        """This run's generation against another's, if somebody asked for that."""
        return self.root / "report" / "comparison.json"

    def stage_dir(self, stage: str) -> Path:
        return self.root / stage

    def inputs(self, stage: str) -> Path:
        return self.stage_dir(stage) / "inputs.json"

    def manifest(self, stage: str) -> Path:
        return self.stage_dir(stage) / "manifest.json"

    def log(self, task: str) -> Path:
        return self.logs / f"{task}.log"

    def progress(self, task: str) -> Path:
        return self.metrics / f"{task}.progress.json"


def write_manifest(run_dir: RunDir, stage: str, content: dict[str, Any]) -> None:
    """Declare `stage` done; its input digest is copied from `inputs.json`.

    `content` holds what the stage made: counts that balance, file digests, usage, results. It must
    not hold times, hosts or paths, so that equal work gives equal manifests.
    """
    inputs = read_json(run_dir.inputs(stage))
    write_json(
        run_dir.manifest(stage),
        {"schema": MANIFEST_SCHEMA, "stage": stage, "digest": inputs["digest"], **content},
    )


def read_manifest(run_dir: RunDir, stage: str) -> dict[str, Any] | None:
    """The manifest of a finished stage, or None.

    Raises:
        CorruptFileError: The manifest is damaged or of another schema.
    """
    path = run_dir.manifest(stage)
    if not path.exists():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("schema") != MANIFEST_SCHEMA:
        raise CorruptFileError(
            f"{path} is not a manifest of schema {MANIFEST_SCHEMA}; "
            f"run again with --rerun-from {stage}"
        )
    return manifest
