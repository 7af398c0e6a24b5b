"""Generation: the engine, sampling, and the log-probs that the trainer computes of responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Gt, Le
from pydantic import Field

from verl.config.sections.base import CountOrAll, Integers, PositiveInt, Section, Strings, derived
from verl.config.sections.effects import NOT_VALIDATED, NoEffect, cut_by_sequences, cut_by_tokens, on_cpu

TopP = Annotated[float, Gt(0), Le(1)]

EMBEDDED = NoEffect(
    "the engine is embedded ({section}.name=hf): it runs the trainer's own model in the trainer's process",
    lambda rollout, run: rollout.name == "hf",
)
ON_SERVERS = NoEffect(
    "the engine is on servers ({section}.mode=server), which were started with their own settings",
    lambda rollout, run: rollout.mode == "server",
)
NOT_ON_SERVERS = NoEffect(
    "the engine runs on the trainer's devices ({section}.mode=colocated)",
    lambda rollout, run: rollout.mode == "colocated",
)
NO_GPU = NoEffect("the run is on a CPU, where the engine has no GPU memory to share and no CUDA graphs", on_cpu)
GREEDY = NoEffect("validation is greedy ({section}.do_sample=False)", lambda sampling, run: not sampling.do_sample)
OVER_HTTP = NoEffect(
    "new weights are sent over HTTP ({section}.server_weight_update=tensors)",
    lambda rollout, run: rollout.server_weight_update == "tensors",
)
THROUGH_FOLDER = NoEffect(
    "new weights are sent through a folder ({section}.server_weight_update=disk)",
    lambda rollout, run: rollout.mode == "server" and rollout.server_weight_update == "disk",
)


def only_for(engine: str) -> NoEffect:
    return NoEffect(f"the engine is not {engine} (rollout.name)", lambda section, run: run.engine != engine)


class ValidationSamplingConfig(Section):
    do_sample: bool = Field(False, description="Sample validation responses. False: take the most likely token.")
    temperature: Annotated[float, GREEDY] = Field(
        0.0, ge=0, description="Temperature of validation responses; 0 is greedy."
    )
    top_p: Annotated[TopP, GREEDY] = Field(1.0, description="As for training responses.")
    top_k: Annotated[CountOrAll, GREEDY] = Field(-1, description="As for training responses.")
    n: PositiveInt = Field(1, description="Responses per validation prompt.")


class EngineKwargsConfig(Section):
    sglang: Annotated[dict[str, Any], only_for("sglang")] = Field({}, description="Further server arguments of SGLang.")
    vllm: Annotated[dict[str, Any], only_for("vllm")] = Field(
        {}, description="Further engine arguments of vLLM (AsyncEngineArgs)."
    )

    def of(self, engine: str) -> dict[str, Any]:
        """The further arguments of this engine."""
        return getattr(self, engine, {})


class EngineConfig(Section):
    """The engine and its sampling, in training and in ``verl.trainer.main_generation``."""

    name: str = Field(description="Rollout engine: hf (embedded, works everywhere), sglang or vllm.")
    n: PositiveInt = Field(1, description="Responses per prompt.")
    temperature: float = Field(1.0, ge=0, description="Temperature of the responses; 0 is greedy.")
    top_p: TopP = Field(1.0, description="Sample from the most likely tokens that have this total probability; 1: all.")
    top_k: CountOrAll = Field(-1, description="Sample from this many most likely tokens; -1: all.")
    min_p: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Leave out tokens whose probability is below this share of the most likely token's; 0: none.",
    )
    min_new_tokens: int = Field(0, ge=0, description="Least number of tokens of a response.")
    ignore_eos: bool = Field(False, description="Continue after the model's end token, up to max_response_length.")
    stop: Strings = Field([], description="Text or texts that end a response.")
    stop_token_ids: Integers = Field([], description="Token ids that end a response, besides the model's own.")
    max_model_len: PositiveInt | None = Field(
        None, description="Context length of the engine; null: data.max_prompt_length + data.max_response_length."
    )
    max_num_seqs: Annotated[PositiveInt, ON_SERVERS] = Field(
        1024, description="Responses that an engine generates at the same time."
    )
    max_num_batched_tokens: Annotated[PositiveInt, ON_SERVERS] = Field(
        8192, description="Tokens per forward pass of the engine."
    )
    tensor_model_parallel_size: Annotated[PositiveInt, EMBEDDED, ON_SERVERS] = Field(
        1, description="GPUs that share one copy of the engine's model."
    )
    gpu_memory_utilization: Annotated[float, EMBEDDED, ON_SERVERS, NO_GPU] = Field(
        0.8,
        gt=0,
        le=1,
        description="Share of GPU memory for the engine: of the free memory (sglang), of all memory (vllm).",
    )
    enforce_eager: Annotated[bool, EMBEDDED, ON_SERVERS, NO_GPU] = Field(
        False, description="Run the engine without CUDA graphs."
    )
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], EMBEDDED] = Field(
        "auto", description="Type of the engine's weights; auto: bfloat16 on GPUs, else float32."
    )
    load_format: Annotated[str, EMBEDDED, ON_SERVERS] = Field(
        "auto", description="How the engine reads the model; auto: by the format of its files."
    )
    engine_kwargs: Annotated[EngineKwargsConfig, EMBEDDED, ON_SERVERS] = EngineKwargsConfig()
    mode: Literal["colocated", "server"] = Field(
        "colocated", description="colocated: the engine runs on this run's devices; server: on servers elsewhere."
    )
    server_urls: Annotated[Strings, NOT_ON_SERVERS] = Field(
        [], description="SGLang servers that serve this model: http://host:port."
    )
    server_api_key_env: Annotated[str | None, NOT_ON_SERVERS] = Field(
        None, description="Name of the environment variable that holds the servers' --api-key; null: no key."
    )


class RolloutConfig(EngineConfig):
    """The engine in training, with the keys that only training has."""

    n: PositiveInt = Field(1, description="Responses per training prompt.")
    temperature: float = Field(1.0, gt=0, description="Temperature of training responses and of all log-probs.")
    val_kwargs: Annotated[ValidationSamplingConfig, NOT_VALIDATED] = ValidationSamplingConfig()
    log_prob_micro_batch_size_per_gpu: Annotated[
        PositiveInt | None, cut_by_tokens("old_log_probs", "ref_log_probs", "reward_scores")
    ] = Field(None, description="Responses per forward pass of a rank that computes the old log-probs.")
    log_prob_use_dynamic_bsz: bool = derived("Cut micro-batches by tokens even if a number of responses is set.")
    log_prob_max_token_len_per_gpu: Annotated[
        PositiveInt, cut_by_sequences("old_log_probs", "ref_log_probs", "reward_scores")
    ] = derived("Most tokens of a micro-batch that is cut by tokens.")
    gpu_memory_utilization: Annotated[float, EMBEDDED, ON_SERVERS, NO_GPU] = Field(
        0.5,
        gt=0,
        le=1,
        description="Share of GPU memory for the engine: of the free memory (sglang), of all memory (vllm).",
    )
    free_cache_engine: Annotated[bool, EMBEDDED, ON_SERVERS, NO_GPU] = Field(
        True, description="The engine frees its weights and KV cache on the GPU while training runs."
    )
    dtype: Annotated[Literal["auto", "bfloat16", "float16", "float32"], EMBEDDED] = Field(
        "auto", description="Type of the engine's weights; auto: the actor's compute type."
    )
    load_format: Annotated[str, EMBEDDED, ON_SERVERS] = Field(
        "dummy", description="Weights that the engine starts with; dummy: random ones, replaced by the actor's."
    )
    update_weights_bucket_megabytes: Annotated[PositiveInt, EMBEDDED, THROUGH_FOLDER] = Field(
        256, description="Size of each of the two buffers through which new weights are sent to the engine."
    )
    mode: Literal["colocated", "server"] = Field(
        "colocated", description="colocated: the engine runs on the trainer's devices; server: on servers elsewhere."
    )
    server_urls: Annotated[Strings, NOT_ON_SERVERS] = Field(
        [], description="SGLang servers that were started for this run: http://host:port."
    )
    server_weight_update: Annotated[Literal["tensors", "disk"], NOT_ON_SERVERS] = Field(
        "tensors", description="How servers get new weights: over HTTP (tensors), or through a shared folder (disk)."
    )
    server_weights_dir: Annotated[str | None, NOT_ON_SERVERS, OVER_HTTP] = Field(
        None, description="That shared folder. It needs room for two versions of the weights."
    )
