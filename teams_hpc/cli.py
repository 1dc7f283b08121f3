"""The `teams-hpc` command: parses words, calls the package, prints what it says. No logic here.

Heavy imports stand inside the commands, so that `--help` answers at once on a login node.
"""

import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from teams_hpc.errors import TeamsError, UsageError

app = typer.Typer(
    name="teams-hpc",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Make instruction-tuning data with reinforcement learning, and fine-tune on it.\n\n"
    "A run is one YAML file and one folder. The same command starts and resumes it.\n\n"
    "[bold]teams-hpc run configs/quickstart.yaml[/]   the whole pipeline, here, now\n\n"
    "[bold]teams-hpc status runs/quickstart[/]   where it stands",
    epilog="Exit codes: 0 done; 1 the work failed or stopped at its budget; 2 wrong use or bad "
    "configuration; 144 stopped on request, to be continued.",
)
config_app = typer.Typer(no_args_is_help=True, help="Show a resolved configuration, or its schema.")
app.add_typer(config_app, name="config")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file; see configs/")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="For instance seeds.limit=20 expert.kind=http"),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN_DIR", help="For instance runs/quickstart")]


def _print_version(wanted: bool) -> None:
    if wanted:
        from teams_hpc import __version__

        print(f"teams-hpc {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Options that come before any command."""
    os.umask(0o077)


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    rerun_from: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="Set this stage and later ones aside; make them again."),
    ] = None,
) -> None:
    """Run the whole pipeline here, now. The same command resumes a run that was stopped.

    Every stage that is done is passed over. Ctrl-C stops at a safe point.
    """
    from rich.console import Console

    from teams_hpc.config import load_config
    from teams_hpc.pipeline.local import run_pipeline
    from teams_hpc.report.live import LiveDisplay
    from teams_hpc.report.status import closing_lines
    from teams_hpc.runtime.preemption import StopFlag
    from teams_hpc.storage.run_dir import RunDir

    loaded = load_config(config, overrides or ())
    stop = StopFlag()
    stop.install()
    display = LiveDisplay(RunDir(loaded.resolved_run_dir), Console(highlight=False))
    try:
        run_dir = run_pipeline(loaded, observer=display, stop=stop, rerun_from=rerun_from)
    finally:
        display.close()
    for line in closing_lines(run_dir, loaded):
        print(line)


@app.command()
def submit(
    config: ConfigFile,
    overrides: Overrides = None,
    rerun_from: Annotated[
        str | None,
        typer.Option(metavar="STAGE", help="Set this stage and later ones aside; make them again."),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print room needed, scripts, DeepSpeed's JSON; submit nothing."
        ),
    ] = False,
) -> None:
    """Submit the whole pipeline to Slurm: arrays, jobs and their dependencies.

    The same command again submits only what is missing: stages that are done and jobs that wait or
    work are left alone. Afterwards: `status`, `logs`, `cancel`.
    """
    from teams_hpc.config import load_config
    from teams_hpc.pipeline.submit import submission_scripts, submit_pipeline

    loaded = load_config(config, overrides or ())
    if dry_run:
        for text in submission_scripts(loaded, run_stage_job):
            print(text)
        return
    for line in submit_pipeline(loaded, run_stage_job, rerun_from=rerun_from):
        print(line)


@app.command()
def forecast(
    config: ConfigFile,
    overrides: Overrides = None,
    earlier: Annotated[
        Path | None,
        typer.Option("--from", metavar="RUN_DIR", help="Expect shares, tokens and rates of a run."),
    ] = None,
) -> None:
    """Show what a run will ask of its models: calls, tokens, GPU hours, dollars."""
    from teams_hpc.config import load_config
    from teams_hpc.pipeline.start import open_run
    from teams_hpc.report.call_forecast import forecast_calls, forecast_lines

    loaded = load_config(config, overrides or ())
    for line in forecast_lines(forecast_calls(loaded, open_run(earlier) if earlier else None)):
        print(line)


@app.command(hidden=True)
def job(
    name: Annotated[str, typer.Argument(metavar="STAGE")],
    config: ConfigFile,
    overrides: Overrides = None,
    submitted: Annotated[str, typer.Option(metavar="JOB", help="Keep this job's record.")] = "",
) -> None:
    """What slurm/submit.sh asks: the environment and the options of one stage's job."""
    from teams_hpc.config import load_config
    from teams_hpc.pipeline.submit import adopt_job, prepare_job

    loaded = load_config(config, overrides or ())
    if submitted:
        print(adopt_job(loaded, name, submitted))
        return
    for word in prepare_job(loaded, name):
        print(word, end="\0")


@app.command(hidden=True)
def resubmit(
    run_dir: RunFolder,
    job: Annotated[str, typer.Argument(metavar="JOB", help="123 or 123_4")],
) -> None:
    """Let another job go on with the work of one that may not be requeued (slurm/requeue.sh)."""
    from teams_hpc.pipeline.submit import resubmit_job

    print(resubmit_job(run_dir, job, run_stage_job))


