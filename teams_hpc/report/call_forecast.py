"""What a run will ask of its models, before it asks: calls, tokens, GPU hours, dollars.

At most: what the configuration allows, with every rewrite usable, every verdict good and every
reply as long as `max_tokens` lets it be. Expected: as large a share of that as an earlier run
needed, with its mean tokens a call; without one, assumed shares, and no guess at tokens.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from teams_hpc.config import Config
from teams_hpc.llm.base import RoleName
from teams_hpc.llm.ledger import WIZARDLM_CALLS, Usage
from teams_hpc.policy.statistics import LEAST_SEEDS
from teams_hpc.report.status import stage_progress
from teams_hpc.report.usage import collect_usage
from teams_hpc.rewriting.operations import OPERATIONS, rewrite_request
from teams_hpc.rewriting.reviewer import SANITY_CALLS
from teams_hpc.rewriting.seeds import Seed, read_seeds
from teams_hpc.rewriting.splits import split_seeds
from teams_hpc.storage.retry_folder import had_retry
from teams_hpc.storage.run_dir import RunDir, read_manifest

ASSUMED_JUDGED = 0.9
"""Share of rewrites that are worth a verdict, where no run says."""
ASSUMED_ANSWERED = 0.8
"""Share of rewrites that are worth an answer, where no run says."""

_TOKENS_PER_WORD = 1.5
_WORDS_OF_A_VERDICT = 64
"""What stands around the two instructions that the reviewer compares, rounded up."""
_TOKENS_OF_A_CHAT = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One kind of call of one stage.

    Attributes:
        what: rewrites, verdicts or answers.
        most: Calls at most.
        assumed: Share of them that is expected where no run says.
        prompt_tokens: Of the longest call.
        completion_tokens: Likewise.
    """

    stage: str
    role: RoleName
    what: str
    most: int
    assumed: float
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What an earlier run needed.

    Attributes:
        shares: Of the calls possible, by stage, role and kind of call.
        tokens: Mean prompt and completion tokens of a call, by stage and role.
        process_s: Seconds of one process for a call of any role, by stage.
    """

    shares: dict[tuple[str, str, str], float] = field(default_factory=dict)
    tokens: dict[tuple[str, str], tuple[float, float]] = field(default_factory=dict)
    process_s: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One kind of call with what it will cost; None where nothing is known."""

    ask: Ask
    calls: float
    prompt_tokens: float | None
    completion_tokens: float | None
    gpu_hours: float | None
    is_served: bool

    @property
    def most_prompt_tokens(self) -> int:
        return self.ask.most * self.ask.prompt_tokens

    @property
    def most_completion_tokens(self) -> int:
        return self.ask.most * self.ask.completion_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """A whole run's calls."""

    config: Config
    lines: tuple[Line, ...]
    source: str

    def most(self, role: RoleName) -> int:
        """Calls of one role at most."""
        return sum(line.ask.most for line in self.lines if line.ask.role == role)

    def expected(self, role: RoleName) -> float:
        """Calls of one role as expected."""
        return sum(line.calls for line in self.lines if line.ask.role == role)

    @property
    def gpu_hours(self) -> float | None:
        """Expected, of all stages that ask models; None if a stage was not measured."""
        return _sum_known(line.gpu_hours for line in self.lines)

    @property
    def most_dollars(self) -> float | None:
        """For the tokens of served models at most; None without prices."""
        lines = [line for line in self.lines if line.is_served]
        return self._token_dollars(
            sum(line.most_prompt_tokens for line in lines),
            sum(line.most_completion_tokens for line in lines),
        )

    @property
    def dollars(self) -> float | None:
        """As expected, for the tokens of served models; None if unknown or without prices."""
        lines = [line for line in self.lines if line.is_served]
        return self._token_dollars(
            _sum_known(line.prompt_tokens for line in lines),
            _sum_known(line.completion_tokens for line in lines),
        )

    @property
    def gpu_dollars(self) -> float | None:
        price, hours = self.config.budget.price_per_gpu_hour, self.gpu_hours
        return None if price is None or hours is None else price * hours

    def _token_dollars(self, prompt: float | None, completion: float | None) -> float | None:
        budget = self.config.budget
        prices = (
            budget.price_per_million_prompt_tokens,
            budget.price_per_million_completion_tokens,
        )
        if prompt is None or completion is None or prices == (None, None):
            return None
        return (prompt * (prices[0] or 0.0) + completion * (prices[1] or 0.0)) / 1e6


def _sum_known(values: Iterator[float | None]) -> float | None:
    found = list(values)
    known = [value for value in found if value is not None]
    return sum(known) if len(known) == len(found) else None


