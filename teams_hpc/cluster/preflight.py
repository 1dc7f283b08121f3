"""What would go wrong with a run's jobs, found on the login node before any is submitted.

Each fault is one line, `key: what is wrong; what to do`, as in `config.check`. A cause is named
once: Slurm itself is only asked (`sbatch --test-only`) about jobs in which nothing was found here.
"""

import os
import socket
import stat
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from teams_hpc.cluster.container import needed_binds
from teams_hpc.cluster.inventory import (
    Association,
    Partition,
    accounting_enforces,
    mount_of,
    node_hosts,
    read_associations,
    read_partitions,
)
from teams_hpc.cluster.jobs import JobSpec
from teams_hpc.cluster.slurm import call_slurm, queued_jobs, scheduler_settings
from teams_hpc.cluster.submit import sbatch_options
from teams_hpc.config import Config
from teams_hpc.errors import ClusterError

_IN_MEMORY = frozenset({"devtmpfs", "ramfs", "tmpfs"})
_NETWORK = (
    "afs beegfs ceph cifs cvmfs fuse gfs2 glusterfs gpfs lustre nfs ocfs2 orangefs panfs pvfs2 "
    "smb3 virtiofs wekafs 9p"
).split()
_USUALLY_LOCAL = tuple(Path(name) for name in ("/tmp", "/var/tmp", "/dev/shm", "/run"))  # noqa: S108
_WAITING = ("nodes are busy", "down, drained or reserved", "not available now")
"""Words of `sbatch --test-only` about jobs that Slurm would take, and let wait."""


@dataclass(frozen=True, slots=True)
class _Fault:
    """What is wrong with the jobs of one stage, in words that may fit other stages too."""

    key: str
    what: str
    remedy: str

    def line(self, stages: Sequence[str] = ()) -> str:
        of_stages = f" (jobs of {', '.join(stages)})" if stages else ""
        return f"{self.key}: {self.what}{of_stages}; {self.remedy}"


def slurm_faults(config: Config, specs: Sequence[JobSpec]) -> list[str]:
    """Everything for which `submit` must refuse, one line each; empty if all is well.

    Args:
        config: The run's configuration.
        specs: What is going to be submitted; an array of any length is one of them.
    """
    faults = [fault.line() for fault in (*_place_faults(config), *_container_faults(config))]
    try:
        return [*faults, *_cluster_faults(config, specs)]
    except ClusterError as error:
        remedy = "run this where Slurm's commands work, or set site.executor=local"
        return [*faults, _Fault("site.executor", f"is slurm, but {error}", remedy).line()]


def asked_partitions(
    config: Config, spec: JobSpec, partitions: Mapping[str, Partition]
) -> tuple[list[Partition], list[str]]:
    """The partitions a job may go to, and names of unknown ones; several are a choice."""
    asked = sbatch_options(config, spec).get("partition")
    if asked is None:
        return [one for one in partitions.values() if one.is_default], []
    names = str(asked).split(",")
    known = [partitions[name] for name in names if name in partitions]
    return known, [name for name in names if name not in partitions]


def _cluster_faults(config: Config, specs: Sequence[JobSpec]) -> list[str]:
    settings = scheduler_settings()
    partitions = read_partitions()
    associations = _associations(settings)
    by_spec = [
        [
            *_shape_faults(config, spec, partitions),
            *_right_faults(config, spec, settings, associations),
        ]
        for spec in specs
    ]
    grouped: dict[_Fault, list[str]] = {}
    for spec, faults in zip(specs, by_spec, strict=True):
        for fault in faults:
            grouped.setdefault(fault, []).append(spec.stage)
    sound = [spec for spec, faults in zip(specs, by_spec, strict=True) if not faults]
    for fault, stages in _refusals(config, sound, partitions).items():
        grouped.setdefault(fault, []).extend(stages)
    lines = [fault.line(stages) for fault, stages in grouped.items()]
    numbers = _number_faults(config, specs, settings, associations)
    return [*_visibility_faults(config), *lines, *(fault.line() for fault in numbers)]


# Where the run lies.


def _place_faults(config: Config) -> Iterator[_Fault]:
    run_dir = config.resolved_run_dir
    for character, means in (("%", "names of its own"), ("\\", "none of its names any more")):
        if character in str(run_dir):
            what = f"{run_dir} has a {character} in its path, after which Slurm puts in {means}"
            yield _Fault("run_dir", what, "choose a path without it")
    for folder in (run_dir, run_dir / "slurm"):
        if not folder.is_dir():
            continue
        status = folder.stat()
        if status.st_uid != os.getuid():
            what = f"{folder} belongs to someone else, and jobs load pickles from it"
            yield _Fault("run_dir", what, "choose a folder of yours")
        elif status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            what = f"others may write to {folder}, and jobs load pickles from it"
            yield _Fault("run_dir", what, f"chmod go-w {folder}")


