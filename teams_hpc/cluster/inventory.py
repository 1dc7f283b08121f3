"""What a cluster has: partitions, their nodes and limits, and what this user may ask for."""

import getpass
import re
from dataclasses import dataclass
from pathlib import Path

from teams_hpc.cluster.slurm import call_slurm, scheduler_settings
from teams_hpc.errors import ClusterError

_NO_LIMIT = frozenset({"", "(null)", "infinite", "n/a", "none", "not_set", "unlimited"})
_USABLE = frozenset({"allocated", "completing", "idle", "mixed", "planned"})


def parse_minutes(text: str) -> float | None:
    """Minutes of one of Slurm's times, such as `90`, `2:30`, `1-12` or `7-00:00:00`.

    Returns:
        None where there is no limit.

    Raises:
        ValueError: It is no time.
    """
    if text.strip().lower() in _NO_LIMIT:
        return None
    days, dash, rest = text.strip().rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if len(parts) > 3:
        raise ValueError(f"not a time: {text}")
    if dash:  # D-HH[:MM[:SS]]
        hours, minutes, seconds = (*parts, 0, 0)[:3]
    elif len(parts) == 3:
        hours, minutes, seconds = parts
    else:  # MM[:SS]
        hours, minutes, seconds = 0, parts[0], parts[1] if len(parts) == 2 else 0
    return int(days or 0) * 1440 + hours * 60 + minutes + seconds / 60


def parse_count(text: str) -> int | None:
    """A number of Slurm's; None where there is no limit."""
    return None if text.strip().lower() in _NO_LIMIT else int(text)


def parse_gpus(gres: str) -> int:
    """GPUs in a list of generic resources, such as `gpu:a100:4(S:0-1),nvme:1`."""
    counts = re.findall(r"(?:^|,)gpu(?::[^,:(]+)*?:(\d+)(?=[,(]|$)", gres)
    return sum(int(count) for count in counts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Nodes:
    """Equal nodes of a partition."""

    count: int
    cpus: int
    mem_mb: int
    gpus: int
    are_usable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One partition; None is no limit.

    Attributes:
        preempt_mode: What happens to its jobs when others need their nodes (OFF, REQUEUE ...).
        grace_s: Seconds between the warning of a preemption and the kill.
    """

    name: str
    is_default: bool
    state: str
    time_limit_min: float | None
    node_limit: int | None
    preempt_mode: str
    grace_s: int
    nodes: tuple[Nodes, ...]

    @property
    def num_nodes(self) -> int:
        return sum(group.count for group in self.nodes)

    def count(self, *, cpus: int = 0, mem_mb: float = 0, gpus: int = 0) -> int:
        """Nodes that have at least so much."""
        return sum(
            group.count
            for group in self.nodes
            if group.cpus >= cpus and group.mem_mb >= mem_mb and group.gpus >= gpus
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Association:
    """One row of what this user may use; an empty partition stands for all."""

    account: str
    partition: str
    qos: tuple[str, ...]
    most_jobs: int | None


def read_partitions() -> dict[str, Partition]:
    """All partitions that this user can see. Two calls.

    Raises:
        ClusterError: Slurm doesn't answer, or not as its manual says.
    """
    text = call_slurm("scontrol", "--oneliner", "show", "partition")
    try:
        nodes = _read_nodes()
        rows = [
            dict(word.split("=", 1) for word in line.split() if "=" in word)
            for line in text.splitlines()
        ]
        return {
            row["PartitionName"]: _partition(row, nodes.get(row["PartitionName"], []))
            for row in rows
            if "PartitionName" in row
        }
    except ValueError as error:
        raise ClusterError(f"can't read what Slurm says of its partitions: {error}") from None


def _partition(fields: dict[str, str], nodes: list[Nodes]) -> Partition:
    return Partition(
        name=fields["PartitionName"],
        is_default=fields.get("Default") == "YES",
        state=fields.get("State", "UP"),
        time_limit_min=parse_minutes(fields.get("MaxTime", "")),
        node_limit=parse_count(fields.get("MaxNodes", "")),
        preempt_mode=fields.get("PreemptMode", ""),
        grace_s=parse_count(fields.get("GraceTime", "")) or 0,
        nodes=tuple(nodes),
    )


def _read_nodes() -> dict[str, list[Nodes]]:
    """Nodes by partition, equal ones together (`-e`: no 16+ for a mixture)."""
    found: dict[str, list[Nodes]] = {}
    for line in call_slurm("sinfo", "--noheader", "-e", "--format=%R|%D|%c|%m|%T|%G").splitlines():
        name, count, cpus, memory, state, gres = line.strip().split("|", 5)
        group = Nodes(
            count=int(count),
            cpus=int(cpus),
            mem_mb=int(memory),
            gpus=parse_gpus(gres),
            are_usable=state.rstrip("*~#!%$@^-+") in _USABLE,
        )
        found.setdefault(name, []).append(group)
    return found


def node_hosts() -> set[str]:
    """Host names of all nodes.

    Raises:
        ClusterError: Slurm doesn't answer.
    """
    return set(call_slurm("sinfo", "--noheader", "--Node", "--format=%n").split())


def read_associations() -> list[Association]:
    """What accounting lets this user use on this cluster.

    Raises:
        ClusterError: Accounting is off or doesn't answer.
    """
    text = call_slurm(
        "sacctmgr", "--noheader", "--parsable2", "show", "assoc", f"user={getpass.getuser()}",
        *_of_this_cluster(), "format=account,partition,qos,maxsubmitjobs",
    )  # fmt: skip
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 3)
    return [
        Association(
            account=account,
            partition=partition,
            qos=tuple(name for name in qos.split(",") if name),
            most_jobs=parse_count(most),
        )
        for account, partition, qos, most in rows
    ]


def _of_this_cluster() -> tuple[str, ...]:
    name = scheduler_settings().get("ClusterName")
    return (f"cluster={name}",) if name else ()


def mpi_types() -> tuple[str, ...]:
    """What `srun --mpi=` understands; empty for versions that say it on standard error.

    Raises:
        ClusterError: There is no srun.
    """
    lines = call_slurm("srun", "--mpi=list").splitlines()
    words = (line.split(":")[-1].replace(",", " ").split() for line in lines if "are" not in line)
    return tuple(word for line in words for word in line)


def slurm_version() -> str:
    """Slurm's version, of the commands here.

    Raises:
        ClusterError: There is no Slurm.
    """
    return call_slurm("sinfo", "--version").split()[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Mount:
    """A mounted file system.

    Attributes:
        folder: Where it is mounted.
        kind: Its type: ext4, nfs4, lustre, tmpfs ...
    """

    folder: Path
    kind: str


def mount_of(path: Path, table: Path = Path("/proc/mounts")) -> Mount | None:
    """The file system that holds `path`, whether that exists or not; None if nobody can say."""
    try:
        lines = table.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    resolved, best = path.resolve(), None
    for line in lines:
        _, folder, kind, *_ = line.split(" ")
        # Blanks in names come as octal numbers.
        place = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), folder))
        is_deeper = best is None or len(place.parts) >= len(best.folder.parts)
        if is_deeper and resolved.is_relative_to(place):
            best = Mount(folder=place, kind=kind)
    return best


def accounting_enforces(what: str, settings: dict[str, str]) -> bool:
    """Whether Slurm refuses jobs for lack of `what` (associations, limits, qos)."""
    return what in settings.get("AccountingStorageEnforce", "").lower().split(",")
