"""``python -m verl.rollout.engines.vllm.engine_process``: the process of one vLLM replica."""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Any

from verl.errors import UserError
from verl.rollout.client.backend import GenerateRequest, TokenChunk
from verl.rollout.engines.vllm.arguments import VLLM
from verl.rollout.engines.vllm.sampling_params import sampling_params
from verl.rollout.processes.engine_server import EngineServer, check_arguments, run
from verl.rollout.processes.order_loop import Orders

LOOK_EVERY = 0.2
DEATH_TIMEOUT = 5.0  # seconds from a worker's end to that of the engine


class Server(EngineServer):
    """vLLM's front end in this process, its scheduler and its workers in children of it.

    On a CPU the scheduler is a fork, as it is by default elsewhere: started afresh, it imports for 10 s what is here.
    """

    def __init__(self, orders: Orders, arguments: dict[str, Any]):
        import vllm
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.platforms import current_platform
        from vllm.v1.engine import utils as core
        from vllm.v1.engine.async_llm import AsyncLLM

        super().__init__(orders, VLLM)
        known = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
        check_arguments(VLLM, arguments, known, vllm.__version__)
        self.loop = asyncio.new_event_loop()
        if current_platform.is_cpu():
            core.get_mp_context = partial(multiprocessing.get_context, "fork")
        self.engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**arguments))
        self._cache_sleeps = False
        self._seeded = current_platform.is_cpu()  # as ``capabilities_of`` says
        problems = self.loop.run_until_complete(self.engine.collective_rpc("prepare"))
        if problems[0]:
            self.engine.shutdown()
            raise UserError(
                f"vLLM {vllm.__version__} cannot take new weights for this model: {problems[0]}. Use "
                "actor_rollout_ref.rollout.name=sglang or hf"
            )

    def facts(self) -> dict[str, Any]:
        import vllm

        cache = self.engine.vllm_config.cache_config
        return {
            "version": vllm.__version__,
            "end_tokens": [],  # all of them come with the request
            "max_total_tokens": cache.num_gpu_blocks * cache.block_size,
        }

    async def serve(self, first_order: int) -> None:
        looking = asyncio.ensure_future(self._look())
        await super().serve(first_order)
        looking.cancel()

    async def _look(self) -> None:
        """A front end that has lost its scheduler or a worker would answer every order with an error: it ends here."""
        while not self.engine.errored:
            await asyncio.sleep(LOOK_EVERY)
        leave()

    async def _workers(self, method: str) -> None:
        """Each worker's method. The end of one may be told here first, as an error like any other."""
        try:
            await self.engine.collective_rpc(method)
        except Exception:
            await asyncio.sleep(DEATH_TIMEOUT)  # in which ``_look`` sees it
            raise

    def shutdown(self) -> None:
        self.engine.shutdown()

    # ---- orders

    async def outputs(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        prompt = {"prompt_token_ids": request.prompt_ids}
        try:
            async for output in self.engine.generate(prompt, sampling_params(request, self._seeded), request.id):
                (completion,) = output.outputs
                ids = list(completion.token_ids)
                log_probs = completion.logprobs.logprobs if ids else []
                yield TokenChunk(request.id, ids, log_probs, completion.finish_reason)
        except Exception:
            if self.engine.errored:  # the request is not to blame
                leave()
            raise

    async def abort_in_engine(self, request_ids: Sequence[str]) -> None:
        await self.engine.abort(request_ids)

    def generated_so_far(self, request_ids: Sequence[str]) -> list[int]:
        states = self.engine.output_processor.request_states.values()
        asked = set(request_ids)
        return [state.detokenizer.num_output_tokens() for state in states if state.external_req_id in asked]

    async def receive_weights(self, version: int | None) -> None:
        await self._workers("receive_weights")

    async def flush(self) -> str | None:
        return None if await self.engine.reset_prefix_cache() else "blocks of its cache are in use"

    async def sleep(self, tags: Sequence[str]) -> None:
        """Weights sleep at vLLM's level 2, at which the cache goes, too: it comes back at once where it was to stay."""
        if "kv_cache" in tags:
            await self.engine.pause_generation()
            await self.engine.release_kv_cache_memory()
            self._cache_sleeps = True
        if "weights" in tags:
            await self.engine.sleep(level=2)
            if not self._cache_sleeps:
                await self.engine.wake_up(["kv_cache"])

    async def wake(self, tags: Sequence[str]) -> None:
        await self.engine.wake_up(list(tags))
        self._cache_sleeps = self._cache_sleeps and "kv_cache" not in tags

    async def health(self) -> None:
        """An answer from the scheduler and every worker, without a forward: the memory may be asleep."""
        await self._workers("check_health")


def leave() -> None:
    """The engine has died, and its last words are in the output. What is left of it ends with this process."""
    os._exit(1)


if __name__ == "__main__":
    run(Server)
