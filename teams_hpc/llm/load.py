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


def load_engine(config: EngineConfig | ReviewerConfig, *, is_limited: bool = False) -> Engine:
    """Build the engine that `config` names; imports torch only where it is needed.

    Args:
        config: The engine's settings.
        is_limited: Its calls are under a limit, so that it may make none twice.

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

        return HttpEngine(config, is_limited=is_limited)
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


def load_engines(
    *configs: EngineConfig | ReviewerConfig, limited: EngineConfig | None = None
) -> list[Engine]:
    """Load several engines; those whose settings are equal (but for `verdict`) are one.

    Args:
        configs: The engines' settings.
        limited: Those whose calls are under a limit, with all that are one engine with it.
    """
    keys = [_settings(config) for config in configs]
    key_limited = None if limited is None else _settings(limited)
    loaded: dict[str, Engine] = {}
    for key, config in zip(keys, configs, strict=True):
        if key not in loaded:
            loaded[key] = load_engine(config, is_limited=key == key_limited)
    return [loaded[key] for key in keys]


def _settings(config: EngineConfig | ReviewerConfig) -> str:
    return config.model_dump_json(exclude={"verdict"})
