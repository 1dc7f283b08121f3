"""Failed rows made again: only their chains, from what had come back, whatever is killed when."""

import json
import shutil
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from integration.test_generation import columns, leftovers, make_run, run, spent, usage_of

from teams_hpc.cluster import records
from teams_hpc.cluster.records import JobRecord, write_record
from teams_hpc.cluster.slurm import JobState
from teams_hpc.config import load_resolved
from teams_hpc.config.digest import stage_inputs
from teams_hpc.errors import BudgetError, EngineError, UsageError
from teams_hpc.generation import outcome, retry, worker
from teams_hpc.generation.outcome import check_balance
from teams_hpc.generation.published import PublishedUnits
from teams_hpc.generation.worker import generate
from teams_hpc.llm.base import Completion
from teams_hpc.llm.template_engine import TemplateEngine
from teams_hpc.pipeline import submit
from teams_hpc.pipeline.retry import begin_retry
from teams_hpc.rewriting.reviewer import Reviewer
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.storage.retry_folder import close_retry_folder
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import ROW_COLUMNS, Status, Table

NAMES = tuple(column.name for column in ROW_COLUMNS)
AGAIN = {"retry_failed": True}


class Fault:
    """Lets some of the expert's replies and of the reviewer's verdicts be errors, by their id."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.share = 0
        self.asked: list[str] = []
        complete, score = TemplateEngine._complete, Reviewer._score

        def completing(engine: TemplateEngine, request: Any) -> Completion:
            self.asked.append(request.id)
            if not self._hits(request.id):
                return complete(engine, request)
            return Completion(
                id=request.id,
                text="",
                finish_reason="error",
                prompt_tokens=0,
                completion_tokens=0,
                error="no GPU",
            )

        def judging(reviewer: Reviewer, pairs: Any) -> Any:
            self.asked += [pair.request_id for pair in pairs]
            found = score(reviewer, pairs)
            hit = [self._hits(pair.request_id) for pair in pairs]
            no = [type(one)(p_not_equal=0.0, is_parsed=False, error="no GPU") for one in found]
            return [bad if h else one for one, bad, h in zip(found, no, hit, strict=True)]

        monkeypatch.setattr(TemplateEngine, "_complete", completing)
        monkeypatch.setattr(Reviewer, "_score", judging)

    def _hits(self, key: str) -> bool:
        record, purpose, _ = key.split("/")
        at = {"rewrite": 0, "verdict": 2, "answer": 4}[purpose]
        return int(record[at : at + 2], 16) < self.share

    def make(self, root: Path, share: int = 0, **changes: Any) -> dict[str, Any]:
        """Generate, with this share (of 256) of each kind of call failing."""
        self.share, self.asked = share, []
        run_dir = make_run(root, **changes)
        generate(run_dir, load_resolved(run_dir.config), 0, StopFlag())
        manifest = read_manifest(run_dir, "generate")
        assert manifest is not None
        return manifest


@pytest.fixture
def fault(monkeypatch: pytest.MonkeyPatch) -> Fault:
    return Fault(monkeypatch)


def begin(run_dir: RunDir) -> bool:
    return begin_retry(run_dir, load_resolved(run_dir.config))


def rows(run_dir: RunDir, names: Sequence[str] = NAMES) -> list[tuple[str, ...]]:
    return [tuple(map(repr, row)) for row in columns(run_dir, *names)]


def failed_rows(run_dir: RunDir, unit: int) -> int:
    with Table.open(run_dir.shard(unit)) as table:
        return int(table.attrs["counts"]["failed"])


@pytest.mark.parametrize("answer", ["every", "last"])
def test_a_retry_ends_with_the_rows_of_a_run_without_failures(
    tmp_path: Path, fault: Fault, answer: str
) -> None:
    settings, names = {"generate": {"answer": answer}}, NAMES
    quiet = fault.make(tmp_path / "quiet", **settings)
    whole = len(fault.asked)
    run_dir = RunDir(tmp_path / "failed")
    failed = fault.make(run_dir.root, share=24, **settings)
    first = list(fault.asked)
    assert failed["counts"]["failed"] > 10
    assert failed["units"] != quiet["units"]
    first_failures_and_after = set(_from_the_first_failure(run_dir, first))
    make_run(run_dir.root, generate={**settings["generate"], **AGAIN})
    assert begin(run_dir)
    assert read_manifest(run_dir, "generate") is None
    assert spent(run_dir) == usage_of(failed)["expert", "calls"]
    again = fault.make(run_dir.root, generate={**settings["generate"], **AGAIN})
    # Only what had failed or followed from it is asked, and both attempts are counted.
    assert len(fault.asked) < whole / 2
    assert not (set(first) - first_failures_and_after) & set(fault.asked)
    if answer == "every":
        assert {**again, "usage": 0} == {**quiet, "usage": 0}
    else:  # an answer to a row that is not the last any more is gone, its tokens stay
        assert again["counts"] == quiet["counts"]
        names = tuple(name for name in names if not name.endswith("_tokens"))
    calls = {role: usage_of(again)[role, "calls"] for role in ("expert", "reviewer")}
    assert sum(calls.values()) == len(first) + len(fault.asked)
    assert rows(run_dir, names) == rows(RunDir(tmp_path / "quiet"), names)
    assert leftovers(run_dir) == []
    assert not run_dir.retry.exists()
    before = json.loads((run_dir.generate / "before_retry.json").read_text())
    assert before == failed


def _from_the_first_failure(run_dir: RunDir, asked: list[str]) -> Iterator[str]:
    """Of the calls made: those from a chain's first failed one on, and any answer of a last row."""
    found = list(columns(run_dir, "record_id", "status"))
    for at in range(0, len(found), 3):
        statuses = [status for _, status in found[at : at + 3]]
        if Status.FAILED not in statuses:
            continue
        step = statuses.index(Status.FAILED)
        failed = [key for key in asked if key.startswith(found[at + step][0])]
        yield failed[-1]  # what came back before it is kept
        later = {record for record, _ in found[at + step + 1 : at + 3]}
        yield from (key for key in asked if key.partition("/")[0] in later)
        yield from (key for key in asked if key.startswith(found[at][0]) and "answer" in key)


