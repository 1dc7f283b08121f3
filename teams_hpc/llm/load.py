"""From configuration to engine; equal configurations share one engine, so one copy in memory."""

from typing import cast

from teams_hpc.config.schema import (
    EngineConfig,
    HttpEngineConfig,
    ReviewerConfig,
    TransformersEngineConfig,
    VllmEngineConfig,
)
from teams_hpc.errors import EngineError
from teams_hpc.llm.base import EmbeddingEngine, Engine


def load_engine(config: EngineConfig | ReviewerConfig) -> Engine:
    """Build the engine that `config` names; imports torch only where it is needed.

    Raises:
        EngineError: The model can't be loaded; the message says what to change.
    """
    if isinstance(config, TransformersEngineConfig):
        from teams_hpc.llm.transformers_engine import TransformersEngine

        return TransformersEngine(config)
    if isinstance(config, VllmEngineConfig):
        from teams_hpc.llm.vllm_engine import VllmEngine

        return VllmEngine(config)
    if isinstance(config, HttpEngineConfig):
        from teams_hpc.llm.http_engine import HttpEngine

        return HttpEngine(config)
    from teams_hpc.llm.template_engine import TemplateEngine

    return TemplateEngine(config)


def as_embedding_engine(engine: Engine) -> EmbeddingEngine:
    """The engine as one that shows hidden states.

    Raises:
        EngineError: It isn't one.
    """
    if not hasattr(engine, "embed"):
        raise EngineError(
            "policy.observation=embedding needs the instructor's hidden states, which only "
            "instructor.kind=transformers gives"
        )
    return cast(EmbeddingEngine, engine)


def load_engines(*configs: EngineConfig | ReviewerConfig) -> list[Engine]:
    """Load several engines; those whose settings are equal (but for `verdict`) are one."""
    loaded: dict[str, Engine] = {}
    engines = []
    for config in configs:
        key = config.model_dump_json(exclude={"verdict"})
        if key not in loaded:
            loaded[key] = load_engine(config)
        engines.append(loaded[key])
    return engines