def forecast_calls(config: Config, earlier: tuple[RunDir, Config] | None = None) -> Forecast:
    """The calls of a whole run, from its configuration and, for what is expected, an earlier run.

    Raises:
        SeedError: The seeds can't be read.
    """
    measured = measure(*earlier) if earlier else Measured()
    source = str(earlier[0].root) if earlier else ""
    lines = tuple(_line(config, ask, measured) for ask in list_asks(config))
    return Forecast(config=config, lines=lines, source=source)


def _line(config: Config, ask: Ask, measured: Measured) -> Line:
    share = measured.shares.get((ask.stage, ask.role, ask.what), ask.assumed)
    calls = share * ask.most
    tokens = measured.tokens.get((ask.stage, ask.role))
    seconds = measured.process_s.get(ask.stage)
    gpus = _gpus_of_a_process(config, ask.stage)
    hours = 0.0 if gpus == 0 else None if seconds is None else gpus * seconds * calls / 3600
    return Line(
        ask=ask,
        calls=calls,
        prompt_tokens=calls * tokens[0] if tokens else None,
        completion_tokens=calls * tokens[1] if tokens else None,
        gpu_hours=hours,
        is_served=getattr(config, ask.role).kind == "http",
    )


def _gpus_of_a_process(config: Config, stage: str) -> int:
    """GPUs that one process holds, whether or not its models are served elsewhere."""
    return config.gpus_of_process(stage) if config.site.gpus_per_node else 0


def list_asks(config: Config) -> list[Ask]:
    """Every kind of call of the run, in the order of the stages."""
    seeds = read_seeds(config.seeds.path, config.seeds.limit).seeds
    learned = _policy_asks(config, seeds) if config.generate.policy == "learned" else []
    return [*learned, *_generate_asks(config, seeds)]


def _policy_asks(config: Config, seeds: Sequence[Seed]) -> list[Ask]:
    policy = config.policy
    splits = Counter(split_seeds(seeds, config.seeds, config.seed).values())
    chosen_on = splits["policy_select"] or splits["policy_train"]
    reported = splits["policy_report"] if splits["policy_report"] >= LEAST_SEEDS else 0
    played = policy.num_tasks * chosen_on + 3 * reported  # learned, uniform, round-robin
    episodes = {
        "policy": policy.num_tasks * policy.iterations * policy.num_envs,
        "select": played * policy.num_eval_episodes,
    }
    sanity = {"policy": policy.num_tasks * SANITY_CALLS, "select": SANITY_CALLS}
    length = policy.episode_length
    pairs = length * (length + 1) // 2 if policy.compare_with == "every_earlier" else length
    asks = []
    for stage, count in episodes.items():
        texts = _LongestTexts(seeds, config.instructor.max_tokens)
        asks.append(_rewrites(config, stage, "instructor", count * length, texts))
        verdicts = count * pairs + sanity[stage]
        asks.append(_verdicts(config, stage, verdicts, texts))
    return asks


def _generate_asks(config: Config, seeds: Sequence[Seed]) -> list[Ask]:
    settings = config.generate
    chains = len(seeds) * settings.num_trajectories
    steps = chains * settings.num_steps
    texts = _LongestTexts(seeds, config.expert.max_tokens)
    answers = Ask(
        stage="generate",
        role="expert",
        what="answers",
        most=steps if settings.answer == "every" else chains,
        assumed=ASSUMED_ANSWERED if settings.answer == "every" else 1.0,
        prompt_tokens=texts.tokens() + _TOKENS_OF_A_CHAT,
        completion_tokens=config.expert.max_tokens,
    )
    return [
        _rewrites(config, "generate", "expert", steps, texts),
        _verdicts(config, "generate", steps, texts),
        answers,
    ]


class _LongestTexts:
    """How long an instruction with its input can get, in tokens."""

    def __init__(self, seeds: Sequence[Seed], max_tokens: int) -> None:
        self._instruction = max(max_tokens, *(_tokens_of(seed.instruction) for seed in seeds))
        self._input = max(_tokens_of(seed.input) for seed in seeds)

    def tokens(self, around: str = "") -> int:
        return self._instruction + self._input + _tokens_of(around)


def _tokens_of(text: str) -> int:
    return int(_TOKENS_PER_WORD * len(text.split())) + 1


def _rewrites(config: Config, stage: str, role: RoleName, most: int, texts: _LongestTexts) -> Ask:
    wordings = (
        rewrite_request(operation, "", "-", request_id="", seed=0).messages[0].content
        for operation in OPERATIONS
    )
    return Ask(
        stage=stage,
        role=role,
        what="rewrites",
        most=most,
        assumed=1.0,
        prompt_tokens=max(map(texts.tokens, wordings)) + _TOKENS_OF_A_CHAT,
        completion_tokens=getattr(config, role).max_tokens,
    )


