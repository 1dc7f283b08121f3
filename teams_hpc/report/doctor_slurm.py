"""What the cluster of a configuration has and lacks: Slurm's answers, and a probe on its nodes."""

from collections.abc import Iterator, Sequence

from teams_hpc.cluster.inventory import (
    Partition,
    mpi_types,
    read_associations,
    read_partitions,
    slurm_version,
)
from teams_hpc.cluster.jobs import JobSpec
from teams_hpc.cluster.preflight import asked_partitions, slurm_faults
from teams_hpc.cluster.slurm import scheduler_settings
from teams_hpc.config import Config
from teams_hpc.errors import ClusterError, TeamsError
from teams_hpc.pipeline.forecast import needed_warning_s
from teams_hpc.pipeline.submit import job_specs
from teams_hpc.report.doctor_probe import probe_findings
from teams_hpc.report.finding import Finding, fault_of_line
from teams_hpc.storage.run_dir import RunDir

_MISSING_SLURM = "site.executor"
_TOO_LITTLE_GRACE = (
    "too little time to save: what is left is the last checkpoint (sft.checkpoint_interval_steps)"
)
_BLOCKING = (_MISSING_SLURM, "site.slurm", "site.slurm.partition", "site.slurm.account")


def slurm_findings(config: Config) -> list[Finding]:
    """Ask Slurm about everything the configuration's jobs need. Starts one short job of two tasks.

    What is wrong comes first, each cause once; `submit` would refuse the same.
    """
    try:
        specs = job_specs(config)
    except TeamsError as error:
        return [fault_of_line(str(error))]
    faults = [fault_of_line(line) for line in slurm_faults(config, specs)]
    keys = {fault.what for fault in faults}
    if _MISSING_SLURM in keys:
        return faults
    try:
        found = [*faults, *_cluster(config, specs, keys)]
    except ClusterError as error:
        return [*faults, Finding(level="fault", what="Slurm", found=str(error))]
    blocking = sorted(key for key in keys if key in _BLOCKING or key.endswith(".qos"))
    if blocking:
        remedy = f"first mend {', '.join(blocking)}"
        return [*found, Finding(level="note", what="nodes", found="not asked", remedy=remedy)]
    return [*found, *probe_findings(config, _widest(specs))]


def _widest(specs: Sequence[JobSpec]) -> JobSpec:
    """The job that asks for most: on its nodes and GPUs the rest depends."""
    return max(specs, key=lambda spec: (spec.nodes, spec.gpus_per_node))


def _cluster(config: Config, specs: Sequence[JobSpec], faulty: set[str]) -> Iterator[Finding]:
    settings, partitions = scheduler_settings(), read_partitions()
    name = settings.get("ClusterName", "a cluster")
    found = f"{slurm_version()}, {name}"
    yield Finding(level="ok", what="Slurm", found=found, expected="any recent version")
    if "site.slurm.account" not in faulty:
        yield _account(config)
    seen: set[str] = set()
    grace_s, _ = needed_warning_s(config, RunDir(config.resolved_run_dir))
    for spec in specs:
        for partition in asked_partitions(config, spec, partitions)[0]:
            if partition.name not in seen:
                seen.add(partition.name)
                users = [one for one in specs if one.partition == spec.partition]
                yield from _partition(partition, users)
                yield from _preemption(partition, settings, grace_s)
    yield _arrays(specs, settings)
    yield _requeue(settings)
    yield _mpi(config, settings)


def _account(config: Config) -> Finding:
    slurm = config.site.slurm
    expected = f"account {slurm.account or 'yours'}, qos {slurm.qos or 'the default'}"
    try:
        associations = read_associations()
    except ClusterError as error:
        found = f"not known: {error}"
        return Finding(level="note", what="account and qos", found=found, expected=expected)
    found = ", ".join(f"{one.account} ({' '.join(one.qos)})" for one in associations)
    return Finding(level="ok", what="account and qos", found=found or "any", expected=expected)


