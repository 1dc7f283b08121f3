"""The stage `generate`: workers share the units of the plan until all are published."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from teams_hpc.config import Config
from teams_hpc.errors import BudgetError, EngineError
from teams_hpc.generation.budget import Budget
from teams_hpc.generation.calls import Calls, ClaimLost, fixed_batch_size
from teams_hpc.generation.equipment import Equipment
from teams_hpc.generation.evolve import Chain, Row, Steering
from teams_hpc.generation.outcome import Counts, publish_unit, write_outcome
from teams_hpc.generation.plan import Plan, settle_plan
from teams_hpc.generation.published import (
    PublishedLines,
    clear_lines,
    is_published,
    published_units,
)
from teams_hpc.generation.publisher import Publisher
from teams_hpc.generation.queue import Claim, Outlook, UnitQueue
from teams_hpc.generation.retry import (
    Retry,
    chains_to_retry,
    replace_units,
    settle_retry,
    usage_before,
)
from teams_hpc.generation.unit import UnitRunner
from teams_hpc.generation.unit_log import UnitLog
from teams_hpc.llm.ledger import Ledger
from teams_hpc.rewriting.reviewer import Reviewer
from teams_hpc.runtime.garbage import seldom_collected
from teams_hpc.runtime.metrics import Progress
from teams_hpc.runtime.preemption import StopFlag
from teams_hpc.runtime.ranks import read_ranks
from teams_hpc.runtime.step import Step, joined_step
from teams_hpc.storage.atomic import (
    fsync_folder,
    naming_disk_faults,
    read_json,
    remove_leftovers,
)
from teams_hpc.storage.journal import journal_paths
from teams_hpc.storage.lease import Lease
from teams_hpc.storage.retry_folder import close_retry_folder
from teams_hpc.storage.run_dir import RunDir, read_manifest
from teams_hpc.storage.shards import Finish

_log = logging.getLogger(__name__)
_POLL_S = 0.2
_SHOW_EVERY_S = 0.5
_ENGINE_IS_DOWN_CALLS = 16
"""So many calls without one reply, when none ever came, mean that the engine is down."""


def generate(run_dir: RunDir, config: Config, index: int, stop: StopFlag) -> None:
    """Work on units until all are published, by whichever worker.

    Processes that MPI has joined share the blocks their step claims; any others are steps of one.

    Args:
        run_dir: The run.
        config: Its configuration.
        index: Number of this worker; workers start at different units.
        stop: Looked at between batches of calls.

    Raises:
        BudgetError: No unit fits into `budget.max_expert_calls` any more.
        WorkError: The expert answered nothing, no row was kept, or the disk is full.
        StopRequested: Asked to stop; all that was received is durable.
    """
    needs_mpi = config.site.slurm.mpi not in (None, "none") and "SLURM_STEP_ID" in os.environ
    joined = joined_step(read_ranks(), needs_mpi=needs_mpi)
    with joined as step, naming_disk_faults(run_dir.generate), seldom_collected():
        # Looked at after joining: who is in waits for all the others of the step.
        if read_manifest(run_dir, "generate") is not None:
            return
        stop.others = step.is_asked_to_stop
        plan = settle_plan(run_dir, config)
        retry = settle_retry(run_dir, plan, config.site.lease_s, stop)
        worker = _Worker(run_dir, config, plan, retry, step, stop)
        num_workers = config.site.num_workers * config.site.ranks_per_worker
        try:
            worker.work(first=index * plan.num_units // num_workers % plan.num_units)
        finally:
            worker.close()
        worker.finish()


def _check_claim(log: UnitLog, claim: Claim) -> None:
    """Raises `ClaimLost` once the unit is another's."""
    if not (log.is_there and claim.is_held()):
        raise ClaimLost