def _verdicts(config: Config, stage: str, most: int, texts: _LongestTexts) -> Ask:
    reviewer = config.reviewer
    around = _TOKENS_OF_A_CHAT + int(_TOKENS_PER_WORD * _WORDS_OF_A_VERDICT)
    return Ask(
        stage=stage,
        role="reviewer",
        what="verdicts",
        most=most,
        assumed=ASSUMED_JUDGED,
        prompt_tokens=2 * texts.tokens() + around,
        completion_tokens=0 if reviewer.verdict == "likelihood" else reviewer.max_tokens,
    )


def measure(run_dir: RunDir, config: Config) -> Measured:
    """What an earlier run needed, of its stages that are done."""
    measured = Measured()
    usage = collect_usage(run_dir)
    for ask in list_asks(config):
        manifest = read_manifest(run_dir, ask.stage)
        if manifest is None or not ask.most:
            continue
        spent = usage[ask.stage].total(ask.role)
        calls = spent.calls
        if ask.stage == "generate" and ask.role == "expert":
            attempted = int(manifest["counts"]["attempted"])
            calls = attempted if ask.what == "rewrites" else max(0, calls - attempted)
        measured.shares[ask.stage, ask.role, ask.what] = min(1.0, calls / ask.most)
        measured.tokens[ask.stage, ask.role] = _mean_tokens(spent)
    for stage, ledger in usage.items():
        if read_manifest(run_dir, stage) is None:  # its calls so far are not those of all its work
            continue
        seconds = _process_seconds(run_dir, config, stage)
        calls = sum(row.calls for row in ledger.rows.values())
        if seconds is not None and calls:
            measured.process_s[stage] = seconds / calls
    return measured


def _mean_tokens(usage: Usage) -> tuple[float, float]:
    calls = max(1, usage.calls)
    return usage.prompt_tokens / calls, usage.completion_tokens / calls


def _process_seconds(run_dir: RunDir, config: Config, stage: str) -> float | None:
    """Seconds that all processes of a stage took together, from the rate of their last start.

    None after a retry: its rate counts whole units, of which it made only some chains again.
    """
    if stage == "generate" and had_retry(run_dir):
        return None
    progress = stage_progress(run_dir, stage)
    if progress is None or progress.rate_per_s <= 0:
        return None
    site = config.site
    counts = {"policy": config.policy.num_tasks, "generate": site.num_workers}
    ranks = site.ranks_per_worker if stage == "generate" else 1
    return counts.get(stage, 1) * ranks * progress.total / progress.rate_per_s


def forecast_lines(forecast: Forecast) -> Iterator[str]:
    """The forecast for people."""
    yield (
        f"{'stage':<9} {'role':<11} {'calls':<9} {'at most':>14} {'expected':>14} "
        f"{'tokens at most':>18} {'expected':>16}"
    )
    for line in forecast.lines:
        ask = line.ask
        most_tokens = line.most_prompt_tokens + line.most_completion_tokens
        tokens = _sum_known(iter((line.prompt_tokens, line.completion_tokens)))
        yield (
            f"{ask.stage:<9} {ask.role:<11} {ask.what:<9} {ask.most:>14,} {line.calls:>14,.0f} "
            f"{most_tokens:>18,} {_number(tokens):>16}"
        )
    most, expected = forecast.most("expert"), forecast.expected("expert")
    yield (
        f"expert    {most:,} calls at most, {100 * most / WIZARDLM_CALLS:.3g} % of WizardLM's "
        f"{WIZARDLM_CALLS:,}; {expected:,.0f} expected, {100 * expected / WIZARDLM_CALLS:.3g} %"
    )
    limit = forecast.config.budget.max_expert_calls
    if limit is not None:
        fits = "is enough" if limit >= most else "may stop the run"
        yield f"budget    max_expert_calls {limit:,} {fits}"
    yield from _cost_lines(forecast)
    yield f"expected  {_basis(forecast)}"


def _cost_lines(forecast: Forecast) -> Iterator[str]:
    budget = forecast.config.budget
    if forecast.gpu_hours is not None and forecast.config.site.gpus_per_node:
        yield f"GPU       {forecast.gpu_hours:,.2f} hours expected, fine-tuning left aside"
    if forecast.gpu_dollars is not None:
        yield f"          ${forecast.gpu_dollars:,.2f} at ${budget.price_per_gpu_hour:g} an hour"
    if forecast.most_dollars is not None:
        expected = "" if forecast.dollars is None else f", ${forecast.dollars:,.2f} expected"
        yield f"tokens    ${forecast.most_dollars:,.2f} at most{expected} (served models)"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def _basis(forecast: Forecast) -> str:
    if forecast.source:
        return f"as in {forecast.source}"
    return (
        f"assumed: {100 * ASSUMED_JUDGED:.0f} % of rewrites judged, "
        f"{100 * ASSUMED_ANSWERED:.0f} % answered; --from RUN_DIR takes what a run has measured"
    )
