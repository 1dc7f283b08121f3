"""The stage graph as Slurm jobs: what is missing is submitted, what is there is adopted."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from teams_hpc.cluster.jobs import JobSpec, job_spec
from teams_hpc.cluster.preflight import slurm_faults
from teams_hpc.cluster.records import JobRecord, active_jobs, read_records, write_record
from teams_hpc.cluster.slurm import JobState, call_slurm, queued_jobs, scheduler_settings
from teams_hpc.cluster.submit import Entry, Submitter, job_environment, sbatch_options
from teams_hpc.config import Config
from teams_hpc.config.check import input_faults, refuse_faults
from teams_hpc.errors import RunInUseError, UsageError
from teams_hpc.pipeline.forecast import needed_warning_s
from teams_hpc.pipeline.graph import Stage, find_stage, stage_graph
from teams_hpc.pipeline.inputs import is_done, set_aside_outdated
from teams_hpc.pipeline.retry import begin_retry, wants_retry
from teams_hpc.pipeline.room import room_faults, room_lines
from teams_hpc.pipeline.start import open_run, prepared_run
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.sft.deepspeed_config import deepspeed_config
from teams_hpc.storage.lease import Lease
from teams_hpc.storage.run_dir import RunDir, read_manifest

_QUEUE_PATIENCE_S = 300.0
"""All tasks of an array may come at once, and each needs seconds."""


def all_indices(config: Config, stage: Stage) -> tuple[int, ...]:
    """Index of every task that a stage has on a cluster."""
    counts = {"members": config.policy.num_tasks, "workers": config.site.num_workers}
    return tuple(range(counts.get(stage.form, 1)))


def _longest_array() -> int:
    """How many tasks the cluster takes in one array."""
    return max(1, int(scheduler_settings().get("MaxArraySize", "1001")))


def job_specs(config: Config) -> list[JobSpec]:
    """One specification for each stage of the graph, as if nothing were done."""
    return [
        job_spec(config, stage.name, all_indices(config, stage)) for stage in stage_graph(config)
    ]


def submission_faults(config: Config, run_dir: RunDir) -> list[str]:
    """What is wrong with the configuration for a submission, Slurm itself left aside."""
    faults = input_faults(config, elsewhere=True)
    if config.site.executor != "slurm":
        faults.append(
            "site.executor: is local; for Slurm name a site (extends: sites/slurm-a100.yaml) or "
            "set site.executor=slurm"
        )
    faults += room_faults(config)
    seconds, why = needed_warning_s(config, run_dir)
    if config.site.slurm.warning_s < seconds:
        faults.append(
            f"site.slurm.warning_s: {config.site.slurm.warning_s} s is too short: {why}; set it "
            f"to at least {seconds:.0f}"
        )
    return faults


def submission_scripts(config: Config, entry: Entry) -> Iterator[str]:
    """What there is to read before submitting: room needed, batch scripts, DeepSpeed's JSON.

    Needs no Slurm and submits nothing.

    Raises:
        ConfigError: The fine-tuning can't fit.
    """
    yield "\n".join(room_lines(config))
    refuse_faults(room_faults(config))
    submitter = Submitter(config=config, run_dir=RunDir(config.resolved_run_dir), entry=entry)
    names = {stage.name: f"<job of {stage.name}>" for stage in stage_graph(config)}
    for stage, spec in zip(stage_graph(config), job_specs(config), strict=True):
        text = submitter.script(spec, [names[name] for name in stage.reads])
        yield f"##### {stage.name}: {stage.does}\n{text}"
    ds_config = deepspeed_config(
        config, config.site.num_sft_ranks, "cuda" if config.site.gpus_per_node else "cpu"
    )
    title = f"##### DeepSpeed, {config.site.num_sft_ranks} processes"
    yield f"{title}\n{json.dumps(ds_config, indent=1)}"


def submit_pipeline(config: Config, entry: Entry, *, rerun_from: str | None = None) -> list[str]:
    """Submit every job that is missing; jobs that wait or work are adopted.

    Args:
        config: The run.
        entry: What jobs call with (stage, run directory, index).
        rerun_from: Set this stage and later ones aside first.

    Returns:
        A line for each stage, for people.

    Raises:
        UsageError: Refused, with nothing submitted.
        ClusterError: Slurm refused in between; what was submitted is recorded.
    """
    specs = job_specs(config)
    faults = submission_faults(config, RunDir(config.resolved_run_dir))
    refuse_faults(faults or slurm_faults(config, specs))
    _refuse_to_move_work(config, RunDir(config.resolved_run_dir), rerun_from)
    with prepared_run(config, stop=StopFlag(), rerun_from=rerun_from) as run_dir:
        (run_dir.slurm / "cancelled").unlink(missing_ok=True)
        with _one_at_a_time(run_dir, config):
            begin_retry(run_dir, config)
            return _Submission(config, run_dir, entry, queued_jobs()).submit_missing()


def _refuse_to_move_work(config: Config, run_dir: RunDir, rerun_from: str | None) -> None:
    """Refuse to set stages aside that jobs wait for or work on: these would be adopted."""
    graph = stage_graph(config)
    names = [stage.name for stage in graph]
    first = None if rerun_from is None else names.index(find_stage(config, rerun_from).name)
    if first is None:
        further = [
            number + 1
            for number, stage in enumerate(graph)
            if read_manifest(run_dir, stage.name) and not is_done(run_dir, config, stage)
        ]
        if wants_retry(run_dir, config):
            further.append(names.index("generate"))
        first = min(further, default=len(names))
    later = names[first:]
    records = [record for record in read_records(run_dir) if record.stage in later]
    if not records or not any(run_dir.stage_dir(name).exists() for name in later):
        return
    if active := active_jobs(records):
        raise UsageError(
            f"{names[first]} and what follows are to be set aside, but jobs of them wait or run "
            f"({', '.join(active[:5])}); first: teams-hpc cancel {run_dir.root}"
        )


@contextmanager
def _one_at_a_time(run_dir: RunDir, config: Config) -> Iterator[None]:
    """Look at the run's jobs and change them while no other process does."""
    with Lease(run_dir.leases / "queue", config.site.lease_s) as lease:
        if not lease.acquire_within(_QUEUE_PATIENCE_S):
            raise RunInUseError(f"another process keeps changing the jobs of {run_dir.root}")
        yield


