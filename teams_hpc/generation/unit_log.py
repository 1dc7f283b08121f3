"""What is durable of one unit, over all writers, and this writer's own journal."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from teams_hpc.errors import CorruptFileError
from teams_hpc.llm.base import RoleName
from teams_hpc.llm.ledger import Ledger, Usage
from teams_hpc.storage.journal import (
    Batch,
    Header,
    Journal,
    JournalWriter,
    history,
    journal_paths,
    new_writer_name,
    read_journal,
)


def journal_usage(journals: Sequence[Journal | JournalWriter]) -> Ledger:
    """All that these writers asked for, done and in doubt."""
    ledger = Ledger()
    for journal in journals:
        for (role, model), spent in journal.spent.items():
            usage = Usage(
                calls=spent.calls,
                prompt_tokens=spent.prompt_tokens,
                completion_tokens=spent.completion_tokens,
                in_doubt=spent.in_doubt,
            )
            ledger.of(cast(RoleName, role), model).add(usage)
    return ledger


@dataclass(slots=True)
class UnitLog:
    """First hands out the batches that are durable already, then writes its own.

    Args:
        folder: Where journals are.
        unit: Number of the unit.
        digest: Input digest of the stage.
        models: Content id of each role's engine.

    Raises:
        CorruptFileError: A journal is damaged, or of other inputs.
    """

    folder: Path
    unit: int
    digest: str
    models: Mapping[str, str]
    _batches: list[Batch] = field(init=False)
    _next: int = 0
    _has_reply: bool = field(init=False)
    _others: list[Path] = field(init=False)
    _writer: JournalWriter = field(init=False)

    def __post_init__(self) -> None:
        self._others = journal_paths(self.folder, self.unit)
        journals = [read_journal(path) for path in self._others]
        for journal in journals:
            if journal.header is not None and journal.header.digest != self.digest:
                raise CorruptFileError(
                    f"{journal.path} is of other inputs than today's; run again with "
                    "--rerun-from generate"
                )
        # An engine that was down answered with errors alone: ask it anew.
        self._batches, parent = history(journals, lambda found: any(map(_has_success, found)))
        self._has_reply = bool(self._batches)
        header = Header(
            unit=self.unit,
            digest=self.digest,
            models=self.models,
            parent=parent,
            base=len(self._batches),
        )
        name = f"unit-{self.unit:05d}.{new_writer_name()}.wal"
        self._writer = JournalWriter(self.folder / name, header)

    @property
    def num_durable_expert_calls(self) -> int:
        """Expert calls that need not be made again."""
        return sum(len(batch.results) for batch in self._batches if batch.role == "expert")

    @property
    def num_expert_calls(self) -> int:
        """Expert calls with a durable result, asked by this writer or before."""
        own = (spent.calls for (role, _), spent in self._writer.spent.items() if role == "expert")
        return self.num_durable_expert_calls + sum(own)

    @property
    def has_reply(self) -> bool:
        """Whether the expert has answered any of them."""
        return self._has_reply

    @property
    def is_replaying(self) -> bool:
        return self._next < len(self._batches)

    def next_batch(self) -> Batch:
        """The next durable batch; only while `is_replaying`."""
        batch = self._batches[self._next]
        self._next += 1
        return batch

    @property
    def is_there(self) -> bool:
        """False once another writer has published the unit and removed this journal."""
        return self._writer.is_there

    def commit(self, batch: Batch | None, intents: Mapping[str, Sequence[str]]) -> None:
        """Make a batch and the intents of what follows from it durable: one fsync."""
        self._writer.commit(batch, intents)
        self._has_reply = self._has_reply or (batch is not None and _has_success(batch))

    def usage(self) -> Ledger:
        """What the unit cost so far, over all writers."""
        others = [read_journal(path) for path in self._others]
        return journal_usage([*others, self._writer])

    @property
    def file_names(self) -> list[str]:
        """Journals whose calls `usage` counts."""
        own = [self._writer.path.name] if self._writer.spent else []
        return sorted([*(path.name for path in self._others), *own])

    def close(self) -> None:
        self._writer.close()


def _has_success(batch: Batch) -> bool:
    """Whether the expert has answered any of a batch."""
    return batch.role == "expert" and any(
        result.value["finish_reason"] != "error" for result in batch.results
    )
