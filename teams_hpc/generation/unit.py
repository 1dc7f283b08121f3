"""Running one work unit: all its chains in flight, no chain waiting for another."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from teams_hpc.generation.calls import Calls, ClaimLost
from teams_hpc.generation.evolve import Chain
from teams_hpc.llm.base import Completion
from teams_hpc.runtime.preemption import StopFlag

_DRAIN_S = 15.0


@dataclass(slots=True, kw_only=True)
class UnitRunner:
    """Runs the chains of one unit to their end; their rows are complete then.

    Args:
        chains: In plan order.
        calls: What to ask through.
        stop: Looked at before each step of the engine.
        what: Names the unit in the message of a stop.
    """

    chains: Sequence[Chain]
    calls: Calls
    stop: StopFlag
    what: str
    _waiting: dict[str, Chain] = field(default_factory=dict)

    def run(self) -> None:
        """Run until no chain wants anything.

        Raises:
            StopRequested: Asked to stop; all that was received is durable.
            ClaimLost: The unit is another's now.
            WorkError: As `Calls.step`.
        """
        try:
            self._go_on(self.chains)
            while self.calls.num_pending:
                if self.stop.is_set:
                    self.calls.drain(self._take, _DRAIN_S)
                    self.stop.raise_if_set(self.what)
                self._take(self.calls.step())
            self.calls.flush()
        except ClaimLost:
            self.calls.abandon(self.stop)
            raise

    def _ask(self, chain: Chain) -> None:
        if chain.wants != "nothing":
            request = chain.request()
            self._waiting[request.id] = chain
            self.calls.add(request)

    def _take(self, completions: Sequence[Completion]) -> None:
        """Feed one batch; every chain in it hands in its next request at once."""
        fed = [self._waiting.pop(completion.id) for completion in completions]
        for chain, completion in zip(fed, completions, strict=True):
            chain.take_completion(completion)
        self._go_on(fed)

    def _go_on(self, chains: Sequence[Chain]) -> None:
        """Let chains judge what they have to, and ask what they want then."""
        for chain in chains:
            chain.recall()
        while judged := [chain for chain in chains if chain.wants == "verdict"]:
            self._judge(judged)
            for chain in judged:  # a retry may know the next rewrite, but not its verdict
                chain.recall()
        for chain in chains:
            self._ask(chain)

    def _judge(self, chains: Sequence[Chain]) -> None:
        verdicts = self.calls.judge([chain.pair() for chain in chains])
        for chain, verdict in zip(chains, verdicts, strict=True):
            if verdict.error:
                chain.fail(verdict.error)
            else:
                chain.take_verdict(verdict)