def _partition(partition: Partition, specs: Sequence[JobSpec]) -> Iterator[Finding]:
    """What it offers; where that is too little `slurm_faults` has said so."""
    what = f"partition {partition.name}"
    usable = sum(group.count for group in partition.nodes if group.are_usable)
    is_up = partition.state == "UP" and usable
    yield Finding(
        level="ok" if is_up else "note",
        what=what,
        found=f"{partition.state}, {partition.num_nodes} nodes, {usable} of them in use or idle",
        expected=f"nodes of a job: {max(spec.nodes for spec in specs)}",
        remedy="" if is_up else "jobs will wait until it is up again",
    )
    limit = partition.time_limit_min
    yield Finding(
        level="ok" if limit is None or limit >= max(spec.time_min for spec in specs) else "note",
        what=f"{what}: time",
        found="no limit" if limit is None else f"at most {limit:g} minutes",
        expected=f"{max(spec.time_min for spec in specs)} minutes for a job",
    )
    asked = max(spec.gpus_per_node for spec in specs)
    most = max((group.gpus for group in partition.nodes), default=0)
    total = sum(group.gpus * group.count for group in partition.nodes)
    yield Finding(
        level="ok" if most >= asked else "note",
        what=f"{what}: GPUs",
        found=f"{total}, at most {most} of a node" if total else "none",
        expected=f"{asked} of each node" if asked else "none needed",
    )


def _preemption(
    partition: Partition, settings: dict[str, str], needed_s: float
) -> Iterator[Finding]:
    """What happens to a job that is preempted, and whether it can save before: see `needed_s`."""
    what = f"partition {partition.name}: preemption"
    mode = partition.preempt_mode.split(",")[0] or settings.get("PreemptMode", "OFF")
    if mode == "OFF" or settings.get("PreemptType", "").endswith("none"):
        found = "off: jobs run to their time limit"
        yield Finding(level="ok", what=what, found=found, expected="any")
        return
    means = {
        "REQUEUE": "Slurm puts the job back into the queue",
        "CANCEL": "the job has to go back by itself within the grace time",
        "SUSPEND": "the job stands still in memory; leases of its tasks run out",
    }
    is_enough = partition.grace_s > needed_s
    yield Finding(
        level="ok" if is_enough else "note",
        what=what,
        found=f"{mode}, {partition.grace_s} s of grace: {means.get(mode, 'see slurm.conf')}",
        expected=f"more than {needed_s:.0f} s, for a checkpoint of the fine-tuning",
        remedy="" if is_enough else _TOO_LITTLE_GRACE,
    )
    # SlurmctldParameters=preempt_send_user_signal, by now PreemptParameters=send_user_signal
    if "send_user_signal" not in " ".join(settings.values()):
        yield Finding(
            level="note",
            what=f"{what} warning",
            found="send_user_signal is not set: only TERM is sent",
            expected="USR2 too",
            remedy="ask your cluster for it, in PreemptParameters (see slurm.conf)",
        )


def _arrays(specs: Sequence[JobSpec], settings: dict[str, str]) -> Finding:
    longest = max(len(spec.indices) for spec in specs)
    most = settings.get("MaxArraySize", "")
    is_split = most.isdecimal() and longest > int(most)
    return Finding(
        level="note" if is_split else "ok",
        what="array limit",
        found=f"MaxArraySize {most or 'not known'}",
        expected=f"{longest} tasks in the longest array",
        remedy="it is submitted as several arrays" if is_split else "",
    )


def _requeue(settings: dict[str, str]) -> Finding:
    return Finding(
        level="ok",
        what="requeue",
        found=f"JobRequeue {settings.get('JobRequeue', 'not known')}",
        expected="any: jobs ask for it, or submit a successor",
    )


def _mpi(config: Config, settings: dict[str, str]) -> Finding:
    wanted = config.site.slurm.mpi
    default = settings.get("MpiDefault", "none")
    try:
        types = mpi_types()
    except ClusterError as error:
        return Finding(level="note", what="srun --mpi", found=str(error))
    is_missing = wanted is not None and bool(types) and wanted not in types
    return Finding(
        level="fault" if is_missing else "ok",
        what="srun --mpi",
        found=", ".join(types) or "not known",
        expected=wanted or f"the default ({default})",
        remedy="set site.slurm.mpi to one of them" if is_missing else "",
    )
