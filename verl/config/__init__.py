"""The configuration: every key with its type, default and meaning (``models``), and how it is read (``load``).

Imports without torch.
"""

from verl.config.loading.dump import resolved_yaml
from verl.config.loading.load import Loaded, load
from verl.config.loading.problems import Problem, report
from verl.config.sections.models import Config, EvalConfig, GenerationConfig, SFTConfig

__all__ = [
    "Config",
    "EvalConfig",
    "GenerationConfig",
    "Loaded",
    "Problem",
    "SFTConfig",
    "load",
    "report",
    "resolved_yaml",
]
