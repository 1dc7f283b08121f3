"""A private Slurm cluster of several "nodes" on this one machine, for tests.

It needs no root, no systemd and no network: its own munge key, ports, folder and, with accounting,
its own MariaDB. For developers: `python tests/slurm/cluster.py up DIR`, later `... down DIR`.
"""

import argparse
import getpass
import os
import random
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

ACCOUNT = "lab"
QOS = "batch"
FINISHED = frozenset(
    "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED "
    "TIMEOUT".split()
)
CLIENTS = ("sbatch", "scancel", "scontrol", "sinfo", "squeue", "srun")
DAEMONS = ("munged", "slurmctld", "slurmd")
ACCOUNTING = ("slurmdbd", "mariadbd", "mariadb", "mariadb-install-db", "sacctmgr", "sacct")
PACKAGES = (
    "slurmctld slurmd slurm-client slurmdbd mariadb-server-core mariadb-client-core munge "
    "libpmix-dev"
)
LONGEST_SOCKET = 100  # a unix socket's name may have 107 characters

Job = dict[str, str]
T = TypeVar("T")


class ClusterError(RuntimeError):
    """The cluster did not do what was asked; the text ends with the daemons' logs."""


class CommandError(ClusterError):
    """A client command failed; its output is in the text."""


def missing_programs(with_accounting: bool = True) -> list[str]:
    """Names of the programs that a cluster needs and this machine lacks."""
    names = CLIENTS + DAEMONS + (ACCOUNTING if with_accounting else ())
    return [name for name in names if _which(name) is None]


def _search_path() -> str:
    """PATH with the folders of daemons, which an ordinary user's PATH often lacks."""
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def _which(name: str) -> str | None:
    return shutil.which(name, path=_search_path())


def _clean_environment() -> dict[str, str]:
    """This process's environment without what another Slurm or an allocation put there."""
    kept = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("SLURM", "SBATCH", "SRUN", "SACCT"))
    }
    return {**kept, "PATH": _search_path()}


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def free_base_port(count: int) -> int:
    """The first of `count` free ports in a row, below those the kernel hands out itself."""
    for _ in range(200):
        base = random.randrange(15000, 32000 - count)
        if all(_is_free(port) for port in range(base, base + count)):
            return base
    raise ClusterError(f"no {count} free ports in a row")


def parse_job(line: str) -> Job:
    """One line of `scontrol -o show job`; of a key that comes twice the first counts."""
    fields: Job = {}
    parts = re.split(r"(?:^| )([A-Z][\w:/]*)=", line.strip())
    for key, value in zip(parts[1::2], parts[2::2], strict=True):
        fields.setdefault(key, value.strip())
    return fields


def belongs_to(job: Job, job_id: str) -> bool:
    """Whether this record is of that job: `12`, an array's id `12`, or its element `12_3`."""
    element = f"{job.get('ArrayJobId')}_{job.get('ArrayTaskId')}"
    return job_id in (job["JobId"], job.get("ArrayJobId"), element)


