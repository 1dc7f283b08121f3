"""The configuration of a run. Every key, its default, its bounds and what it means.

Units are part of the names. Paths are absolute once loaded (see `load.py`). Nothing in here is
secret: a key that needs one names the environment variable that holds it.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from teams_hpc.config.policy import PolicyConfig
from teams_hpc.config.section import Count, CountOrZero, NotNegative, Positive, Probability, Section


class SeedsConfig(Section):
    """Where the seed instructions come from and how they are split."""

    path: Path | None = Field(None, description="JSON, JSONL or text file; null: the seeds shipped")
    limit: Count | None = Field(None, description="use only the first so many distinct seeds")
    policy_train_share: Probability = Field(0.6, description="share the policy is trained on")
    policy_select_share: Probability = Field(0.1, description="share that chooses the member")
    policy_report_share: Probability = Field(0.15, description="share the policy is reported on")
    sft_held_out_share: Probability = Field(0.15, description="share kept from fine-tuning")
    near_duplicate_threshold: Probability = Field(
        0.7, description="Jaccard similarity of word 3-grams that puts two seeds in one split"
    )

    @model_validator(mode="after")
    def _shares_sum_to_one(self) -> "SeedsConfig":
        total = (
            self.policy_train_share
            + self.policy_select_share
            + self.policy_report_share
            + self.sft_held_out_share
        )
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the four split shares sum to {total:.4g}; they must sum to 1")
        return self


class EngineBase(Section):
    """What every engine has: how it samples."""

    max_tokens: Count = Field(512, description="most tokens of one completion")
    temperature: NotNegative = Field(0.7, description="0 is greedy")
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 0.95


class TemplateEngineConfig(EngineBase):
    """A deterministic grammar: no model, exact, for load tests and a first minute."""

    kind: Literal["template"] = "template"


class TransformersEngineConfig(EngineBase):
    """A local Llama-family folder through transformers."""

    kind: Literal["transformers"] = "transformers"
    model: Path = Field(
        description="folder with config.json, safetensors and a tokenizer; "
        "shipped:pocket-llama is the small one that comes with the package"
    )
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    batch_size: Count = Field(32, description="most requests in one forward batch")
    batching: Literal["fixed", "refill"] = Field(
        "refill",
        description="fixed: batches depend on the work unit alone (exact in float32 on CPUs, with "
        "the same threads)",
    )
    prompt_lookup_num_tokens: Annotated[int, Field(ge=0)] = Field(
        8,
        description="tokens to guess ahead in a step where a reply repeats its prompt; 0: none",
    )
    threads: Count | None = Field(
        None,
        description="torch CPU threads of this engine; null: torch's, but with batching=fixed on "
        "a CPU one, since the number decides last digits there and launchers change torch's",
    )


class VllmEngineConfig(EngineBase):
    """A local model through vLLM (extra `vllm`), on one GPU or split over several."""

    kind: Literal["vllm"] = "vllm"
    model: Path = Field(description="folder with config.json, safetensors and a tokenizer")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    tensor_parallel_size: Count = Field(1, description="GPUs that one process splits it over")
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        0.9, description="share of each GPU; lower where another model is on it"
    )
    max_model_len: Count | None = Field(
        None, description="most tokens of a prompt with its reply; null: what the model can"
    )


LocalEngineConfig = TransformersEngineConfig | VllmEngineConfig
"""Engines that load a model folder in the process that asks them."""


class HttpEngineConfig(EngineBase):
    """Any server that speaks the OpenAI chat protocol."""

    kind: Literal["http"] = "http"
    base_url: Annotated[str, Field(pattern=r"^https?://[^\s@]+$")] = Field(
        description="for instance http://node7:8000/v1; never with a password in it"
    )
    model: Annotated[str, Field(min_length=1)] = Field(description="model name to ask for")
    api_key_env: str | None = Field(None, description="environment variable holding the key")
    max_concurrency: Count = Field(64, description="most requests in flight")
    timeout_s: Positive = Field(120.0, description="limit of one attempt")
    max_retries: CountOrZero = Field(
        6,
        description="repeats of what is refused (429, 503) or found no connection; without a "
        "budget of lost calls too",
    )


EngineConfig = Annotated[
    TemplateEngineConfig | TransformersEngineConfig | VllmEngineConfig | HttpEngineConfig,
    Field(discriminator="kind"),
]


class TemplateReviewerConfig(TemplateEngineConfig):
    """The grammar as reviewer."""

    verdict: Literal["likelihood", "generated"] = "likelihood"


class TransformersReviewerConfig(TransformersEngineConfig):
    """A local model as reviewer."""

    verdict: Literal["likelihood", "generated"] = Field(
        "likelihood", description="likelihood of both answers, or (as published) generated text"
    )


class VllmReviewerConfig(VllmEngineConfig):
    """A local model through vLLM as reviewer."""

    verdict: Literal["likelihood", "generated"] = Field(
        "likelihood", description="likelihood of both answers, or (as published) generated text"
    )


class HttpReviewerConfig(HttpEngineConfig):
    """A served model as reviewer: the chat protocol gives no likelihoods of given answers."""

    verdict: Literal["generated"] = "generated"


ReviewerConfig = Annotated[
    TemplateReviewerConfig | TransformersReviewerConfig | VllmReviewerConfig | HttpReviewerConfig,
    Field(discriminator="kind"),
]


class GenerateConfig(Section):
    """Generation: chains of rewriting steps through the expert."""

    num_trajectories: Count = Field(1, description="chains for each seed")
    num_steps: Count = Field(4, description="operations in a chain")
    unit_size: Count = Field(64, description="chains in a work unit")
    action: Literal["sample", "argmax"] = "sample"
    answer: Literal["every", "last"] = Field("every", description="answer each step or the last")
    policy: Literal["learned", "uniform", "round_robin"] = "learned"
    equal_threshold: Probability = Field(
        0.5, description="rule 1 drops a rewrite whose P(Not Equal) is below this"
    )
    max_words: Count = Field(2048, description="a longer rewrite is eliminated")
    enforce_added_words: bool = Field(
        False, description="eliminate rewrites that don't add 10 to 20 words where they should"
    )
    retry_failed: bool = Field(
        False, description="once done, make the chains with failed rows again, and what follows"
    )


class DatasetConfig(Section):
    """From generated rows to a training set."""

    near_duplicate_threshold: Probability = Field(
        0.8, description="Jaccard similarity of word 3-grams above which two rows are one"
    )
    decontaminate: tuple[Path, ...] = Field(
        (), description="benchmark files (text or JSONL); rows sharing an n-gram with them go"
    )
    decontamination_ngram: Count = Field(8, description="words in a row that count as a match")
    drop_truncated: bool = Field(True, description="leave out answers cut off at max_tokens")


class ModelShape(Section):
    """A Llama built from config, random weights, with a tokenizer trained on the data set."""

    vocab_size: Annotated[int, Field(ge=300)] = 1024
    hidden_size: Count = 64
    intermediate_size: Count = 176
    num_hidden_layers: Count = 2
    num_attention_heads: Count = 4
    num_key_value_heads: Count = 4
    max_position_embeddings: Count = 2048
    tie_word_embeddings: bool = True

    @model_validator(mode="after")
    def _heads_divide(self) -> "ModelShape":
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of "
                f"num_attention_heads {self.num_attention_heads}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        return self


def _folder_or_shape(value: object) -> str:
    return "shape" if isinstance(value, dict | ModelShape) else "folder"


FolderOrShape = Annotated[
    Annotated[Path, Tag("folder")] | Annotated[ModelShape, Tag("shape")],
    Discriminator(_folder_or_shape),
]


class SftConfig(Section):
    """One supervised fine-tuning with DeepSpeed."""

    model: FolderOrShape = Field(
        default_factory=ModelShape, description="a Hugging Face folder, or the shape of a new one"
    )
    attention: Literal["auto", "flash_attention_2", "sdpa"] = "auto"
    liger: bool = Field(False, description="fused kernels for Llama on CUDA: extra 'liger'")
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    zero_stage: Literal[2, 3] = 3
    sequence_length: Annotated[int, Field(ge=16)] = Field(2048, description="tokens a packed row")
    num_epochs: Positive = Field(3.0, description="sets schedule_steps where that is null")
    schedule_steps: Count | None = Field(None, description="optimizer steps of the schedule")
    max_steps: Count | None = Field(None, description="stop here; null: the whole schedule")
    global_batch_rows: Count = Field(32, description="packed rows of one optimizer step")
    micro_batch_rows: Count = Field(4, description="most packed rows of one forward pass a rank")
    learning_rate: Positive = 2e-5
    warmup_steps: CountOrZero = 20
    weight_decay: NotNegative = 0.0
    grad_clip: Positive = 1.0
    activation_checkpointing: bool = False
    offload_optimizer: bool = False
    offload_parameters: bool = False
    sub_group_size: Count = Field(
        1_000_000_000, description="parameters updated at a time at stage 3; the result is the same"
    )
    checkpoint_interval_steps: Count = 100
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    eval_interval_steps: Count = 50
    peak_tflops: Positive | None = Field(
        None, description="of one GPU, for MFU; null: known for A100, H100 and a few more"
    )

    @model_validator(mode="after")
    def _steps_fit(self) -> "SftConfig":
        if self.max_steps and self.schedule_steps and self.max_steps > self.schedule_steps:
            raise ValueError(
                f"max_steps {self.max_steps} is more than schedule_steps {self.schedule_steps}"
            )
        if isinstance(self.model, ModelShape):
            longest = self.model.max_position_embeddings
            if self.sequence_length > longest:
                raise ValueError(
                    f"sequence_length {self.sequence_length} is more than the model's "
                    f"max_position_embeddings {longest}"
                )
        if self.offload_parameters and self.zero_stage != 3:
            raise ValueError("offload_parameters needs zero_stage 3, which divides parameters")
        return self


class EvaluateConfig(Section):
    """What is measured at the end."""

    batch_size: Count = 16
    num_bootstrap: Annotated[int, Field(ge=100)] = 1000
    control_steps: Count = Field(
        300, description="steps that over-fit the positive control of the privacy attack"
    )
    control_rows: Count = Field(64, description="most members and non-members of that control")
    lm_eval_tasks: tuple[str, ...] = Field((), description="lm-evaluation-harness task names")
    lm_eval_path: Path | None = Field(None, description="folder with task YAML files")
    lm_eval_num_fewshot: CountOrZero | None = None
    lm_eval_limit: Count | None = Field(None, description="documents of each task; null: all")


class BudgetConfig(Section):
    """A brake on spending, and prices to foretell it; not part of the data's identity."""

    max_expert_calls: CountOrZero | None = Field(
        None,
        description="null: no limit; with one, no call over http is repeated that may be paid for",
    )
    price_per_million_prompt_tokens: NotNegative | None = Field(
        None, description="dollars, for `forecast`: tokens read by models behind http"
    )
    price_per_million_completion_tokens: NotNegative | None = Field(
        None, description="dollars, for `forecast`: tokens written by models behind http"
    )
    price_per_gpu_hour: NotNegative | None = Field(None, description="dollars, for `forecast`")


SlurmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.,:+-]+$")]
"""What Slurm calls things: it goes into `#SBATCH` lines as it is."""


class JobShape(Section):
    """What the jobs of one stage ask for; null: what the site says, or what the stage needs."""

    time_min: Count | None = None
    nodes: Count | None = Field(None, description="null: as many as the processes need")
    cpus_per_task: Count | None = None
    mem_gb: Positive | None = Field(None, description="of each node")
    gpus_per_node: CountOrZero | None = Field(None, description="null: one a process that uses one")
    partition: SlurmName | None = None
    qos: SlurmName | None = None


class StageShapes(Section):
    """Stages that ask for something else than the rest."""

    policy: JobShape = JobShape()
    select: JobShape = JobShape()
    generate: JobShape = JobShape()
    dataset: JobShape = JobShape()
    sft: JobShape = JobShape()
    evaluate: JobShape = JobShape()
    report: JobShape = JobShape()


class SlurmConfig(Section):
    """What `teams-hpc submit` asks Slurm for. `doctor` checks it against the cluster."""

    partition: SlurmName | None = Field(None, description="null: the cluster's default")
    account: SlurmName | None = None
    qos: SlurmName | None = None
    time_min: Count = Field(720, description="limit of each job; longer work is requeued")
    warning_s: Annotated[int, Field(ge=5)] = Field(
        300, description="a job stops at a safe point so long before its limit"
    )
    cpus_per_task: Count = 1
    mem_gb: Positive | None = Field(None, description="of each node; null: the cluster's default")
    max_parallel_tasks: Count = Field(64, description="array tasks of a stage at a time (the %)")
    mpi: SlurmName | None = Field(
        None, description="srun --mpi=... (pmix, pmi2); null: the cluster's default"
    )
    modules: tuple[Annotated[str, Field(pattern=r"^[A-Za-z0-9_.+/-]+$")], ...] = Field(
        (), description="environment modules that each job loads"
    )
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(
        {}, description="variables set in each job; nothing secret"
    )
    options: dict[
        Annotated[str, Field(pattern=r"^[a-z][a-z-]*$")],
        Annotated[str, Field(pattern=r"^[^\n]*$")] | int | bool,
    ] = Field({}, description="further sbatch options, for instance {constraint: a100}")
    scratch: Path | None = Field(
        None, description="node-local folder for caches and temporary files; null: /tmp"
    )
    stage_weights: bool = Field(False, description="copy model folders to scratch before loading")
    stages: StageShapes = StageShapes()

    @model_validator(mode="after")
    def _is_possible(self) -> "SlurmConfig":
        shapes = {name: getattr(self.stages, name) for name in StageShapes.model_fields}
        for name, shape in shapes.items():
            limit_s = 60 * (shape.time_min or self.time_min)
            if limit_s <= self.warning_s:
                raise ValueError(
                    f"warning_s {self.warning_s} leaves nothing of the {limit_s} s that a job of "
                    f"{name} may take; lower it, or raise time_min"
                )
        if self.stage_weights and self.scratch is None:
            raise ValueError("stage_weights needs scratch, a folder on each node's own disk")
        return self