def _visibility_faults(config: Config) -> list[str]:
    """A run directory that only this machine has, where the nodes are other machines."""
    run_dir = config.resolved_run_dir.resolve()
    mount = mount_of(run_dir)
    if mount is None or not _are_elsewhere(node_hosts()):
        return []
    is_in_memory = mount.kind in _IN_MEMORY
    is_shared = any(mount.kind.startswith(kind) for kind in _NETWORK)
    is_local = any(run_dir.is_relative_to(folder) for folder in _USUALLY_LOCAL)
    if not is_in_memory and (is_shared or not is_local):
        return []
    what = f"{run_dir} is on a file system of this machine alone ({mount.kind} at {mount.folder})"
    remedy = "set run_dir=PATH to a folder that all nodes see (NFS, Lustre, GPFS ...)"
    return [_Fault("run_dir", what, remedy).line()]


def _are_elsewhere(hosts: set[str]) -> bool:
    here = {"localhost", socket.gethostname(), socket.gethostname().partition(".")[0]}
    return not hosts <= here


def _container_faults(config: Config) -> Iterator[_Fault]:
    container = config.site.container
    if container is None:
        return
    if not container.image.exists():
        what = f"no file or folder {container.image}"
        yield _Fault("site.container.image", what, "build it there (see docs), or name another")
    for path in needed_binds(config, config.resolved_run_dir):
        if "," in path or ":" in path:
            what = f"{path} can't be bound: a comma or colon in a path ends it there"
            yield _Fault("site.container", what, "choose a path without them")


# What jobs ask for.


def _shape_faults(
    config: Config, spec: JobSpec, partitions: Mapping[str, Partition]
) -> list[_Fault]:
    known, unknown = asked_partitions(config, spec, partitions)
    if unknown:
        what = f"there is no partition {', '.join(unknown)}"
        remedy = f"there are: {', '.join(sorted(partitions)) or 'none that you may see'}"
        return [_Fault(_key(config, spec, "partition"), what, remedy)]
    if not known:
        remedy = f"choose one of: {', '.join(sorted(partitions)) or 'none that you may see'}"
        return [_Fault("site.slurm.partition", "the cluster has no default partition", remedy)]
    faults = [list(_limits_of(config, spec, partition)) for partition in known]
    return [] if any(not some for some in faults) else faults[0]


def _limits_of(config: Config, spec: JobSpec, partition: Partition) -> Iterator[_Fault]:
    """What a job asks for beyond what the partition has."""
    where, other = f"partition {partition.name}", "or choose another partition"
    if partition.time_limit_min is not None and spec.time_min > partition.time_limit_min:
        what = f"{spec.time_min} minutes asked, {where} allows {partition.time_limit_min:g}"
        yield _Fault(_key(config, spec, "time_min"), what, f"lower it, {other}")
    cpus = spec.tasks_per_node * spec.cpus_per_task
    mem_mb = (spec.mem_gb or 0) * 1024
    wanted = (
        ("gpus_per_node", "GPUs", spec.gpus_per_node, partition.count(gpus=spec.gpus_per_node)),
        ("cpus_per_task", "CPUs", cpus, partition.count(cpus=cpus)),
        ("mem_gb", "MB of memory", round(mem_mb), partition.count(mem_mb=mem_mb)),
    )
    lacking = [(name, unit, asked) for name, unit, asked, count in wanted if not count]
    for name, unit, asked in lacking:
        what = f"{asked} {unit} of each node asked, no node of {where} has them"
        yield _Fault(_key(config, spec, name), what, f"lower it, {other}")
    if lacking:
        return
    num_nodes = partition.count(cpus=cpus, mem_mb=mem_mb, gpus=spec.gpus_per_node)
    if partition.node_limit is not None:
        num_nodes = min(num_nodes, partition.node_limit)
    if spec.nodes > num_nodes:
        what = f"{spec.nodes} nodes asked, {where} gives {num_nodes} that have what is asked"
        yield _Fault(_key(config, spec, "nodes"), what, f"ask for fewer, {other}")


def _key(config: Config, spec: JobSpec, name: str) -> str:
    """The key that decides: the stage's own where it is set."""
    if getattr(getattr(config.site.slurm.stages, spec.stage), name) is not None:
        return f"site.slurm.stages.{spec.stage}.{name}"
    if name == "gpus_per_node":
        return "site.gpus_per_node"
    if name == "nodes":
        return "site.num_sft_ranks" if spec.stage == "sft" else "site.ranks_per_worker"
    return f"site.slurm.{name}"


