"""Does this image hold what it should? Run it inside:  python3 /opt/teams-hpc/selftest.py

Versions against what the project asks for, two ranks that MPI joins, a few ZeRO-3 steps, and that
none of this compiled anything. One line each on standard output; exit code 1 at the first fault.
"""

import os
import re
import subprocess
import sys
import tempfile
from importlib import import_module, metadata
from pathlib import Path

from packaging.requirements import Requirement

IMPORTS = ("torch", "transformers", "deepspeed", "h5py", "mpi4py", "submitit", "teams_hpc.cli")
OPTIONAL = ("flash_attn", "liger_kernel", "lm_eval")
OF_LAUNCHERS = ("SLURM_", "PMI_", "PMIX_", "OMPI_COMM", "PRTE_")
HELLO = (
    "from mpi4py import MPI; world = MPI.COMM_WORLD; "
    "print(f'[{world.size} {world.allreduce(world.rank + 1)}]', flush=True)"
)


def say(what: str, found: object) -> None:
    """One line."""
    sys.stdout.write(f"{what}: {found}\n")
    sys.stdout.flush()


def check_versions() -> None:
    """What is installed fits what the project asks for, and all of `compute` is there."""
    for line in metadata.requires("teams-hpc") or ():
        requirement = Requirement(line)
        is_needed = requirement.marker is None or requirement.marker.evaluate({"extra": "compute"})
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            if is_needed:
                raise
            continue
        if is_needed and not requirement.specifier.contains(found, prereleases=True):
            raise SystemExit(
                f"{requirement.name} {found} is installed, the project asks for {line}"
            )
    say("versions", " ".join(f"{name}={_version(name)}" for name in ("teams-hpc", *IMPORTS[:5])))


def _version(name: str) -> str:
    return metadata.version(name.replace("_", "-"))


def check_imports() -> None:
    """Everything a stage imports, and what of the optional is there."""
    for name in IMPORTS:
        import_module(name)
    present = [name for name in OPTIONAL if _is_installed(name)]
    for name in present:
        import_module(name)
    say("imports", " ".join((*IMPORTS, *present)))


def _is_installed(name: str) -> bool:
    try:
        _version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def check_mpi() -> None:
    """Two processes that mpirun starts are one world, and can add."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(OF_LAUNCHERS)}
    environment |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    command = ("mpirun", "--oversubscribe", "--host", "localhost:2", "-n", "2")
    done = subprocess.run(
        (*command, sys.executable, "-c", HELLO),
        env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    # mpirun may put a line between another one and its end.
    if done.returncode or re.findall(r"\[.*?\]", done.stdout) != ["[2 3]", "[2 3]"]:
        raise SystemExit(f"mpirun -n 2: code {done.returncode}\n{done.stdout}{done.stderr}")
    library = import_module("mpi4py.MPI").Get_library_version().split(",")[0]
    say("mpi", f"2 ranks in one world, {library}")


def check_zero3() -> None:
    """A loss falls under ZeRO-3, set up as fine-tuning sets it up, and no operator is compiled."""
    import torch

    from teams_hpc.config import Config
    from teams_hpc.runtime.ranks import Ranks
    from teams_hpc.sft.deepspeed_config import deepspeed_config
    from teams_hpc.sft.world import find_device, joined_world

    sft = {"dtype": "float32", "global_batch_rows": 4, "micro_batch_rows": 4}
    config = Config.model_validate({"name": "selftest", "sft": sft})
    device = find_device()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCH_EXTENSIONS_DIR"] = folder
        with joined_world(Ranks(), device):
            import deepspeed

            torch.manual_seed(1)
            model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 1))
            engine, *_ = deepspeed.initialize(
                model=model,
                optimizer=torch.optim.AdamW(model.parameters(), lr=0.05),
                config=deepspeed_config(config, 1, device),
            )
            inputs, losses = torch.ones(4, 8, device=device), []
            for _ in range(5):
                loss = (engine(inputs) - 3.0).square().mean()
                engine.backward(loss)
                engine.step()
                losses.append(loss.item())
        if not losses[-1] < losses[0]:
            raise SystemExit(f"ZeRO-3: the loss doesn't fall: {losses}")
        if compiled := [str(path) for path in Path(folder).rglob("*")]:
            raise SystemExit(f"ZeRO-3: something was compiled: {compiled}")
    say("zero-3", f"on {device}, loss {losses[0]:.3f} to {losses[-1]:.3f}, nothing compiled")


def main() -> None:
    """All checks."""
    for check in (check_versions, check_imports, check_mpi, check_zero3):
        check()
    say("selftest", "passed")
    os._exit(0)  # DeepSpeed's exit handlers have been seen to abort


if __name__ == "__main__":
    main()
