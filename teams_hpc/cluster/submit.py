"""From job specifications to Slurm, through submitit.

What is submitted is one function taking strings. Its results are never read: a stage's outcome is
its manifest.
"""

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor
from submitit.core.utils import FailedJobError, FailedSubmissionError

from teams_hpc.cluster.container import CONTAINER_PYTHON, container_environment
from teams_hpc.cluster.jobs import JobSpec
from teams_hpc.cluster.records import JobRecord, first_of_chain, read_records, write_record
from teams_hpc.cluster.slurm import clean_environment
from teams_hpc.config import Config
from teams_hpc.errors import ClusterError
from teams_hpc.storage.atomic import write_text
from teams_hpc.storage.run_dir import RunDir

SHELL = Path(__file__).parent / "shell"
WARNING_SIGNAL = "USR2"
"""NCCL may take USR1 for itself."""

Entry = Callable[[str, str, str], object]


class _Executor(SlurmExecutor):
    """submitit's executor, which also shows scripts where there is no Slurm."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def job_environment(
    config: Config, run_dir: RunDir, spec: JobSpec, replaces: str | None = None
) -> dict[str, str]:
    """What a job's scripts and processes find in their environment."""
    slurm = config.site.slurm
    values = {
        # As srun --kill-on-bad-exit; said always, since a site may have set it either way.
        "SLURM_KILL_BAD_EXIT": str(int(spec.ranks_hang_together)),
        "TEAMS_HPC_RUN_DIR": str(run_dir.root),
        "TEAMS_HPC_PYTHON": sys.executable,
        "TEAMS_HPC_TASK_PYTHON": CONTAINER_PYTHON if config.site.container else sys.executable,
        "TEAMS_HPC_WARNING_S": str(slurm.warning_s),
        "OMP_NUM_THREADS": str(spec.cpus_per_task),
        # A compute node often has no way out: what isn't there must be missed at once.
        "HF_HUB_OFFLINE": "1",
    }
    if slurm.modules:
        values["TEAMS_HPC_MODULES"] = " ".join(slurm.modules)
    if slurm.scratch is not None:
        values["TEAMS_HPC_SCRATCH"] = str(slurm.scratch)
    if slurm.mpi is not None:
        values["SLURM_MPI_TYPE"] = slurm.mpi  # as srun --mpi
    if replaces is not None:  # its starts in vain count with those of the first
        values["TEAMS_HPC_FIRST_JOB"] = first_of_chain(read_records(run_dir), replaces)
    return {**values, **container_environment(config, run_dir.root), **slurm.environment}


def sbatch_options(config: Config, spec: JobSpec) -> dict[str, Any]:
    """Options of `sbatch` for a specification, by their long names; True is a bare option."""
    slurm = config.site.slurm
    options: dict[str, Any] = {
        "job-name": f"{config.name}-{spec.stage}",
        "time": spec.time_min,
        "nodes": spec.nodes,
        "ntasks-per-node": spec.tasks_per_node,
        "cpus-per-task": spec.cpus_per_task,
        "signal": f"{WARNING_SIGNAL}@{slurm.warning_s}",
        "requeue": True,
        "open-mode": "append",
        "kill-on-invalid-dep": "yes",
        "partition": spec.partition,
        "account": slurm.account,
        "qos": spec.qos,
        "mem": f"{round(spec.mem_gb * 1024)}M" if spec.mem_gb else None,
        "gpus-per-node": spec.gpus_per_node or None,
        **slurm.options,
    }
    if options.get("no-requeue"):
        del options["requeue"]
    return {name: value for name, value in options.items() if value not in (None, False)}


