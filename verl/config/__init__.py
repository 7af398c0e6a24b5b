"""The configuration: every key with its type, default and meaning (``models``), and how it is read (``load``).

Imports without torch.
"""

from verl.config.dump import resolved_yaml
from verl.config.load import Loaded, load
from verl.config.models import Config, EvalConfig, GenerationConfig, SFTConfig
from verl.config.problems import Problem, report

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
