"""Talking to Slurm: argument lists, time limits, one call for many jobs.

A job's id here is as people write it: `123`, or `123_4` for an array task.
"""

import os
import re
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache

from teams_hpc.errors import ClusterError

_TIMEOUT_S = 60.0
_TRIES = 4
_BUSY = ("Socket timed out", "Unable to contact slurm controller", "temporarily unable")
_KEPT_VARIABLES = ("SLURM_CONF",)
_WHOLE_NAMES = {"SLURM_BITSTR_LEN": "0"}  # else `12_[0,2-7,...]` is cut after 64 characters
_DROPPED_PREFIXES = (
    "SLURM_", "SBATCH_", "SALLOC_", "SRUN_", "SACCT_", "SQUEUE_", "SCANCEL_", "SINFO_",
    "PMI", "OMPI_", "MPI_LOCAL", "TEAMS_HPC_",
)  # fmt: skip
_DROPPED_NAMES = frozenset(
    "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE CUDA_VISIBLE_DEVICES ROCR_VISIBLE_DEVICES".split()
)

ACTIVE_STATES = frozenset(
    "PENDING RUNNING SUSPENDED COMPLETING CONFIGURING STAGE_OUT SIGNALING REQUEUED RESIZING "
    "REQUEUE_HOLD REQUEUE_FED SPECIAL_EXIT STOPPED".split()
)
"""States in which a job still may do something."""


def clean_environment(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without what an allocation or a launcher sets, or changes Slurm's answers.

    A job submitted from it inherits nothing of the place it was submitted from.
    """
    return {
        name: value
        for name, value in environment.items()
        if name in _KEPT_VARIABLES
        or not (name in _DROPPED_NAMES or name.startswith(_DROPPED_PREFIXES))
    }


def call_slurm(*argv: str, timeout_s: float = _TIMEOUT_S) -> str:
    """Run one of Slurm's commands; tried again, ever later, while the controller is busy.

    Raises:
        ClusterError: The command is missing, failed, or didn't answer in time.
    """
    for attempt in range(_TRIES):
        try:
            done = subprocess.run(
                argv,
                env={**clean_environment(), **_WHOLE_NAMES},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=timeout_s,
                check=False,
            )
        except FileNotFoundError:
            raise ClusterError(
                f"no command {argv[0]} here; is this a login node of a Slurm cluster?"
            ) from None
        except subprocess.TimeoutExpired:
            raise ClusterError(f"{argv[0]} didn't answer within {timeout_s:g} s") from None
        if done.returncode == 0:
            return done.stdout
        if attempt + 1 == _TRIES or not any(words in done.stderr for words in _BUSY):
            break
        time.sleep(2.0**attempt)
    words = (done.stderr or done.stdout).strip().splitlines()
    raise ClusterError(f"{argv[0]}: {words[-1] if words else f'exit code {done.returncode}'}")


@dataclass(frozen=True, slots=True, kw_only=True)
class JobState:
    """One job, or one array task, as Slurm sees it.

    Attributes:
        job_id: `123` or `123_4`.
        state: One word: PENDING, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT, NODE_FAIL ...
        reason: Why it waits, or what it ended with; may be empty.
    """

    job_id: str
    state: str
    reason: str = ""

    @property
    def is_active(self) -> bool:
        return self.state in ACTIVE_STATES


def queued_jobs() -> dict[str, JobState]:
    """This user's jobs that Slurm still knows, by id; array tasks one by one. One `squeue`."""
    text = call_slurm(
        "squeue", "--noheader", "--array", "--me", "--states=all",
        "--format=%i|%T|%r",
    )  # fmt: skip
    found = (line.split("|", 2) for line in text.splitlines() if line.count("|") >= 2)
    return {
        job_id: JobState(job_id=job_id, state=state, reason="" if reason == "None" else reason)
        for job_id, state, reason in found
    }


def accounted_jobs(job_ids: Iterable[str]) -> dict[str, JobState] | None:
    """Jobs as accounting knows them, those long gone too; None where accounting is off.

    One `sacct` for all of them, whatever their number. An array task that was cancelled before it
    started, without the rest of its array, isn't listed at all (Slurm 22.05).

    Args:
        job_ids: Ids of whole jobs (`123`); array tasks come as `123_0`, `123_1` ...
    """
    wanted = sorted({job_id.partition("_")[0] for job_id in job_ids})
    if not wanted:
        return {}
    try:
        text = call_slurm(
            "sacct", "--noheader", "--parsable2", "--allocations",
            f"--jobs={','.join(wanted)}", "--format=JobID,State,ExitCode",
        )  # fmt: skip
    except ClusterError as error:
        if "accounting" in str(error).lower() and "disabled" in str(error).lower():
            return None
        raise
    states = {}
    for line in text.splitlines():
        name, state, exit_code = line.split("|")
        for job_id in expand_job_id(name):
            # "CANCELLED by 1000" is one state and a remark
            states[job_id] = JobState(job_id=job_id, state=state.split()[0], reason=exit_code)
    return states


def expand_job_id(name: str) -> Iterator[str]:
    """Ids of the jobs that one name stands for: `12_[0-4:2,7%4]` is 12_0, 12_2, 12_4, 12_7."""
    head, bracket, rest = name.partition("_[")
    if not bracket:
        yield name
        return
    for part in rest.rstrip("]").partition("%")[0].split(","):
        if part.endswith("..."):  # cut off, maybe within a number
            return
        numbers, _, step = part.partition(":")
        first, _, last = numbers.partition("-")
        found = range(int(first), int(last or first) + 1, int(step or 1))
        yield from (f"{head}_{number}" for number in found)


@cache
def scheduler_settings() -> dict[str, str]:
    """What `scontrol show config` says, by name (`MaxArraySize`, `PreemptMode` ...)."""
    lines = call_slurm("scontrol", "show", "config").splitlines()
    pairs = (re.split(r"\s*=\s*", line, maxsplit=1) for line in lines if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs}