@app.command()
def stage(
    name: Annotated[str, typer.Argument(metavar="STAGE", help="policy, select, generate, ...")],
    run_dir: RunFolder,
    index: Annotated[
        int, typer.Option(min=0, help="Which policy member, or which array task of generation.")
    ] = 0,
) -> None:
    """Run one task of one stage in this process; what `run` and the jobs of `submit` start."""
    from teams_hpc.pipeline.task import run_task

    run_task(name, run_dir, index)


@app.command(hidden=True)
def reshape(
    run_dir: RunFolder,
    ranks: Annotated[
        int | None, typer.Option(min=1, help="Processes to come; default: site.num_sft_ranks.")
    ] = None,
) -> None:
    """Let another number of processes go on with the fine-tuning; `run` and job scripts call it."""
    from teams_hpc.pipeline.reshape import reshape_if_needed

    if (folder := reshape_if_needed(run_dir, ranks)) is not None:
        print(folder)


@app.command()
def status(
    run_dir: RunFolder,
    watch: Annotated[
        bool, typer.Option("--watch", help="Again every two seconds, until nothing is active.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Show where a run stands: stages, jobs, progress, what is left, errors, calls and budget."""
    from contextlib import suppress

    from rich.console import Console
    from rich.live import Live

    from teams_hpc.pipeline.start import open_run
    from teams_hpc.report.jobs import JobPoll
    from teams_hpc.report.status import read_status, status_json, status_table

    opened, config = open_run(run_dir)
    if as_json:
        print(status_json(read_status(opened, config)))
        return
    console = Console(highlight=False)
    if not watch:
        console.print(status_table(read_status(opened, config)))
        return
    poll = JobPoll(opened)
    with suppress(KeyboardInterrupt), Live(console=console, auto_refresh=False) as live:
        while True:
            found = read_status(opened, config, poll.read())
            live.update(status_table(found), refresh=True)
            if not found.is_active:
                return
            time.sleep(2)


@app.command()
def logs(
    run_dir: RunFolder,
    stage: Annotated[str | None, typer.Argument(metavar="[STAGE]")] = None,
    lines: Annotated[int, typer.Option(min=0, help="How many of each log's last lines.")] = 20,
) -> None:
    """Show the ends of logs: failed tasks first, then running ones; of the rest the paths."""
    from teams_hpc.pipeline.start import open_run
    from teams_hpc.report.jobs import read_jobs
    from teams_hpc.report.logs import find_logs, logs_text

    opened, config = open_run(run_dir)
    jobs = read_jobs(opened)
    if jobs.trouble:
        print(f"Slurm can't be asked: {jobs.trouble}", file=sys.stderr)
    found = find_logs(opened, config, jobs, stage)
    for line in logs_text(found, lines):
        print(line)
    if not found:
        print("no logs yet")


@app.command()
def cancel(run_dir: RunFolder) -> None:
    """Cancel the Slurm jobs of a run, and nothing else; `submit` continues it."""
    from teams_hpc.cluster.cancel import cancel_run
    from teams_hpc.pipeline.start import open_run

    opened, _ = open_run(run_dir)
    cancelled = cancel_run(opened)
    for job in cancelled:
        print(f"cancelled {job.job_id} ({job.state.lower()})")
    if not cancelled:
        print("nothing to cancel: no job of this run waits or runs")


@app.command()
def report(
    run_dir: RunFolder,
    against: Annotated[
        Path | None,
        typer.Option(
            help="run directory that differs in generate.policy alone: compare the generations"
        ),
    ] = None,
) -> None:
    """Write report/report.html again, from what there is now; one self-contained file."""
    from teams_hpc.pipeline.start import open_run
    from teams_hpc.report.html import compare_with, rewrite_report

    opened, config = open_run(run_dir)
    if against is not None:
        compare_with(opened, config, open_run(against)[0])
    print(rewrite_report(opened, config))


@app.command()
def bundle(
    config: ConfigFile,
    output: Annotated[Path, typer.Option(metavar="DIR", help="A new folder.")],
    overrides: Overrides = None,
    image: Annotated[
        Path | None, typer.Option(metavar="SIF", help="As site.container.image=SIF.")
    ] = None,
    wheels: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Packages to carry too (pip wheel).")
    ] = None,
) -> None:
    """Gather what a cluster without internet needs for a run: image or packages, models, data.

    `verify DIR` over there, or `sha256sum --check SHA256SUMS` in it, finds what was damaged.
    """
    from teams_hpc.config import load_config
    from teams_hpc.pipeline.bundle import bundle_lines, make_bundle

    words = [*(overrides or ()), *([f"site.container.image={image}"] if image else ())]
    made = make_bundle(load_config(config, words), output.absolute(), wheels=wheels)
    for line in bundle_lines(made):
        print(line)


@app.command()
def verify(run_dir: RunFolder) -> None:
    """Check checksums, balance and plan coverage; exit 1 and a list if anything is off.

    Of a bundle that was carried here: whether each file is as it was made.
    """
    from teams_hpc.pipeline.bundle import is_bundle

    if is_bundle(run_dir):  # on a login node, which may have no h5py
        from teams_hpc.report.verification import verify_carried

        verification = verify_carried(run_dir)
    else:
        from teams_hpc.pipeline.start import open_run
        from teams_hpc.report.verify import verify_run

        opened, config = open_run(run_dir)
        verification = verify_run(opened, config)
    for line in verification.checked:
        print(f"ok     {line}")
    for line in verification.faults:
        print(f"FAULT  {line}")
    if verification.faults:
        raise typer.Exit(1)


@app.command()
def export(
    run_dir: RunFolder,
    format_name: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="alpaca, chat or parquet")
    ],
    output: Annotated[
        Path | None, typer.Option(help="Default: for instance dataset/train-alpaca.json")
    ] = None,
    rows: Annotated[str, typer.Option(help="train, held_out or all")] = "train",
) -> None:
    """Write the data set in a format others read, in plan order."""
    from teams_hpc.dataset.export import export_rows
    from teams_hpc.pipeline.start import open_run

    opened, _ = open_run(run_dir)
    path, count = export_rows(opened, format_name, output, rows)
    print(f"{count} rows in {path}")


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Any file of a run directory")],
    num_rows: Annotated[int, typer.Option("--rows", min=0, help="Rows to show.")] = 3,
) -> None:
    """Show the schema, counts and a few rows of a file."""
    from rich.console import Console

    from teams_hpc.report.inspect import describe_file

    Console(highlight=False, soft_wrap=True, markup=False).print(describe_file(file, num_rows))


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Argument(metavar="[CONFIG]")] = None,
    overrides: Overrides = None,
) -> None:
    """Show what this machine has and lacks, in general or for one configuration."""
    from rich.console import Console

    from teams_hpc.config import load_config
    from teams_hpc.report.doctor import diagnose, findings_table

    loaded = load_config(config, overrides or ()) if config else None
    findings = diagnose(loaded)
    Console(highlight=False).print(findings_table(findings))
    if any(finding.is_fault for finding in findings):
        raise typer.Exit(1)