SRUN_OPTIONS = (
    "--wait=0",  # a site may have set another, which would cut down ranks that still save
    "--gpu-bind=none",  # every rank sees all GPUs of its node and takes its own
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Submitter:
    """Submits the jobs of one run.

    Args:
        config: The run's configuration.
        run_dir: The run; scripts and output go to its folder `slurm`.
        entry: What a job calls with (stage, run directory, index); importable by its name.
    """

    config: Config
    run_dir: RunDir
    entry: Entry

    def submit(
        self,
        spec: JobSpec,
        dependencies: Sequence[str],
        max_parallel_tasks: int,
        replaces: str | None = None,
    ) -> JobRecord:
        """Submit one job, or one array of jobs, and keep its record.

        Args:
            spec: At most as many indices as the cluster's MaxArraySize.
            dependencies: Jobs that must end well first.
            max_parallel_tasks: Array tasks at a time.
            replaces: The job whose work this one takes over.

        Raises:
            ClusterError: Slurm refused; has its words.
        """
        self.run_dir.slurm.mkdir(parents=True, exist_ok=True, mode=0o700)
        # Whole at every moment: tasks that start just now read it, and an empty one does nothing.
        write_text(self.run_dir.slurm / "task.sh", (SHELL / "task.sh").read_text(encoding="utf-8"))
        executor = self._executor(spec, dependencies, max_parallel_tasks, replaces)
        stages, roots = [spec.stage] * len(spec.indices), [str(self.run_dir.root)]
        indices = [str(index) for index in spec.indices]
        # Relative to here go the outputs: a path in an #SBATCH line can't hold every character.
        with chdir(self.run_dir.slurm), _environment(clean_environment()):
            try:
                jobs = executor.map_array(self.entry, stages, roots * len(indices), indices)
            except (FailedJobError, FailedSubmissionError) as error:
                raise ClusterError(f"sbatch refused {spec.stage}: {_last_line(error)}") from None
        job_id = str(jobs[0].job_id).partition("_")[0]
        record = JobRecord(
            job_id=job_id,
            stage=spec.stage,
            indices=spec.indices,
            is_array=len(spec.indices) > 1,
            submitted=time.time(),
            replaces=replaces,
        )
        write_record(self.run_dir, record)
        return record

    def script(self, spec: JobSpec, dependencies: Sequence[str]) -> str:
        """The batch script that `submit` would hand to sbatch."""
        executor = self._executor(spec, dependencies, self.config.site.slurm.max_parallel_tasks)
        if len(spec.indices) > 1:
            executor.parameters["map_count"] = len(spec.indices)
        text: str = executor._make_submission_file_text(executor._submitit_command_str, "")
        return text

    def _reshaping(self, words: Sequence[str], spec: JobSpec) -> str:
        """Before the step: let its processes go on where another number of them stopped."""
        command = (*words, "-m", "teams_hpc", "reshape", str(self.run_dir.root))
        return f"{shlex.join((*command, '--ranks', str(spec.world_size)))} || exit"

    def _executor(
        self,
        spec: JobSpec,
        dependencies: Sequence[str],
        max_parallel_tasks: int,
        replaces: str | None = None,
    ) -> SlurmExecutor:
        environment = job_environment(self.config, self.run_dir, spec, replaces)
        words = ("sh", str(self.run_dir.slurm / "task.sh"), environment["TEAMS_HPC_TASK_PYTHON"])
        executor = _Executor(folder=self.run_dir.slurm, python=shlex.join(words))
        options = sbatch_options(self.config, spec)
        options["output"] = "%A_%a.out" if len(spec.indices) > 1 else "%j.out"
        if dependencies:
            options["dependency"] = f"afterok:{':'.join(dependencies)}"
        executor.update_parameters(
            array_parallelism=max_parallel_tasks,
            wckey=None,
            stderr_to_stdout=True,
            ntasks_per_node=spec.tasks_per_node,
            nodes=spec.nodes,
            setup=[
                *(f"export {name}={shlex.quote(value)}" for name, value in environment.items()),
                (SHELL / "prologue.sh").read_text(encoding="utf-8"),
                *([self._reshaping(words, spec)] if spec.stage == "sft" else ()),
            ],
            srun_args=list(SRUN_OPTIONS),
            teardown=[(SHELL / "requeue.sh").read_text(encoding="utf-8")],
            # submitit writes its own names with underscores, and would have the last word.
            additional_parameters={
                name if name == "open-mode" else name.replace("-", "_"): value
                for name, value in options.items()
            },
        )
        return executor


def _last_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = [line for line in lines if line.startswith("sbatch: error:")]
    return (said or lines or ["no reason given"])[0].removeprefix("sbatch: error: ")


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Exactly these environment variables, for a while."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
