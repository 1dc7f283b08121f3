"""Configuration: the schema, the layers it is loaded from, and the digests drawn from it."""

from teams_hpc.config.load import dump_yaml, load_config, load_resolved
from teams_hpc.config.schema import (
    Config,
    EngineConfig,
    HttpEngineConfig,
    LocalEngineConfig,
    ModelShape,
    ReviewerConfig,
    TemplateEngineConfig,
    TransformersEngineConfig,
    VllmEngineConfig,
)

__all__ = [
    "Config",
    "EngineConfig",
    "HttpEngineConfig",
    "LocalEngineConfig",
    "ModelShape",
    "ReviewerConfig",
    "TemplateEngineConfig",
    "TransformersEngineConfig",
    "VllmEngineConfig",
    "dump_yaml",
    "load_config",
    "load_resolved",
]
