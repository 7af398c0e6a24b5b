"""Scores of responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from verl.config.sections.base import PositiveInt, Section, Share, derived
from verl.config.sections.effects import CUSTOM_FUNCTION, NoEffect, always, cut_by_sequences, cut_by_tokens
from verl.config.sections.parts import FSDPConfig, ModelConfig

NO_CUSTOM_FUNCTION = NoEffect(
    "there is no custom reward function (custom_reward_function.path)", lambda function, run: function.path is None
)
NEVER_UPDATED = NoEffect("the reward model is never updated", always)
NO_OPTIMIZER = NoEffect("the reward model has no optimizer", always, only=("optimizer_offload",))
NO_REWARD_MODEL = NoEffect(
    "no reward model is built (reward_model.enable)", lambda section, run: "reward" not in run.roles
)
NO_PENALTY = NoEffect(
    "long responses are not penalised (reward_model.overlong_buffer.enable)",
    lambda reward_model, run: not reward_model.overlong_buffer.enable,
    spared=("enable",),
)
ONE_CALL = NoEffect(
    "reward_model.reward_manager=batch calls the reward function once per step, in one process",
    lambda reward, run: run.value("reward_model.reward_manager") == "batch",
)
REWARD_MODEL_ALONE = NoEffect(
    "the reward model's score is the only one (reward_model.combine=replace)",
    lambda section, run: run.value("reward_model.enable") and run.value("reward_model.combine") == "replace",
)


class CustomRewardFunctionConfig(Section):
    path: str | None = Field(None, description="Python file with your reward function; null: the data source's scorer.")
    name: Annotated[str, NO_CUSTOM_FUNCTION] = Field("compute_score", description="Name of the function in that file.")
    reward_kwargs: Annotated[dict[str, Any], NO_CUSTOM_FUNCTION] = Field(
        {}, description="Further keyword arguments of every call."
    )


class OverlongBufferConfig(Section):
    enable: bool = Field(False, description="Subtract a penalty from the reward of a response near the length limit.")
    len: int = Field(0, ge=0, description="Number of tokens before data.max_response_length over which it grows.")
    penalty_factor: float = Field(1.0, ge=0, description="Penalty at the limit.")


class RewardModelModelConfig(ModelConfig):
    path: str = Field("", description="Sequence classifier with one label: folder in Hugging Face format, or hub id.")
    enable_gradient_checkpointing: Annotated[bool, NEVER_UPDATED] = Field(
        True, description="Recompute activations in the backward pass."
    )
    input_tokenizer: str | None = Field(
        None,
        description="The policy's tokenizer, if the reward model has another tokenizer or chat template. Responses are "
        "decoded with it and tokenised again. null: token ids are used as they are.",
    )
    fsdp_config: Annotated[FSDPConfig, NO_OPTIMIZER] = FSDPConfig()


class RewardModelConfig(Section):
    enable: bool = Field(False, description="Score with a reward model.")
    combine: Annotated[Literal["replace", "add"], NO_REWARD_MODEL] = Field(
        "replace", description="Use of its score; replace: it is the only score; add: it is added to the scorers'."
    )
    model: Annotated[RewardModelModelConfig, NO_REWARD_MODEL] = RewardModelModelConfig()
    micro_batch_size_per_gpu: Annotated[PositiveInt | None, NO_REWARD_MODEL, cut_by_tokens("reward_scores")] = Field(
        None, description="Responses per forward pass of a rank; null: cut by tokens."
    )
    use_dynamic_bsz: Annotated[bool, NO_REWARD_MODEL] = derived(
        "Cut micro-batches by tokens even if a number of responses is set."
    )
    forward_max_token_len_per_gpu: Annotated[PositiveInt, NO_REWARD_MODEL, cut_by_sequences("reward_scores")] = derived(
        "Most tokens of a micro-batch that is cut by tokens."
    )
    reward_manager: Annotated[Literal["naive", "batch"], REWARD_MODEL_ALONE] = Field(
        "naive",
        description="naive: each response is scored by itself while others are generated; batch: "
        "custom_reward_function gets all responses of a step at once, in lists.",
    )
    overlong_buffer: Annotated[OverlongBufferConfig, NO_PENALTY] = OverlongBufferConfig()


class GSM8KScorerConfig(Section):
    method: Literal["strict", "flexible"] = Field(
        "strict", description="Place of the answer; strict: after the last ####; flexible: the last number."
    )
    score: float = Field(1.0, description="Score of a right answer.")
    format_score: float = Field(0.0, description="Score of a wrong answer that could be read.")


class RightOrWrongConfig(Section):
    score: float = Field(1.0, description="Score of a right answer.")
    wrong_score: float = Field(0.0, description="Score of any other response.")


class DAPOScorerConfig(RightOrWrongConfig):
    method: Literal["answer", "boxed"] = Field(
        "answer", description="Place of the answer; answer: after the last Answer:; boxed: in the last \\boxed{}."
    )
    wrong_score: float = Field(-1.0, description="Score of any other response.")


class ExactMatchConfig(RightOrWrongConfig):
    marker: str | None = Field(
        None,
        min_length=1,
        description="The answer follows the last occurrence of this text; null: the answer is the whole response.",
    )
    ignore_case: bool = Field(False, description="Ignore the case of letters.")


class JSONMatchConfig(Section):
    score: float = Field(1.0, description="Score of the right content.")
    format_score: float = Field(0.0, description="Score of valid JSON with other content.")


class SandboxLimitsConfig(Section):
    cpu_seconds: PositiveInt = Field(5, description="CPU seconds per process.")
    wall_seconds: PositiveInt = Field(10, description="Seconds per test.")
    memory_mb: PositiveInt = Field(1024, description="Address space per process.")
    processes: PositiveInt = Field(4, le=64, description="Processes and threads at the same time.")
    file_mb: PositiveInt = Field(16, description="Size of a file, and of the printed output.")
    disk_mb: PositiveInt = Field(32, description="Size of all files in the working folder.")
    files: PositiveInt = Field(256, description="Files and folders in the working folder.")
    open_files: PositiveInt = Field(64, description="Open files per process.")


class CodeScorerConfig(Section):
    score_by: Literal["all", "share"] = Field(
        "all", description="all: 1 when every test passes, else 0; share: the share of tests that pass."
    )
    max_tests: PositiveInt | None = Field(
        None, description="Number of a problem's tests to run, from the first; null: all."
    )
    total_seconds: float = Field(
        15.0,
        gt=0,
        description="Seconds after which no further test of a response starts. The remaining tests count as failed.",
    )
    limits: SandboxLimitsConfig = SandboxLimitsConfig()


class JudgeConfig(Section):
    url: str | None = Field(None, description="OpenAI-compatible API, such as http://127.0.0.1:8000/v1.")
    model: str | None = Field(None, description="Name of the model there.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the API key; null: no key.")
    template: str | None = Field(
        None,
        description="Question to the judge, with {prompt}, {response} and {ground_truth} filled in; null: how well the "
        "response answers the prompt, from 0 to 10.",
    )
    pattern: str = Field(
        r"[Ss]core\W*\s(-?\d+(?:\.\d+)?)",
        description="Regular expression whose one group is the score; the last match counts.",
    )
    lowest: float = Field(0.0, description="Smallest valid score. A number outside the bounds is a failure.")
    highest: float = Field(10.0, description="Largest valid score.")
    temperature: float = Field(0.0, ge=0, description="Temperature of the judge's answers.")
    max_tokens: PositiveInt = Field(1024, description="Most tokens of an answer.")
    concurrency: PositiveInt = Field(32, description="Questions at the same time.")
    timeout: float = Field(120.0, gt=0, description="Seconds to wait for an answer.")
    retries: int = Field(
        5,
        ge=0,
        description="Further attempts if there is no answer, the server is busy or fails, or the answer has no score.",
    )
    backoff: float = Field(
        1.0,
        ge=0,
        description="Seconds before the second attempt, doubled each time. The server's retry-after takes precedence.",
    )
    cache: str | None = Field(None, description="SQLite file that caches answers for all runs that name it.")
    on_failure: Literal["error", "error_score"] = Field(
        "error",
        description="If there is no score; error: the run ends; error_score: the score is reward.error_score, as for "
        "other scorers.",
    )


class RewardConfig(Section):
    num_workers: Annotated[PositiveInt, ONE_CALL] = Field(2, description="Number of processes that score responses.")
    timeout: float = Field(30.0, gt=0, description="Seconds that scoring one response may take.")
    error_score: float = Field(0.0, description="Score of a response whose scoring failed or took too long.")
    max_error_share: Share = Field(
        0.1, description="Largest share of a step's responses whose scoring may fail. Above it the run stops."
    )
    data_sources: Annotated[dict[str, str], CUSTOM_FUNCTION] = Field(
        {},
        description="Data sources (patterns such as my/*) and the scorer of each: the name of a built-in scorer, or "
        "your own function as module:function. They take precedence over the built-in data sources.",
    )
    gsm8k: Annotated[GSM8KScorerConfig, CUSTOM_FUNCTION] = GSM8KScorerConfig()
    math: Annotated[RightOrWrongConfig, CUSTOM_FUNCTION] = RightOrWrongConfig()
    math_dapo: Annotated[DAPOScorerConfig, CUSTOM_FUNCTION] = DAPOScorerConfig()
    multiple_choice: Annotated[RightOrWrongConfig, CUSTOM_FUNCTION] = RightOrWrongConfig()
    exact_match: Annotated[ExactMatchConfig, CUSTOM_FUNCTION] = ExactMatchConfig()
    json_match: Annotated[JSONMatchConfig, CUSTOM_FUNCTION] = JSONMatchConfig()
    code: Annotated[CodeScorerConfig, CUSTOM_FUNCTION] = CodeScorerConfig()
    judge: Annotated[JudgeConfig, CUSTOM_FUNCTION] = JudgeConfig()
