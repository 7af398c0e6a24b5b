"""Generation: the engine, how responses are drawn, and the log-probs computed of them afterwards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Gt, Le
from pydantic import Field

from verl.config.sections.base import CountOrAll, Integers, PositiveInt, Section, Strings, derived

TopP = Annotated[float, Gt(0), Le(1)]


class ValidationSamplingConfig(Section):
    do_sample: bool = Field(False, description="Draw from the distribution; off: take the likeliest token.")
    temperature: float = Field(0.0, ge=0, description="Temperature of validation responses; 0 is greedy.")
    top_p: TopP = Field(1.0, description="As for training responses.")
    top_k: CountOrAll = Field(-1, description="As for training responses.")
    n: PositiveInt = Field(1, description="Responses to each validation prompt.")


class EngineKwargsConfig(Section):
    sglang: dict[str, Any] = Field({}, description="Further server arguments of SGLang.")
    vllm: dict[str, Any] = Field({}, description="Further engine arguments of vLLM (AsyncEngineArgs).")


class EngineConfig(Section):
    """The engine, and how a response is drawn: for training and for ``verl.trainer.main_generation``."""

    name: str = Field(description="Rollout engine: hf (embedded, works everywhere), sglang or vllm.")
    n: PositiveInt = Field(1, description="Responses to each prompt.")
    temperature: float = Field(1.0, ge=0, description="Temperature of the responses; 0 is greedy.")
    top_p: TopP = Field(1.0, description="Draw from the likeliest tokens that make up this probability; 1: all.")
    top_k: CountOrAll = Field(-1, description="Draw from this many likeliest tokens; -1: all.")
    min_p: float = Field(
        0.0, ge=0, lt=1, description="Leave out tokens less likely than this share of the likeliest; 0: none."
    )
    min_new_tokens: int = Field(0, ge=0, description="Do not end a response before it has this many tokens.")
    ignore_eos: bool = Field(False, description="Go on after the model's end token, to max_response_length.")
    stop: Strings = Field([], description="Text or texts that end a response.")
    stop_token_ids: Integers = Field([], description="Token ids that end a response, besides the model's own.")
    max_model_len: PositiveInt | None = Field(
        None, description="Context length of the engine; null: data.max_prompt_length + data.max_response_length."
    )
    max_num_seqs: PositiveInt | None = Field(
        None,
        description="Responses that an engine generates at a time; null: all that a step or a validation asks of it, "
        "up to 1024.",
    )
    max_num_batched_tokens: PositiveInt = Field(8192, description="Tokens of one forward pass of the engine.")
    tensor_model_parallel_size: PositiveInt = Field(1, description="GPUs that share one copy of the engine's model.")
    gpu_memory_utilization: float = Field(
        0.8,
        gt=0,
        le=1,
        description="Share of GPU memory for the engine: of the free one (sglang), of all (vllm).",
    )
    enforce_eager: bool = Field(False, description="Run the engine without CUDA graphs.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of the engine's weights; auto: bfloat16 on GPUs, else float32."
    )
    load_format: str = Field("auto", description="How the engine reads the model; auto: as its files are.")
    engine_kwargs: EngineKwargsConfig = EngineKwargsConfig()
    mode: Literal["colocated", "server"] = Field(
        "colocated", description="colocated: the engine runs on this run's devices; server: on servers elsewhere."
    )
    server_urls: Strings = Field([], description="SGLang servers that serve this model: http://host:port.")
    server_api_key_env: str | None = Field(
        None, description="Name of the environment variable that holds the servers' --api-key; null: they have none."
    )


class RolloutConfig(EngineConfig):
    """What training does with it besides."""

    n: PositiveInt = Field(1, description="Responses to each training prompt.")
    temperature: float = Field(1.0, gt=0, description="Temperature of training responses, and of all log-probs.")
    val_kwargs: ValidationSamplingConfig = ValidationSamplingConfig()
    log_prob_micro_batch_size_per_gpu: PositiveInt | None = Field(
        None, description="Responses of one forward pass of a rank, when the old log-probs are computed."
    )
    log_prob_use_dynamic_bsz: bool = derived("Cut micro-batches by tokens even where a number of responses is set.")
    log_prob_max_token_len_per_gpu: PositiveInt = derived("Tokens of a micro-batch that is cut by tokens.")
    gpu_memory_utilization: float = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of GPU memory for the engine: of the free one (sglang), of all (vllm).",
    )
    free_cache_engine: bool = Field(
        True, description="The engine gives its weights and KV cache back to the GPU while training runs."
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Type of the engine's weights; auto: the actor's compute type."
    )
    load_format: str = Field(
        "dummy", description="What the engine starts with; dummy: random weights, then the actor's."
    )
    update_weights_bucket_megabytes: PositiveInt = Field(
        256, description="Size of each of the two buffers through which new weights go to the engine."
    )
    mode: Literal["colocated", "server"] = Field(
        "colocated", description="colocated: the engine runs on the trainer's devices; server: on servers elsewhere."
    )
    server_urls: Strings = Field([], description="SGLang servers that were started for this run: http://host:port.")
    server_weight_update: Literal["tensors", "disk"] = Field(
        "tensors", description="How servers get new weights: over HTTP, or from a folder that they see as we do."
    )
    server_weights_dir: str | None = Field(
        None, description="That folder; it takes two versions of the weights for a moment."
    )