def _is_running(pid: int, name: str) -> bool:
    """Whether that process is this daemon and no zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    command, _, rest = stat.partition("(")[2].rpartition(")")
    return command == name[:15] and rest.split()[0] not in "ZX"


@dataclass
class SlurmCluster:
    """A Slurm cluster whose every file lies below `folder`; runs as the present user."""

    folder: Path
    num_nodes: int = 4
    cpus: int = 8
    memory_mb: int = 16000
    gpus: int = 4
    with_accounting: bool = True
    preempt_mode: Literal["REQUEUE", "CANCEL"] = "REQUEUE"
    grace_seconds: int = 15
    cred_expire: int = 5
    _last_failure: str = field(default="", init=False, repr=False)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder).resolve()
        if len(str(self.folder / "run" / "munge.sock")) > LONGEST_SOCKET:
            raise ClusterError(f"the folder's name is too long for unix sockets: {self.folder}")

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What it is called and where it lies.

    @property
    def nodes(self) -> list[str]:
        """Node names: loopback addresses, so that every node's name resolves."""
        return [f"127.0.0.{11 + i}" for i in range(self.num_nodes)]

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs in its environment to be a client of this cluster."""
        return {"SLURM_CONF": str(self.folder / "etc" / "slurm.conf")}

    @property
    def _munge_socket(self) -> Path:
        return self.folder / "run" / "munge.sock"

    @property
    def _database_socket(self) -> Path:
        return self.folder / "run" / "my.sock"

    # Starting and stopping.

    def start(self, timeout: float = 60) -> None:
        """Start all daemons and return when every node is idle."""
        if missing := missing_programs(self.with_accounting):
            raise ClusterError(f"not on this machine: {', '.join(missing)}; packages: {PACKAGES}")
        if running := self._running():
            raise ClusterError(f"already up in {self.folder}: {running}")
        try:
            self._write_files()
            self._start_daemons(timeout)
        except BaseException:
            with suppress(ClusterError):
                self.stop()
            raise

    def stop(self, timeout: float = 30) -> None:
        """End the jobs, then the daemons of this folder, whoever started them."""
        if "slurmctld" in self._running().values():
            with suppress(ClusterError):
                self.quiet(timeout=15)
        for names in [("slurmctld", "slurmd"), ("slurmdbd",), ("mariadbd",), ("munged",)]:
            self._end(names, timeout)

    def _start_daemons(self, timeout: float) -> None:
        self._start_munge()
        if self.with_accounting:
            self._start_database(timeout)
            self._start_accounting(timeout)
        self._daemon("slurmctld")
        for node in self.nodes:
            self._daemon("slurmd", "-N", node)
        self._poll("nodes to be idle", self._all_nodes_idle, timeout)

    def _start_munge(self) -> None:
        run, log = self.folder / "run", self.folder / "log"
        options = {
            "key-file": self.folder / "etc" / "munge.key",
            "socket": self._munge_socket,
            "pid-file": run / "munged.pid",
            "seed-file": run / "munged.seed",
            "log-file": log / "munged.log",
        }
        self._daemon("munged", "--force", *(f"--{k}={v}" for k, v in options.items()))

    def _start_database(self, timeout: float) -> None:
        defaults = f"--defaults-file={self.folder / 'etc' / 'my.cnf'}"
        if not (self.folder / "db" / "mysql").is_dir():
            # Root without a password: the socket lies in a folder that only this user can enter.
            plain = ("--auth-root-authentication-method=normal", "--skip-test-db")
            self.run("mariadb-install-db", defaults, *plain, timeout=timeout)
        self._daemon("setsid", "--fork", _which("mariadbd") or "mariadbd", defaults)
        create = "create database if not exists slurm_acct_db"
        client = ("mariadb", "--no-defaults", "-u", "root", "-S", str(self._database_socket))
        self._poll("the database", lambda: self._succeeds(*client, "-e", create), timeout)

    def _start_accounting(self, timeout: float) -> None:
        # slurmdbd has no setting for the database's socket, its client library has.
        self._daemon("slurmdbd", environment={"MYSQL_UNIX_PORT": str(self._database_socket)})
        listing = ("sacctmgr", "-n", "list", "cluster", "format=cluster")
        self._poll("slurmdbd", lambda: self._succeeds(*listing), timeout)
        if "lab" in self.run(*listing).split():
            return
        user = getpass.getuser()
        for words in (
            "add cluster lab",
            f"add qos {QOS}",
            f"add account {ACCOUNT} cluster=lab",
            f"add user {user} account={ACCOUNT} cluster=lab",
            f"modify user {user} where cluster=lab set defaultaccount={ACCOUNT}",
            f"modify user {user} where cluster=lab account={ACCOUNT} set qos=normal,{QOS}",
            f"modify user {user} where cluster=lab account={ACCOUNT} set defaultqos=normal",
        ):
            self.run("sacctmgr", "--immediate", *words.split())

    def _daemon(self, *argv: str, environment: dict[str, str] | None = None) -> None:
        """Start a program that goes to the background by itself."""
        log = self.folder / "log" / "start.log"
        with log.open("a") as output:
            done = subprocess.run(
                [_which(argv[0]) or argv[0], *argv[1:]],
                env={**_clean_environment(), **self.environment, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=60,
                cwd=self.folder,
            )
        if done.returncode:
            raise self._error(f"{argv[0]} did not start: exit code {done.returncode}")

    def _running(self) -> dict[int, str]:
        """Process ids of this folder's daemons, each with the daemon's name."""
        found = {}
        for path in (self.folder / "run").glob("*.pid"):
            name, text = path.name.split(".")[0], path.read_text().strip()
            if text.isdecimal() and _is_running(int(text), name):
                found[int(text)] = name
        return found

    def _end(self, names: Collection[str], timeout: float) -> None:
        """Tell these daemons to end and wait until they have."""
        pids = {pid: name for pid, name in self._running().items() if name in names}
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        # A daemon removes its pid file before it ends, so look at the processes themselves.
        ended = lambda: not any(_is_running(*item) for item in pids.items())  # noqa: E731
        self._poll(f"the end of {', '.join(names)}", ended, timeout)

    # Files.

    def _write_files(self) -> None:
        for name in ("etc", "run", "log", "state", "dev", "db"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for node in self.nodes:
            (self.folder / "spool" / node).mkdir(parents=True, exist_ok=True)
            (self.folder / "tmp" / node).mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)
        for i in range(self.gpus):  # slurmd wants one device file for each GPU
            device = self.folder / "dev" / f"nvidia{i}"
            device.unlink(missing_ok=True)
            device.symlink_to("/dev/null")
        base_port = free_base_port(self.num_nodes + 2)
        etc = self.folder / "etc"
        self._write_key(etc / "munge.key")
        (etc / "plugstack.conf").write_text("")
        (etc / "gres.conf").write_text(self._gres_conf())
        (etc / "slurm.conf").write_text(self._slurm_conf(base_port))
        (etc / "my.cnf").write_text(self._database_conf())
        # slurmdbd refuses a configuration that others can read.
        (etc / "slurmdbd.conf").touch(mode=0o600)
        (etc / "slurmdbd.conf").write_text(self._slurmdbd_conf(base_port + self.num_nodes + 1))

    def _write_key(self, path: Path) -> None:
        if not path.exists():
            path.touch(mode=0o600)
            path.write_bytes(secrets.token_bytes(128))
            path.chmod(0o400)

    @property
    def _node_range(self) -> str:
        return self.nodes[0] if self.num_nodes == 1 else f"127.0.0.[11-{10 + self.num_nodes}]"

    def _gres_conf(self) -> str:
        if not self.gpus:
            return ""
        devices = f"{self.folder}/dev/nvidia" + ("0" if self.gpus == 1 else f"[0-{self.gpus - 1}]")
        return f"AutoDetect=off\nNodeName={self._node_range} Name=gpu Type=a100 File={devices}\n"

    def _slurm_conf(self, base_port: int) -> str:
        here, user, nodes = self.folder, getpass.getuser(), self._node_range
        first, last = base_port + 1, base_port + self.num_nodes
        ports = f"{first}" if first == last else f"[{first}-{last}]"
        gres = f" Gres=gpu:a100:{self.gpus}" if self.gpus else ""
        # Another first id at each new start: a file named by job id is then never an old one.
        first_job = 1000 + int(time.time()) % 10_000_000
        return f"""\