@config_app.command("show")
def config_show(config: ConfigFile, overrides: Overrides = None) -> None:
    """Print the resolved configuration: defaults, site files, file and overrides, as one YAML."""
    from teams_hpc.config import dump_yaml, load_config

    print(dump_yaml(load_config(config, overrides or ())), end="")


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON Schema of a configuration file, with every key explained."""
    import json

    from teams_hpc.config import Config

    print(json.dumps(Config.model_json_schema(), indent=1))


def run_stage_job(name: str, run_dir: str, index: str) -> None:
    """What each process of a submitted job runs: `teams-hpc stage`, word for word. Never returns.

    submitit has bound signals by now; from here on they are ours.
    """
    from teams_hpc.runtime.preemption import hold_stop_signals

    hold_stop_signals()
    main(("stage", name, run_dir, "--index", index))


def main(words: Sequence[str] | None = None) -> None:
    """Entry point: run a command, turn errors into one message and an exit code.

    Args:
        words: What was typed after the command's name; None: as this process got it.
    """
    code = 0
    try:
        # Asked not to exit, click returns the code of a `typer.Exit` instead of raising it.
        code = app(words, standalone_mode=False) or 0
    except typer.Exit as exit_request:
        code = exit_request.exit_code
    except TeamsError as error:
        _print_error(error)
        code = error.exit_code
    except OSError as error:
        code = _print_os_error(error)
    except Exception as error:
        if not hasattr(error, "format_message"):  # not one of the command line's own
            raise
        print(f"error: {error.format_message()}", file=sys.stderr)
        code = UsageError.exit_code
    sys.stdout.flush()
    sys.stderr.flush()
    # Libraries' exit handlers have been seen to abort a process whose work was done (DeepSpeed).
    logging.shutdown()
    os._exit(code)


def _print_error(error: TeamsError) -> None:
    word = "stopped" if error.exit_code == 144 else "error"
    print(f"{word}: {error}", file=sys.stderr)


def _print_os_error(error: OSError) -> int:
    """A full disk, a missing right: name the file, say what helps."""
    import errno

    remedies = {
        errno.ENOSPC: "the disk is full; free some space and run the same command again",
        errno.EDQUOT: "your quota is used up; free some space and run the same command again",
        errno.EACCES: "you may not write or read there; choose another run_dir or mend its rights",
        errno.EROFS: "that file system is read-only; choose another run_dir",
        errno.ENAMETOOLONG: "that name is longer than the file system takes; choose a shorter one",
    }
    if error.errno not in remedies:
        raise error
    print(f"error: {error.filename or error}: {remedies[error.errno]}", file=sys.stderr)
    return 1 if error.errno in (errno.ENOSPC, errno.EDQUOT) else 2