@dataclass(slots=True)
class _Submission:
    """One pass over the graph.

    Attributes:
        states: The user's jobs that Slurm knows, those submitted by this pass too.
        renewed: Stages of which this pass submitted something.
    """

    config: Config
    run_dir: RunDir
    entry: Entry
    states: dict[str, JobState]
    renewed: set[str] = field(default_factory=set)

    def submit_missing(self) -> list[str]:
        """Bring every stage of the graph under way; a line for each."""
        return [self._submit_stage(stage) for stage in stage_graph(self.config)]

    def replace(self, job: str) -> str:
        """Submit another job for the work of `job`, and let its dependents wait for that one."""
        record, index = self._find_task(job)
        self._refuse_unless_running(job)
        stage = find_stage(self.config, record.stage)
        (new,) = self._submit(stage, [index], self._dependencies(stage), replaces=job)
        if self._is_cancelled():  # in between: `cancel` may have missed the new one
            call_slurm("scancel", new.job_id)
            raise UsageError(f"{self.run_dir.root} was cancelled")
        moved = [job for reader in self._readers(stage) for job in self._wait_anew(reader)]
        waiting = f"; waiting for it now: {', '.join(moved)}" if moved else ""
        return f"job {new.job_id} goes on with the work of {job} ({stage.name}){waiting}"

    def _is_cancelled(self) -> bool:
        return (self.run_dir.slurm / "cancelled").exists()

    def _refuse_unless_running(self, job: str) -> None:
        """A job that Slurm can't requeue because it was cancelled, or is back already, is over."""
        state = self.states[job].state if job in self.states else "not in the queue"
        if state != "RUNNING" or self._is_cancelled():
            raise UsageError(f"job {job} ({state.lower()}) has no successor: it was ended")

    def _submit_stage(self, stage: Stage) -> str:
        if is_done(self.run_dir, self.config, stage):
            return f"{stage.name:<9} done"
        set_aside_outdated(self.run_dir, self.config, stage)
        if self.renewed.intersection(stage.reads):
            self._wait_anew(stage)
        present = {index for indices in self._active(stage).values() for index in indices}
        unfinished = self._unfinished(stage)
        if not (unfinished or present):  # all results, but no manifest: any task writes it
            unfinished = [0]
        missing = [index for index in unfinished if index not in present]
        said = [f"adopted {len(present)} tasks"] if present else []
        if missing:
            new = self._submit(stage, missing, self._dependencies(stage))
            jobs = ", ".join(record.job_id for record in new)
            said.append(f"submitted {len(missing)} tasks as job {jobs}")
        return f"{stage.name:<9} {', '.join(said)}"

    def _active(self, stage: Stage) -> dict[str, tuple[int, ...]]:
        """Jobs of the stage that wait or work, with the indices they stand for.

        An array that is active as a whole goes by its number, else by its tasks that are. A job
        that has a successor is about to end, and stands for nothing.
        """
        found: dict[str, tuple[int, ...]] = {}
        records = read_records(self.run_dir)
        replaced = {record.replaces for record in records}
        for record in records:
            if record.stage != stage.name:
                continue
            tasks = dict(zip(record.task_ids, record.indices, strict=False))
            active = {
                job: (index,)
                for job, index in tasks.items()
                if self._is_active(job) and job not in replaced
            }
            if len(active) == len(tasks):
                found[record.job_id] = record.indices
            else:
                found |= active
        return found

    def _is_active(self, job: str) -> bool:
        return job in self.states and self.states[job].is_active

    def _dependencies(self, stage: Stage) -> list[str]:
        """Jobs that make what the stage reads."""
        read = (find_stage(self.config, name) for name in stage.reads)
        return [
            job
            for upstream in read
            if not is_done(self.run_dir, self.config, upstream)
            for job in self._active(upstream)
        ]

    def _readers(self, stage: Stage) -> list[Stage]:
        return [other for other in stage_graph(self.config) if stage.name in other.reads]

    def _wait_anew(self, stage: Stage) -> list[str]:
        """Let the stage's jobs that were submitted earlier wait for what makes their input now."""
        jobs = self._active(stage)
        dependencies = self._dependencies(stage)
        if dependencies:
            for job in jobs:
                words = f"Dependency=afterok:{':'.join(dependencies)}"
                call_slurm("scontrol", "update", f"JobId={job}", words)
        return list(jobs)

    def _unfinished(self, stage: Stage) -> list[int]:
        indices = all_indices(self.config, stage)
        if stage.form != "members":
            return list(indices)
        return [i for i in indices if not (self.run_dir.member(i) / "result.json").exists()]

    def _submit(
        self,
        stage: Stage,
        indices: list[int],
        dependencies: list[str],
        replaces: str | None = None,
    ) -> list[JobRecord]:
        submitter = Submitter(config=self.config, run_dir=self.run_dir, entry=self.entry)
        most = _longest_array()
        chunks = [tuple(indices[at : at + most]) for at in range(0, len(indices), most)]
        parallel = max(1, self.config.site.slurm.max_parallel_tasks // len(chunks))
        records = [
            submitter.submit(
                job_spec(self.config, stage.name, chunk), dependencies, parallel, replaces
            )
            for chunk in chunks
        ]
        for job in (job for record in records for job in record.task_ids):
            self.states[job] = JobState(job_id=job, state="PENDING")
        self.renewed.add(stage.name)
        return records

    def _find_task(self, job: str) -> tuple[JobRecord, int]:
        for record in read_records(self.run_dir):
            if job in record.task_ids:
                return record, record.indices[record.task_ids.index(job)]
        raise UsageError(f"job {job} doesn't belong to {self.run_dir.root}")


def prepare_job(config: Config, name: str) -> Iterator[str]:
    """Make the run ready for one stage that a person submits with slurm/submit.sh.

    Returns:
        Words for that script: `NAME=VALUE` for the job's environment, an empty word, and options
        of sbatch.

    Raises:
        UsageError: Refused, with nothing submitted.
    """
    stage = find_stage(config, name)
    spec = job_spec(config, name, all_indices(config, stage))
    faults = submission_faults(config, RunDir(config.resolved_run_dir))
    refuse_faults(faults or slurm_faults(config, [spec]))
    if len(spec.indices) > (most := _longest_array()):
        raise UsageError(
            f"{name}: {len(spec.indices)} tasks are more than this cluster takes in one array "
            f"(MaxArraySize {most}); teams-hpc submit makes several of them"
        )
    is_retry = name == "generate" and wants_retry(RunDir(config.resolved_run_dir), config)
    if is_retry:
        _refuse_to_move_work(config, RunDir(config.resolved_run_dir), None)
    with prepared_run(config, stop=StopFlag()) as run_dir:
        if is_retry:
            begin_retry(run_dir, config)
        run_dir.slurm.mkdir(exist_ok=True, mode=0o700)
        (run_dir.slurm / "cancelled").unlink(missing_ok=True)
        for variable, value in job_environment(config, run_dir, spec).items():
            yield f"{variable}={value}"
        yield ""
        for option, value in sbatch_options(config, spec).items():
            yield f"--{option}" if value is True else f"--{option}={value}"
        if len(spec.indices) > 1:
            yield f"--array=0-{len(spec.indices) - 1}%{config.site.slurm.max_parallel_tasks}"


def adopt_job(config: Config, name: str, job_id: str) -> str:
    """Keep the record of a job that slurm/submit.sh has submitted; returns a line for people."""
    indices = all_indices(config, find_stage(config, name))
    record = JobRecord(
        job_id=job_id,
        stage=name,
        indices=indices,
        is_array=len(indices) > 1,
        submitted=time.time(),
    )
    write_record(RunDir(config.resolved_run_dir), record)
    return f"{name:<9} submitted {len(indices)} tasks as job {job_id}"


def resubmit_job(root: Path, job: str, entry: Entry) -> str:
    """Submit another job for the work of `job`, which is about to end.

    Args:
        root: The run directory.
        job: `123`, or `123_4` for an array task.
        entry: As for `submit_pipeline`.

    Returns:
        A line for people.

    Raises:
        UsageError: No such job belongs to the run.
        ClusterError: Slurm refused.
    """
    run_dir, config = open_run(root)
    with _one_at_a_time(run_dir, config):
        return _Submission(config, run_dir, entry, queued_jobs()).replace(job)
