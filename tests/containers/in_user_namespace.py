"""Run a command in a new user namespace in which every id stands for itself.

    python3 in_user_namespace.py COMMAND [ARGUMENT]...

Root of a machine that withholds a capability has all of them in there, as `apptainer build` needs.
`unshare` can't be told to: mapping more than one's own id needs a helper that asks /etc/subuid.
"""

import ctypes
import os
import sys
from pathlib import Path

NEW_MOUNTS, NEW_USERS = 0x00020000, 0x10000000  # CLONE_NEWNS, CLONE_NEWUSER of <sched.h>


def main(words: list[str]) -> int:
    """The command's exit code; 125 where the kernel gives no such namespace."""
    is_apart, ready = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready[1])
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.unshare(NEW_USERS | NEW_MOUNTS):
            os._exit(125)
        os.write(is_apart[1], b"!")
        if not os.read(ready[0], 1):  # its parent died before it had written the map
            os._exit(125)
        os.execvp(words[0], words)
    os.close(is_apart[1])
    if os.read(is_apart[0], 1):
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{child}/{name}").write_text("0 0 65536\n")
        os.write(ready[1], b"!")
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
