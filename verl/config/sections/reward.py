"""How responses are scored."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from verl.config.sections.base import PositiveInt, Section, Share, derived
from verl.config.sections.parts import FSDPConfig, ModelConfig


class CustomRewardFunctionConfig(Section):
    path: str | None = Field(None, description="Python file with your reward function; null: the data source's scorer.")
    name: str = Field("compute_score", description="Name of the function in that file.")
    reward_kwargs: dict[str, Any] = Field({}, description="Further keyword arguments of every call.")


class OverlongBufferConfig(Section):
    enable: bool = Field(False, description="Take a penalty off the reward of a response that nears the length limit.")
    len: int = Field(0, ge=0, description="Tokens before data.max_response_length from which on it grows.")
    penalty_factor: float = Field(1.0, ge=0, description="Penalty at the limit.")


class RewardModelModelConfig(ModelConfig):
    path: str = Field("", description="Sequence classifier with one label: folder in Hugging Face format, or hub id.")
    input_tokenizer: str | None = Field(
        None,
        description="The policy's tokenizer, where the reward model has another one or another chat template: "
        "responses are decoded by it and tokenised again; null: the token ids stay.",
    )
    fsdp_config: FSDPConfig = FSDPConfig()


class RewardModelConfig(Section):
    enable: bool = Field(False, description="Score with a reward model.")
    combine: Literal["replace", "add"] = Field(
        "replace", description="Its score: replace: is the score; add: is added to the scorers'."
    )
    model: RewardModelModelConfig = RewardModelModelConfig()
    micro_batch_size_per_gpu: PositiveInt | None = Field(
        None, description="Responses of one forward pass of a rank; null: by tokens."
    )
    use_dynamic_bsz: bool = derived("Cut micro-batches by tokens even where a number of responses is set.")
    forward_max_token_len_per_gpu: PositiveInt = derived("Tokens of a micro-batch that is cut by tokens.")
    reward_manager: Literal["naive", "batch"] = Field(
        "naive",
        description="naive: each response is scored by itself, while others are generated; batch: "
        "custom_reward_function gets all of a step's at once, in lists.",
    )
    overlong_buffer: OverlongBufferConfig = OverlongBufferConfig()


class GSM8KScorerConfig(Section):
    method: Literal["strict", "flexible"] = Field(
        "strict", description="Where the answer is: strict: after the last ####; flexible: the last number."
    )
    score: float = Field(1.0, description="Score of a right answer.")
    format_score: float = Field(0.0, description="Score of a wrong answer that could be read.")


class RightOrWrongConfig(Section):
    score: float = Field(1.0, description="Score of a right answer.")
    wrong_score: float = Field(0.0, description="Score of any other response.")


class DAPOScorerConfig(RightOrWrongConfig):
    method: Literal["answer", "boxed"] = Field(
        "answer", description="Where the answer is: answer: behind the last Answer:; boxed: in the last \\boxed{}."
    )
    wrong_score: float = Field(-1.0, description="Score of any other response.")


class ExactMatchConfig(RightOrWrongConfig):
    marker: str | None = Field(
        None, min_length=1, description="The answer is behind the last occurrence of this; null: the whole response."
    )
    ignore_case: bool = Field(False, description="Upper and lower case are the same.")


class JSONMatchConfig(Section):
    score: float = Field(1.0, description="Score of the right content.")
    format_score: float = Field(0.0, description="Score of JSON with another content.")


class SandboxLimitsConfig(Section):
    cpu_seconds: PositiveInt = Field(5, description="CPU time of a process.")
    wall_seconds: PositiveInt = Field(10, description="Time of a test.")
    memory_mb: PositiveInt = Field(1024, description="Address space of a process.")
    processes: PositiveInt = Field(4, le=64, description="Processes and threads at a time.")
    file_mb: PositiveInt = Field(16, description="Size of a file, and of what is printed.")
    disk_mb: PositiveInt = Field(32, description="Size of all files in the working folder.")
    files: PositiveInt = Field(256, description="Files and folders in the working folder.")
    open_files: PositiveInt = Field(64, description="Files that a process has open at a time.")


class CodeScorerConfig(Section):
    score_by: Literal["all", "share"] = Field(
        "all", description="all: 1 when every test passes, else 0; share: the share of tests that pass."
    )
    max_tests: PositiveInt | None = Field(None, description="Only a problem's first so many tests; null: all.")
    total_seconds: float = Field(
        15.0, gt=0, description="Seconds after which no further test of a response begins; those left have failed."
    )
    limits: SandboxLimitsConfig = SandboxLimitsConfig()


class JudgeConfig(Section):
    url: str | None = Field(None, description="OpenAI-compatible API, such as http://127.0.0.1:8000/v1.")
    model: str | None = Field(None, description="Name of the model there.")
    api_key_env: str | None = Field(None, description="Environment variable that holds the API key; null: no key.")
    template: str | None = Field(
        None,
        description="What it is asked, with {prompt}, {response} and {ground_truth} filled in; null: how well the "
        "response answers the prompt, from 0 to 10.",
    )
    pattern: str = Field(
        r"[Ss]core\W*\s(-?\d+(?:\.\d+)?)",
        description="Regular expression whose one group is the score; the last match counts.",
    )
    lowest: float = Field(0.0, description="Smallest number that is a score; another one is a failure.")
    highest: float = Field(10.0, description="Largest.")
    temperature: float = Field(0.0, ge=0, description="Temperature of the judge's answers.")
    max_tokens: PositiveInt = Field(1024, description="Tokens of an answer.")
    concurrency: PositiveInt = Field(32, description="Questions at a time.")
    timeout: float = Field(120.0, gt=0, description="Seconds to wait for an answer.")
    retries: int = Field(
        5, ge=0, description="Further tries after no answer, a busy or broken server, or an answer without a score."
    )
    backoff: float = Field(
        1.0, ge=0, description="Seconds before the second try, doubled each time; the server's retry-after goes first."
    )
    cache: str | None = Field(None, description="SQLite file that keeps answers, for all runs that name it.")
    on_failure: Literal["error", "error_score"] = Field(
        "error",
        description="When no score comes: error: the run ends; error_score: reward.error_score, as for other scorers.",
    )


class RewardConfig(Section):
    num_workers: PositiveInt = Field(2, description="Processes that score responses.")
    timeout: float = Field(30.0, gt=0, description="Seconds that scoring one response may take.")
    error_score: float = Field(0.0, description="Score of a response whose scoring failed or took too long.")
    max_error_share: Share = Field(
        0.1, description="Share of a step's responses whose scoring may fail; past it the run stops."
    )
    data_sources: dict[str, str] = Field(
        {},
        description="Data sources (patterns such as my/*) and the scorer of each: one of these sections, or a function "
        "of yours as module:function. They come before the known ones.",
    )
    gsm8k: GSM8KScorerConfig = GSM8KScorerConfig()
    math: RightOrWrongConfig = RightOrWrongConfig()
    math_dapo: DAPOScorerConfig = DAPOScorerConfig()
    multiple_choice: RightOrWrongConfig = RightOrWrongConfig()
    exact_match: ExactMatchConfig = ExactMatchConfig()
    json_match: JSONMatchConfig = JSONMatchConfig()
    code: CodeScorerConfig = CodeScorerConfig()
    judge: JudgeConfig = JudgeConfig()