ClusterName=lab
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={base_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={self._munge_socket},cred_expire={self.cred_expire}
StateSaveLocation={here}/state
SlurmdSpoolDir={here}/spool/%n
TmpFS={here}/tmp/%n
SlurmctldPidFile={here}/run/slurmctld.pid
SlurmdPidFile={here}/run/slurmd.%n.pid
SlurmctldLogFile={here}/log/slurmctld.log
SlurmdLogFile={here}/log/slurmd.%n.log
PlugStackConfig={here}/etc/plugstack.conf
MailProg={_which("true")}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory,CR_LLN
DefMemPerCPU={self.memory_mb // self.cpus // 2}
SlurmdParameters=config_overrides
SlurmctldParameters=preempt_send_user_signal
SchedulerParameters=bf_interval=2,batch_sched_delay=0,sched_interval=2
GresTypes=gpu
JobRequeue=1
MaxArraySize=1001
ReturnToService=1
SlurmdTimeout=30
KillWait=5
MinJobAge=3600
FirstJobId={first_job}
PreemptType=preempt/partition_prio
PreemptMode={self.preempt_mode}
{self._accounting_conf(base_port + self.num_nodes + 1)}
NodeName={nodes} NodeHostname=localhost NodeAddr={nodes} Port={ports} CPUs={self.cpus} \
RealMemory={self.memory_mb}{gres} State=UNKNOWN
PartitionName=DEFAULT Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP
PartitionName=low Default=YES PriorityTier=1 GraceTime={self.grace_seconds}
PartitionName=high PriorityTier=10 PreemptMode=OFF
"""

    def _accounting_conf(self, port: int) -> str:
        if not self.with_accounting:
            return "AccountingStorageType=accounting_storage/none"
        # Without the last line but one sacct and slurmctld look for munge's usual socket.
        return f"""\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={port}
AccountingStorageTRES=gres/gpu
AccountingStorageEnforce=associations,qos
AccountingStoragePass={self._munge_socket}
JobAcctGatherType=jobacct_gather/linux"""

    def _slurmdbd_conf(self, port: int) -> str:
        return f"""\
AuthType=auth/munge
AuthInfo=socket={self._munge_socket}
DbdHost=localhost
DbdAddr=127.0.0.1
DbdPort={port}
SlurmUser={getpass.getuser()}
PidFile={self.folder}/run/slurmdbd.pid
LogFile={self.folder}/log/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
"""

    def _database_conf(self) -> str:
        return f"""\
[mysqld]
datadir={self.folder}/db
socket={self._database_socket}
pid-file={self.folder}/run/mariadbd.pid
log-error={self.folder}/log/mariadbd.log
user={getpass.getuser()}
skip-networking
skip-name-resolve
skip-log-bin
innodb_buffer_pool_size=64M
innodb_log_file_size=16M
innodb_lock_wait_timeout=900
innodb_flush_log_at_trx_commit=0
"""

    # Use.

    def run(self, *argv: str, timeout: float = 30, stdin: str = "") -> str:
        """Run a client command; its standard output, or a CommandError with what it said."""
        try:
            done = self._call(argv, timeout, stdin)
        except subprocess.TimeoutExpired as error:
            raise self._error(
                f"no end after {timeout} s: {' '.join(argv)}", CommandError
            ) from error
        if done.returncode:
            said = f"{done.stdout}{done.stderr}".strip()
            text = f"exit code {done.returncode}: {' '.join(argv)}\n{said}"
            raise self._error(text, CommandError)
        return done.stdout

    def submit(self, script: str, *options: str, folder: Path) -> str:
        """Submit a batch script to run in that folder; its job id."""
        text = script if script.startswith("#!") else f"#!/bin/bash\n{script}\n"
        words = ("sbatch", "--parsable", f"--chdir={folder}", *options)
        return self.run(*words, stdin=text).strip().split(";")[0]

    def jobs(self) -> list[Job]:
        """All jobs that slurmctld remembers, ended ones too (for an hour)."""
        lines = self.run("scontrol", "-o", "show", "job").splitlines()
        return [parse_job(line) for line in lines if line.startswith("JobId=")]

    def find(self, job_id: str) -> list[Job]:
        """The records of a job; of an array those of its elements."""
        return [job for job in self.jobs() if belongs_to(job, job_id)]

    def wait_for(
        self, job_ids: str | Collection[str], states: str | Collection[str], timeout: float = 60
    ) -> list[Job]:
        """The jobs' records, once each job is in one of these states."""
        ids = [job_ids] if isinstance(job_ids, str) else list(job_ids)
        wanted = {states} if isinstance(states, str) else set(states)

        def reached() -> list[Job]:
            jobs = self.jobs()
            found = [[job for job in jobs if belongs_to(job, job_id)] for job_id in ids]
            records = [job for group in found for job in group]
            done = all(found) and all(job["JobState"] in wanted for job in records)
            return records if done else []

        try:
            return self._poll(f"jobs {ids} to be {sorted(wanted)}", reached, timeout)
        except ClusterError as error:
            seen = {job["JobId"]: (job["JobState"], job.get("Reason")) for job in self.jobs()}
            raise ClusterError(f"{error}\nall jobs: {seen}") from error

    def active(self) -> list[Job]:
        """The jobs that wait, run or are just being ended."""
        return [job for job in self.jobs() if job["JobState"] not in FINISHED]

    def wait_idle(self, timeout: float = 60) -> None:
        """Wait until no job is active."""
        self._poll("an empty queue", lambda: not self.active(), timeout)

    def cancel_all(self) -> None:
        """Cancel every job; does not wait."""
        with suppress(CommandError):  # it also fails for a job that ended meanwhile
            self.run("scancel", f"--user={getpass.getuser()}")

    def quiet(self, timeout: float = 60) -> None:
        """Cancel every job, bring every node back, and wait until nothing is active."""

        def is_quiet() -> bool:
            if self.active():
                self.cancel_all()
                return False
            return True

        self._poll("an empty queue", is_quiet, timeout, pause=0.3)
        for node in self.nodes:
            self.node_up(node, timeout)

    def node_state(self, node: str) -> str:
        """A node's state in Slurm's words, such as IDLE, MIXED or DOWN+DRAIN."""
        found = re.search(r" State=(\S+)", self.run("scontrol", "-o", "show", "node", node))
        return found[1] if found else ""

    def node_down(self, node: str, timeout: float = 30) -> None:
        """Set a node down: its jobs fail with NODE_FAIL and are requeued."""
        words = (f"nodename={node}", "state=down", "reason=test")
        self.run("scontrol", "update", *words)
        is_down = lambda: self.node_state(node).startswith("DOWN")  # noqa: E731
        self._poll(f"node {node} to be down", is_down, timeout)

    def node_up(self, node: str, timeout: float = 30) -> None:
        """Bring a node back that is down or drained, and wait until it can take jobs."""

        def is_up() -> bool:
            state = self.node_state(node)
            if re.fullmatch(r"(IDLE|MIXED|ALLOCATED)", state):
                return True
            if re.match(r"DOWN|.*DRAIN", state):
                with suppress(CommandError):
                    self.run("scontrol", "update", f"nodename={node}", "state=resume")
            return False

        self._poll(f"node {node} to be up", is_up, timeout)

    # Helpers.

    def log_tails(self, lines: int = 12) -> str:
        """The last lines of every daemon's log."""
        tails = []
        for path in sorted((self.folder / "log").glob("*.log")):
            text = path.read_text(errors="replace").splitlines()[-lines:]
            if text:
                tails.append("\n".join([f"--- {path.name}", *text]))
        return "\n".join(tails)

    def _error(self, text: str, kind: type[ClusterError] = ClusterError) -> ClusterError:
        return kind(f"{text}\n{self.log_tails()}")

    def _call(
        self, argv: Sequence[str], timeout: float, stdin: str = ""
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [_which(argv[0]) or argv[0], *argv[1:]],
            env={**_clean_environment(), **self.environment},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def _succeeds(self, *argv: str) -> bool:
        """Whether a command succeeds; what it says otherwise is kept for an error's text."""
        return self._output(*argv) is not None

    def _output(self, *argv: str) -> str | None:
        try:
            done = self._call(argv, timeout=10)
        except subprocess.TimeoutExpired:
            self._last_failure = f"{argv[0]}: no end after 10 s"
            return None
        self._last_failure = f"{argv[0]}: {done.stderr.strip()}" if done.returncode else ""
        return None if done.returncode else done.stdout

    def _all_nodes_idle(self) -> bool:
        states = self._output("sinfo", "-h", "-N", "-p", "low", "-o", "%t")
        return states is not None and states.split() == ["idle"] * self.num_nodes

    def _poll(self, what: str, condition: Callable[[], T], timeout: float, pause: float = 0.1) -> T:
        """The condition's first true value; an error with the logs when the time is over."""
        deadline = time.monotonic() + timeout
        while True:
            if value := condition():
                return value
            if time.monotonic() > deadline:
                said = f"\n{self._last_failure}" if self._last_failure else ""
                raise self._error(f"waited {timeout} s in vain for {what}{said}")
            time.sleep(pause)


@contextmanager
def temporary_cluster(**options: Any) -> Iterator[SlurmCluster]:
    """A running cluster in a folder of its own; both are gone afterwards."""
    # Not below TMPDIR, which may be too long for a unix socket's name.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    try:
        with SlurmCluster(folder, **options) as cluster:
            yield cluster
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> None:
    """Start or stop a cluster in a folder, for use by hand."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("action", choices=["up", "down"])
    parser.add_argument("folder", type=Path, help="short, such as a new folder in your home")
    parser.add_argument("--nodes", type=int, default=4)
    parser.add_argument("--cpus", type=int, default=8)
    parser.add_argument("--gpus", type=int, default=4)
    parser.add_argument("--no-accounting", action="store_true")
    parser.add_argument("--preempt-mode", choices=["REQUEUE", "CANCEL"], default="REQUEUE")
    args = parser.parse_args()
    cluster = SlurmCluster(
        args.folder,
        num_nodes=args.nodes,
        cpus=args.cpus,
        gpus=args.gpus,
        with_accounting=not args.no_accounting,
        preempt_mode=args.preempt_mode,
    )
    try:
        if args.action == "down":
            cluster.stop()
            return
        cluster.start()
    except ClusterError as error:
        sys.exit(str(error))
    print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}")


if __name__ == "__main__":
    main()
