"""The recipe: every setting of a run, read from one YAML file plus dotted overrides.

In: a YAML file and strings such as ``train.steps=20``. Out: a frozen, validated `Recipe`. Read `sections.py` first.
This package imports neither torch nor transformers, so that a wrong key is reported at once.
"""

from longlora.config.evaluation import (
    EvalConfig,
    LongEvalConfig,
    LongPPLConfig,
    NeedleConfig,
    PasskeyConfig,
    PerplexityConfig,
    QuestionsConfig,
    RulerConfig,
    TopicsConfig,
)
from longlora.config.instruct import InstructConfig
from longlora.config.recipe import Recipe, build_recipe, dump_recipe, load_recipe
from longlora.config.sections import (
    CHANGEABLE_ON_RESUME,
    AdapterConfig,
    AttentionConfig,
    ContextConfig,
    DataConfig,
    ModelConfig,
    TrainConfig,
)

__all__ = [
    "CHANGEABLE_ON_RESUME",
    "AdapterConfig",
    "AttentionConfig",
    "ContextConfig",
    "DataConfig",
    "EvalConfig",
    "InstructConfig",
    "LongEvalConfig",
    "LongPPLConfig",
    "ModelConfig",
    "NeedleConfig",
    "PasskeyConfig",
    "PerplexityConfig",
    "QuestionsConfig",
    "Recipe",
    "RulerConfig",
    "TopicsConfig",
    "TrainConfig",
    "build_recipe",
    "dump_recipe",
    "load_recipe",
]