class ContainerConfig(Section):
    """The container that each task runs in; the batch script itself runs on the node."""

    kind: Literal["apptainer", "singularity"] = Field(
        "apptainer", description="the command that every node has"
    )
    image: Path = Field(description="a SIF file or sandbox folder that every node sees")
    binds: tuple[Annotated[str, Field(pattern=r"^/[^,\n]*$")], ...] = Field(
        (), description="further folders, as SOURCE, SOURCE:DESTINATION or SOURCE:DESTINATION:ro"
    )
    nv: bool = Field(True, description="the host's NVIDIA driver inside (ignored without GPUs)")
    environment: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")], str] = Field(
        {}, description="variables set inside, whatever the job has set; nothing secret"
    )


class SiteConfig(Section):
    """Where and how it runs: outside every digest."""

    executor: Literal["local", "slurm"] = Field(
        "local", description="slurm: `submit` it; `run` only inside an allocation"
    )
    num_workers: Count = Field(
        1, description="generation: local processes, or array tasks; also members trained at once"
    )
    ranks_per_worker: Count = Field(1, description="processes of one array task of generation")
    num_sft_ranks: Count = Field(1, description="processes (GPUs) of the fine-tuning, all nodes")
    lease_s: Positive = Field(60.0, description="a silent holder's claim ends after so long")
    max_restarts_without_progress: CountOrZero = 2
    gpus_per_node: CountOrZero = Field(0, description="GPUs of a node that work here; 0: none")
    gpu_memory_gb: Positive | None = Field(
        None, description="of one GPU, 10^9 bytes: what can't fit is refused; null: not checked"
    )
    slurm: SlurmConfig = SlurmConfig()
    container: ContainerConfig | None = None