def test_rows_of_other_chains_stay_and_what_fails_again_can_be_retried(
    tmp_path: Path, fault: Fault
) -> None:
    run_dir = RunDir(tmp_path)
    fault.make(run_dir.root, share=24)
    before = rows(run_dir)
    make_run(run_dir.root, generate=AGAIN)
    assert begin(run_dir)
    again = fault.make(run_dir.root, share=12, generate=AGAIN)
    after = rows(run_dir)
    status = NAMES.index("status")
    failed = repr(int(Status.FAILED))
    assert len(before) == len(after) == 60 * 3
    for at in range(0, len(before), 3):
        if not any(row[status] == failed for row in before[at : at + 3]):
            assert before[at : at + 3] == after[at : at + 3]
    check_balance(again["counts"], "a retry")
    assert again["counts"]["failed"] > 0
    # The stages after it are not done, so the run goes on before it tries once more.
    assert not begin(run_dir)


def test_a_unit_with_rows_from_before_is_as_exact_as_they_are(
    tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(TemplateEngine, "exactness", property(lambda _: "statistical"))
        fault.make(run_dir.root, share=48)
    assert all(failed_rows(run_dir, unit) for unit in range(12))
    make_run(run_dir.root, generate=AGAIN)
    assert begin(run_dir)
    again = fault.make(run_dir.root, generate=AGAIN)
    assert again["counts"]["failed"] == 0
    assert again["exactness"] == "statistical"
    for path in run_dir.shards.iterdir():
        with Table.open(path) as table:
            assert {one["exactness"] for one in table.attrs["engines"].values()} == {"statistical"}


def test_nothing_happens_where_nothing_failed_or_nobody_asked(tmp_path: Path, fault: Fault) -> None:
    quiet = make_run(tmp_path / "quiet", generate=AGAIN)
    manifest = fault.make(quiet.root, generate=AGAIN)
    assert not begin(quiet)
    assert read_manifest(quiet, "generate") == manifest
    failed = RunDir(tmp_path / "failed")
    fault.make(failed.root, share=24)
    assert not begin(failed)
    assert failed.manifest("generate").exists()
    configs = [load_resolved(run_dir.config) for run_dir in (quiet, failed)]
    assert stage_inputs(configs[0], "generate") == stage_inputs(configs[1], "generate")


class Killed(BaseException):
    pass


def test_killed_at_any_moment_each_unit_is_the_old_or_the_new_one(
    tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = fault.make(tmp_path / "quiet")
    failed = fault.make(tmp_path / "failed", share=24)
    real_link = retry.os.link
    for moment in ("first", "middle", "swap", "manifest", "close"):
        run_dir = RunDir(tmp_path / moment)
        shutil.copytree(tmp_path / "failed", run_dir.root)
        make_run(run_dir.root, generate=AGAIN)
        assert begin(run_dir)
        left = [{"first": 1, "middle": 3, "swap": 20}.get(moment, 10**9)]

        def link(source: Path, target: Path, left: list[int] = left) -> None:
            left[0] -= 1
            if left[0] <= 0:
                raise Killed
            real_link(source, target)

        def killed(*_: Any) -> None:
            raise Killed

        with monkeypatch.context() as patch:
            if moment == "manifest":
                patch.setattr(outcome, "write_manifest", killed)
            elif moment == "close":
                patch.setattr(worker, "close_retry_folder", killed)
            else:
                patch.setattr("os.link", link)
            with pytest.raises(Killed):
                fault.make(run_dir.root, generate=AGAIN)
        for number in range(12):
            with Table.open(run_dir.shard(number)) as table:
                name = run_dir.shard(number).name
                assert table.attrs["sha256"] in (failed["units"][name], quiet["units"][name])
        assert spent(run_dir) >= usage_of(failed)["expert", "calls"]
        manifest = fault.make(run_dir.root, generate=AGAIN)
        assert {**manifest, "usage": 0} == {**quiet, "usage": 0}, moment
        assert not begin(run_dir)
        if moment == "close":  # what it had left behind is cleared by the next one
            close_retry_folder(run_dir)
        assert not run_dir.retry.exists()


def test_an_expert_that_is_still_down_ends_the_retry_before_anything_is_published(
    tmp_path: Path, fault: Fault
) -> None:
    units = {"unit_size": 20}
    quiet = fault.make(tmp_path / "quiet", generate=units)
    run_dir = RunDir(tmp_path / "failed")
    fault.make(run_dir.root, share=100, generate=units)
    make_run(run_dir.root, generate={**units, **AGAIN})
    assert begin(run_dir)
    with pytest.raises(EngineError, match=r"the expert answered nothing in unit 0.*no GPU"):
        fault.make(run_dir.root, share=256, generate={**units, **AGAIN})
    assert list(run_dir.retry.glob("*.h5")) == []
    shutil.copytree(run_dir.root, tmp_path / "unwanted")
    again = fault.make(run_dir.root, generate={**units, **AGAIN})
    assert {**again, "usage": 0} == {**quiet, "usage": 0}
    # What can't but fail must not keep the run from going on.
    unwanted = fault.make(tmp_path / "unwanted", share=256, generate=units)
    assert unwanted["counts"]["failed"] > 0


def test_the_budget_holds_over_both_attempts(tmp_path: Path, fault: Fault) -> None:
    run_dir = RunDir(tmp_path)
    failed = fault.make(run_dir.root, share=24)
    used = usage_of(failed)["expert", "calls"]
    few = {"generate": AGAIN, "budget": {"max_expert_calls": used + 15}}
    make_run(run_dir.root, **few)
    assert begin(run_dir)
    with pytest.raises(BudgetError, match="stopped at the budget"):
        fault.make(run_dir.root, **few)
    assert used < spent(run_dir) <= used + 15
    enough = {"generate": AGAIN, "budget": {"max_expert_calls": 10_000}}
    assert fault.make(run_dir.root, **enough)["counts"]["failed"] == 0


def test_late_calls_of_no_unit_are_not_forgotten(tmp_path: Path, fault: Fault) -> None:
    run_dir = RunDir(tmp_path)
    manifest = fault.make(run_dir.root, share=24)
    for row in manifest["usage"]:
        if row["role"] == "expert":
            row["calls"] += 7
    run_dir.manifest("generate").write_text(json.dumps(manifest))
    make_run(run_dir.root, generate=AGAIN)
    assert begin(run_dir)
    before = usage_of(manifest)["expert", "calls"]
    again = fault.make(run_dir.root, generate=AGAIN)
    asked = sum("verdict" not in key for key in fault.asked)
    assert usage_of(again)["expert", "calls"] == before + asked


def test_several_processes_share_a_retry(tmp_path: Path) -> None:
    quiet = run(make_run(tmp_path / "quiet"))
    run_dir = make_run(tmp_path / "failed", site={"num_workers": 3})
    failed = run(run_dir, 3, fails="30")
    assert failed["counts"]["failed"] > 10
    make_run(run_dir.root, generate=AGAIN, site={"num_workers": 3})
    assert begin(run_dir)
    again = run(run_dir, 3, delay_s=0.01)
    assert again["counts"]["attempted"] == quiet["counts"]["attempted"]
    assert again["counts"]["failed"] == 0
    assert {**again, "usage": 0} == {**quiet, "usage": 0}
    assert leftovers(run_dir) == []


def test_one_worker_alone_plans_a_retry(
    tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)
    fault.make(run_dir.root, share=24)
    config = load_resolved(make_run(run_dir.root, generate=AGAIN).config)
    assert begin(run_dir)
    real_plan, plans, late = retry._plan_retry, [], []

    def plan_slowly(*args: Any) -> Any:
        """Meanwhile another worker comes: with a plan of its own it would be far ahead."""
        plans.append(real_plan(*args))
        if len(plans) == 1:
            late.append(threading.Thread(target=generate, args=(run_dir, config, 1, StopFlag())))
            late[0].start()
            late[0].join(2.0)
            real_plan(*args)  # what has been read so far is still what there is
        return plans[-1]

    monkeypatch.setattr(retry, "_plan_retry", plan_slowly)
    assert fault.make(run_dir.root, generate=AGAIN)["counts"]["failed"] == 0
    late[0].join(20.0)
    assert len(plans) == 1
    assert not run_dir.retry.exists()
    assert leftovers(run_dir) == []


def test_a_unit_written_after_the_retry_has_ended_does_not_count(
    tmp_path: Path, fault: Fault
) -> None:
    """By a process that slept: nothing is lost, since the rows are those of the manifest."""
    run_dir = RunDir(tmp_path)
    fault.make(run_dir.root, share=24)
    unit = next(number for number in range(12) if failed_rows(run_dir, number))
    before = run_dir.shard(unit).read_bytes()
    make_run(run_dir.root, generate=AGAIN)
    assert begin(run_dir)
    again = fault.make(run_dir.root, generate=AGAIN)
    run_dir.retry.mkdir()
    run_dir.retried_shard(unit).write_bytes(before)
    name = run_dir.shard(unit).name
    assert PublishedUnits(run_dir).attrs([unit])[unit]["sha256"] == again["units"][name]


def test_a_submission_waits_for_jobs_that_read_what_would_be_made_again(
    tmp_path: Path, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = RunDir(tmp_path)
    fault.make(run_dir.root, share=24)
    config = load_resolved(make_run(run_dir.root, generate=AGAIN).config)
    for number, stage in enumerate(("generate", "dataset", "sft"), start=1):
        record = JobRecord(
            job_id=str(number), stage=stage, indices=(0,), is_array=False, submitted=number
        )
        write_record(run_dir, record)
    states = {"1": "COMPLETED", "2": "RUNNING"}
    jobs = {job: JobState(job_id=job, state=state) for job, state in states.items()}
    monkeypatch.setattr(records, "queued_jobs", lambda: jobs)
    with pytest.raises(UsageError, match=r"generate and what follows .* \(2\)"):
        submit._refuse_to_move_work(config, run_dir, None)
    del jobs["2"]
    submit._refuse_to_move_work(config, run_dir, None)
