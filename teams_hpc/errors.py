"""Every error this package raises on purpose.

    TeamsError                what a user can act on; the command line prints it in one piece
    ├── UsageError            wrong command, option or path                              exit 2
    │   ├── ConfigError       the configuration is wrong, all faults in one message      exit 2
    │   ├── SeedError         the seed file is wrong                                     exit 2
    │   ├── ClusterError      Slurm isn't there, or refused                              exit 2
    │   ├── RunInUseError     another live process holds the run                         exit 2
    │   └── InputChangedError the run was made with other inputs (names them)            exit 2
    ├── WorkError             the work itself failed                                     exit 1
    │   ├── EngineError       an LLM engine could not load or answer                     exit 1
    │   ├── CorruptFileError  a file of ours does not hold what its checksum says        exit 1
    │   └── BudgetError       stopped cleanly at the budget                              exit 1
    └── StopRequested         stopped on request at a safe point, to be continued        exit 144

A message says what is wrong, where (dotted key, path, line), and what would be right.
"""


class TeamsError(Exception):
    """Base of all errors a user can act on; `exit_code` is what the command line returns."""

    exit_code = 1


class UsageError(TeamsError):
    """The command was used wrongly; nothing has been started or written."""

    exit_code = 2


class ConfigError(UsageError):
    """The configuration is invalid; the message lists every fault with its dotted key."""


class SeedError(UsageError):
    """The seed file can't be used; the message names file and line."""


class ClusterError(UsageError):
    """Slurm can't be reached or refused what it was asked for; the message has its words."""


class RunInUseError(UsageError):
    """A live process already works on this run directory."""


class InputChangedError(UsageError):
    """A stage was started with inputs other than today's; the message names what changed."""


class WorkError(TeamsError):
    """A stage started and failed; what it had made durable stays."""


class EngineError(WorkError):
    """A model could not be loaded or did not answer."""


class CorruptFileError(WorkError):
    """A file of the run does not match its checksum or schema."""


class BudgetError(WorkError):
    """The budget is used up; raising it and running again continues."""


class StopRequested(TeamsError):
    """Work stopped at a safe point because it was asked to; running again continues."""

    exit_code = 144