@dataclass(slots=True)
class _Worker:
    run_dir: RunDir
    config: Config
    plan: Plan
    retry: Retry | None
    step: Step
    stop: StopFlag
    _equipment: Equipment | None = None
    _queue: UnitQueue | None = None
    _publisher: Publisher = field(default_factory=Publisher)
    _has_success: bool = False
    _shown: float = float("-inf")
    _lines: PublishedLines = field(init=False)
    _budget: Budget = field(init=False)
    _progress: Progress = field(init=False)
    _digest: str = field(init=False)

    def __post_init__(self) -> None:
        site = self.config.site
        self._lines = PublishedLines(self.run_dir)
        self._budget = Budget(self.run_dir, self.config.budget.max_expert_calls, site.lease_s)
        # All workers count the rows of the whole stage, so one file speaks for all.
        self._progress = Progress(self.run_dir.progress("generate"), unit="rows")
        self._digest = read_json(self.run_dir.inputs("generate"))["digest"]

    def work(self, first: int) -> None:
        """Take units, starting at `first`, until all are published."""
        for folder in (self.run_dir.journal, self.run_dir.shards):
            folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(self.run_dir.generate)  # else a lost node could take `journal` along
        self._queue = UnitQueue(
            step=self.step,
            num_units=self.plan.num_units,
            first=first,
            leases=self.run_dir.leases,
            lease_s=self.config.site.lease_s,
            published=lambda: published_units(self.run_dir),
            is_published=lambda unit: is_published(self.run_dir, unit),
            fits=self._may_fit,
        )
        was_published = False
        while (
            found := self._queue.take(self._check_stop, looks_anew=was_published)
        ) is not Outlook.DONE:
            self._check_stop()
            if isinstance(found, Claim):
                was_published = False
                self._run_claimed(found)
                continue
            was_published = self._await_publishing()  # which may have been all that was missing
            if was_published:
                continue
            if found is Outlook.TOO_DEAR and not self._budget.has_released:
                raise self._budget_error()
            # Who is still at work may give back what it reserved.
            self._budget.room, self._budget.has_released = None, False
            time.sleep(_POLL_S)

    def _may_fit(self, unit: int) -> bool:
        """Whether a unit may fit into the budget, after what the last refusal said."""
        room = self._budget.room
        return room is None or not self._is_untouched(unit) or self._worst_case(unit) <= room

    def _open_units(self) -> list[int]:
        published = published_units(self.run_dir)
        return [unit for unit in range(self.plan.num_units) if unit not in published]

    def _check_stop(self) -> None:
        if self.stop.is_set:
            done = len(published_units(self.run_dir))
            self.stop.raise_if_set(f"{done} of {self.plan.num_units} units")

    def _await_publishing(self) -> bool:
        """Wait until the last unit is published; False if it was already.

        Raises:
            WorkError: It could not be: the disk is full, say.
        """
        was_pending = self._publisher.wait()
        assert self._queue is not None
        self._queue.publishing = None
        return was_pending

    def _run_claimed(self, claim: Claim) -> None:
        """Run a unit, unless it doesn't fit into the budget, and begin to publish it."""
        unit = claim.unit
        if self._budget.limit is not None:
            self._await_publishing()  # what that unit doesn't need of its share may be needed here
        equipment = self._equip()
        engines = equipment.engines()
        log = UnitLog(
            self.run_dir.journal,
            unit,
            self._digest,
            {role: str(engine["content_id"]) for role, engine in engines.items()},
        )
        needed = self._worst_case(unit) - log.num_durable_expert_calls
        if not self._budget.reserve(unit, needed):
            return
        with ExitStack() as stack:
            stack.enter_context(self._ending(log, claim))
            self._begin_to_measure(log)
            rows = self._run(log, claim, equipment)
            assert self._queue is not None
            self._queue.publishing = unit
            self._publisher.begin(partial(self._publish, log, claim, rows, stack.pop_all()))

    @contextmanager
    def _ending(self, log: UnitLog, claim: Claim) -> Iterator[None]:
        """However work on a unit ends: close its journal and give back what was reserved."""
        try:
            yield
        except ClaimLost:
            _log.warning("unit %d was taken over by another process", claim.unit)
        finally:
            log.close()
            if claim.is_held():
                self._budget.give_back(claim.unit)

    def _publish(
        self, log: UnitLog, claim: Claim, rows: Sequence[Row], ending: AbstractContextManager[Any]
    ) -> None:
        """In the publisher's thread, while the next unit runs."""
        with ending:
            before = usage_before(self.run_dir, log.unit) if self.retry is not None else None
            _check_claim(log, claim)
            equipment = self._equip()
            engines = equipment.engines() | equipment.guide.engines()
            counts = publish_unit(self.run_dir, log, rows, engines, self._lines, before)
            kept = counts["kept"]
            _log.info("unit %d: %d rows, %d kept", log.unit, counts["attempted"], kept)
            if time.monotonic() - self._shown > _SHOW_EVERY_S:
                self._show_progress(counts)

    def _equip(self) -> Equipment:
        if self._equipment is None:
            self._equipment = Equipment.load(self.run_dir, self.config)
        return self._equipment

    def _is_untouched(self, unit: int) -> bool:
        return not self._budget.has_trace(unit) and not journal_paths(self.run_dir.journal, unit)

    def _worst_case(self, unit: int) -> int:
        """Expert calls the unit needs at most, none of them durable yet."""
        steps = self.plan.num_steps
        num_chains = self.plan.num_rows_of(unit) // steps
        if self.retry is not None:
            num_chains = self.retry.failed_chains[unit]
        return num_chains * (2 * steps if self.config.generate.answer == "every" else steps + 1)

    def _run(self, log: UnitLog, claim: Claim, equipment: Equipment) -> list[Row]:
        """The unit's rows; the one before is published by then."""
        chains, rows_of_chains = self._chains(log.unit, equipment.steering)
        calls = Calls(
            log=log,
            expert=equipment.expert,
            reviewer=Reviewer(equipment.reviewer, self.config.reviewer.verdict, Ledger()),
            digests=equipment.digests,
            batch_size=fixed_batch_size(self.config.expert),
            check_claim=partial(_check_claim, log, claim),
        )
        where = f"part of unit {log.unit} of {self.plan.num_units}"
        UnitRunner(chains=chains, calls=calls, stop=self.stop, what=where).run()
        rows = [row for of_chain in rows_of_chains for row in of_chain]
        self._await_publishing()
        self._refuse_dead_engine(log, rows)
        return rows

    def _chains(self, unit: int, steering: Steering) -> tuple[list[Chain], list[list[Row]]]:
        """Chains to be made, and where the rows of all chains of the unit will be."""
        if self.retry is not None:
            return chains_to_retry(self.run_dir, self.plan, unit, steering)
        chains = [Chain(key, steering) for key in self.plan.chains_of(unit)]
        return chains, [chain.rows for chain in chains]

    def _refuse_dead_engine(self, log: UnitLog, rows: list[Row]) -> None:
        """Stop early, with nothing published, if the expert has never answered anything.

        In a retry, nothing since it began; one that isn't wanted any more may end as it began.

        Raises:
            EngineError: Says what the engine said.
        """
        self._has_success |= log.has_reply
        published = published_units(self.run_dir)
        way_out = ""
        if self.retry is not None:
            if not self.config.generate.retry_failed:
                return
            published &= self.retry.failed_chains.keys()
            way_out = ", or with generate.retry_failed=false to leave failed rows as they are"
        if self._has_success or log.num_expert_calls < _ENGINE_IS_DOWN_CALLS or published:
            return
        details = (row["detail"] for row in rows if row["rewrite_finish"] == Finish.ERROR)
        raise EngineError(
            f"the expert answered nothing in unit {log.unit}, the first ({log.num_expert_calls} "
            f"calls): {next(details, '') or 'no reason given'}; set that right and run "
            f"again{way_out}"
        )

    def _begin_to_measure(self, log: UnitLog) -> None:
        """Measure the rate from the first unit on of which no call was made before.

        Engines are loaded by then. A later worker too counts from what it finds done.
        """
        if not self._progress.has_begun and not log.num_durable_expert_calls:
            self._await_publishing()  # a unit that an earlier attempt has paid for
            self._progress.begin(self._num_rows_done())

    def _num_rows_done(self) -> int:
        return sum(self.plan.num_rows_of(unit) for unit in published_units(self.run_dir))

    def _show_progress(self, counts: Counts) -> None:
        """Count the rows published by all workers; say how many of `counts` were kept."""
        self._shown = time.monotonic()
        kept = f"kept {100 * counts['kept'] / max(1, counts['attempted']):.0f} %"
        self._progress.update(self._num_rows_done(), self.plan.num_rows, kept)

    def close(self) -> None:
        """Wait for what is being published; give claims back, and free what the engines hold."""
        with ExitStack() as stack:
            if self._equipment is not None:
                stack.callback(self._equipment.close)
            if self._queue is not None:
                stack.callback(self._queue.close)
            stack.callback(self._publisher.close)

    def finish(self) -> None:
        """Write the manifest, unless another worker has; then clear away what is left over."""
        with Lease(self.run_dir.leases / "generate-finish", self.config.site.lease_s) as lease:
            while not lease.acquire():
                self._check_stop()
                time.sleep(_POLL_S)
            if read_manifest(self.run_dir, "generate") is None:
                self._clear()
                if self.retry is not None:
                    replace_units(self.run_dir, self.retry)
                counts = write_outcome(self.run_dir, self.plan, self._digest)
                self._show_progress(counts)
                # Only now: the manifest has counted what late ones among them cost.
                for path in journal_paths(self.run_dir.journal):
                    path.unlink(missing_ok=True)
                if self.retry is not None:
                    close_retry_folder(self.run_dir)
            clear_lines(self.run_dir)  # a worker may come here after its unit was counted

    def _clear(self) -> None:
        """Remove what killed processes left behind; all units are published."""
        self._budget.clear()
        leases = self.run_dir.leases
        for path in (*leases.glob("block-*"), leases / "budget", leases / "retry-plan"):
            lease = Lease(path, self.config.site.lease_s)
            if lease.acquire():  # its holder is gone
                lease.release()
        for folder in (self.run_dir.generate, self.run_dir.shards, self.run_dir.retry):
            remove_leftovers(folder)
        for name in ("block-", "budget", "retry-plan", "generate-finish"):
            for path in leases.glob(f".*{name}*.tmp"):
                path.unlink(missing_ok=True)

    def _budget_error(self) -> BudgetError:
        published = published_units(self.run_dir)
        rows = sum(self.plan.num_rows_of(unit) for unit in published)
        spent = self._budget.spent()
        rest = [self._worst_case(unit) for unit in self._open_units()]
        return BudgetError(
            f"stopped at the budget: {len(published)} of {self.plan.num_units} units ({rows} of "
            f"{self.plan.num_rows} rows) are done with {spent} expert calls, and the next may need "
            f"{min(rest, default=0)}; set budget.max_expert_calls to at least "
            f"{spent + min(rest, default=0)} (it is {self._budget.limit}; "
            f"{spent + sum(rest)} is surely enough) and run again"
        )