# What this user may do.


def _associations(settings: dict[str, str]) -> list[Association] | None:
    """None where accounting doesn't limit anyone, or can't be asked: Slurm itself then says."""
    if not accounting_enforces("associations", settings):
        return None
    try:
        return read_associations()
    except ClusterError:
        return None


def _right_faults(
    config: Config,
    spec: JobSpec,
    settings: dict[str, str],
    associations: list[Association] | None,
) -> Iterator[_Fault]:
    if associations is None:
        return
    options = sbatch_options(config, spec)
    account, qos, partition = (options.get(name) for name in ("account", "qos", "partition"))
    accounts = sorted({one.account for one in associations})
    if account is not None and account not in accounts:
        remedy = f"yours: {', '.join(accounts) or 'none; ask your cluster for one'}"
        yield _Fault("site.slurm.account", f"you may not use account {account}", remedy)
        return
    if qos is None or not accounting_enforces("qos", settings):
        return
    usable = [
        one
        for one in associations
        if account in (None, one.account) and one.partition in ("", partition or one.partition)
    ]
    names = sorted({name for one in usable for name in one.qos})
    if names and not set(str(qos).split(",")) & set(names):
        remedy = f"yours: {', '.join(names)}"
        yield _Fault(_key(config, spec, "qos"), f"you may not use qos {qos}", remedy)


def _number_faults(
    config: Config,
    specs: Sequence[JobSpec],
    settings: dict[str, str],
    associations: list[Association] | None,
) -> Iterator[_Fault]:
    """More jobs than the cluster or this user's association takes; array tasks are jobs."""
    asked = sum(len(spec.indices) for spec in specs)
    if not asked:
        return
    remedy = "lower site.num_workers, policy.num_members or the number of policy.variants"
    most = settings.get("MaxJobCount", "")
    if most.isdecimal() and asked >= int(most):
        what = f"{asked} jobs to submit, the cluster takes fewer than {most} (MaxJobCount)"
        yield _Fault("site.num_workers", what, remedy)
        return
    if associations is None or not accounting_enforces("limits", settings):
        return
    account = config.site.slurm.account
    limits = [one.most_jobs for one in associations if account in (None, one.account)]
    known = [limit for limit in limits if limit is not None]
    if not known or None in limits:
        return
    active = sum(job.is_active for job in queued_jobs().values())
    if asked + active > max(known):
        what = f"{asked} jobs to submit, {active} in the queue, yours may be {max(known)}"
        yield _Fault("site.num_workers", what, remedy)


# Slurm's own word.


def _refusals(
    config: Config, specs: Sequence[JobSpec], partitions: Mapping[str, Partition]
) -> dict[_Fault, list[str]]:
    """What `sbatch --test-only` says, asked once for equal jobs; with the stages it is about."""
    asked: dict[tuple[str, ...], str | None] = {}
    refusals: dict[_Fault, list[str]] = {}
    for spec in specs:
        options = sbatch_options(config, spec) | {"job-name": config.name}
        words = tuple(option_words(options))
        if words not in asked:
            asked[words] = _refusal(words, asked_partitions(config, spec, partitions)[0])
        said = asked[words]
        if said is not None:
            fault = _Fault("site.slurm", f"sbatch refuses: {said}", "ask for something else")
            refusals.setdefault(fault, []).append(spec.stage)
    return refusals


def _refusal(options: Sequence[str], partitions: Sequence[Partition]) -> str | None:
    try:
        call_slurm("sbatch", "--test-only", *options, "--wrap=:")
    except ClusterError as error:
        words = str(error).removeprefix("sbatch: ").removeprefix("allocation failure: ")
        return None if _would_wait(words, partitions) else words
    return None


def _would_wait(words: str, partitions: Sequence[Partition]) -> bool:
    """Whether Slurm only has nothing free now.

    Of nodes that are down it says the same as of nodes that don't exist; `_limits_of` has looked.
    """
    if any(waiting in words for waiting in _WAITING):
        return True
    some_are_down = any(not group.are_usable for one in partitions for group in one.nodes)
    return some_are_down and "node configuration is not available" in words


def option_words(options: Mapping[str, Any]) -> list[str]:
    """Options as words of a command line; True is a bare option, False is left out."""
    return [
        f"--{name}" if value is True else f"--{name}={value}"
        for name, value in options.items()
        if value is not False
    ]