_ROLES_OF = {
    "policy": ("instructor", "reviewer"),
    "select": ("instructor", "reviewer"),
    "generate": ("expert", "reviewer"),
}


class Config(Section):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    run_dir: Path | None = Field(None, description="null: runs/<name> in the current folder")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 543
    seeds: SeedsConfig = SeedsConfig()
    instructor: EngineConfig = TemplateEngineConfig()
    reviewer: ReviewerConfig = TemplateReviewerConfig()
    expert: EngineConfig = TemplateEngineConfig()
    policy: PolicyConfig = PolicyConfig()
    generate: GenerateConfig = GenerateConfig()
    dataset: DatasetConfig = DatasetConfig()
    sft: SftConfig = SftConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    budget: BudgetConfig = BudgetConfig()
    site: SiteConfig = SiteConfig()

    @model_validator(mode="after")
    def _instructor_can_embed(self) -> "Config":
        if self.policy.uses_embedding and not isinstance(self.instructor, TransformersEngineConfig):
            raise ValueError(
                "policy.observation: embedding is made of the instructor's hidden states, which "
                f"instructor.kind={self.instructor.kind} doesn't give; set "
                "instructor.kind=transformers, or policy.observation=features (also in "
                "policy.variants)"
            )
        return self

    @property
    def resolved_run_dir(self) -> Path:
        """The run directory; `load_config` has made it absolute."""
        if self.run_dir is None:
            raise AssertionError("load_config sets run_dir")
        return self.run_dir

    def roles_of(self, stage: str) -> tuple[str, ...]:
        """The roles whose models a stage loads; a policy may look through the instructor's eyes."""
        roles = _ROLES_OF.get(stage, ())
        is_guided = stage == "generate" and self.generate.policy == "learned"
        return (*roles, "instructor") if is_guided and self.policy.uses_embedding else roles

    def gpus_of_process(self, stage: str) -> int:
        """GPUs that one process of a stage uses, where any do; vLLM may split a model."""
        engines = (getattr(self, role) for role in self.roles_of(stage))
        sizes = (e.tensor_parallel_size for e in engines if isinstance(e, VllmEngineConfig))
        return max(sizes, default=1)
