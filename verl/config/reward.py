"""How responses are scored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from verl.config.base import PositiveInt, Section, Share


class CustomRewardFunctionConfig(Section):
    path: str | None = Field(None, description="Python file with your reward function; null: the data source's scorer.")
    name: str = Field("compute_score", description="Name of the function in that file.")
    reward_kwargs: dict[str, Any] = Field({}, description="Further keyword arguments of every call.")


class OverlongBufferConfig(Section):
    enable: bool = Field(False, description="Take a penalty off the reward of a response that nears the length limit.")
    len: int = Field(0, ge=0, description="Tokens before data.max_response_length from which on it grows.")
    penalty_factor: float = Field(1.0, ge=0, description="Penalty at the limit.")


class RewardModelConfig(Section):
    enable: Literal[False] = Field(False, description="Score with a reward model; not built yet.")
    reward_manager: Literal["naive"] = Field("naive", description="naive: each response is scored by itself.")
    overlong_buffer: OverlongBufferConfig = OverlongBufferConfig()


class GSM8KScorerConfig(Section):
    method: Literal["strict", "flexible"] = Field(
        "strict", description="Where the answer is: strict: after the last ####; flexible: the last number."
    )
    score: float = Field(1.0, description="Score of a right answer.")
    format_score: float = Field(0.0, description="Score of a wrong answer that could be read.")


class RewardConfig(Section):
    num_workers: PositiveInt = Field(2, description="Processes that score responses.")
    timeout: float = Field(30.0, gt=0, description="Seconds that scoring one response may take.")
    error_score: float = Field(0.0, description="Score of a response whose scoring failed or took too long.")
    max_error_share: Share = Field(
        0.1, description="Share of a step's responses whose scoring may fail; past it the run stops."
    )
    gsm8k: GSM8KScorerConfig = Field(GSM8KScorerConfig(), description="Scorer of the data source openai/gsm8k.")
