"""``python -m verl.rollout.engines.sglang.engine_process``: the process of one SGLang replica."""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Sequence
from typing import Any

import psutil

from verl.rollout.client.backend import GenerateRequest, TokenChunk
from verl.rollout.engines.sglang.arguments import SGLANG, cuda_graphs
from verl.rollout.engines.sglang.receiver import LOADER
from verl.rollout.engines.sglang.sampling_params import sampling_params
from verl.rollout.processes.engine_server import EngineServer, check_arguments, run
from verl.rollout.processes.order_loop import Orders

LOOK_EVERY = 0.5


def forking(engine: type) -> type:
    """SGLang's Engine (it is imported where it is used). On a CPU its workers are forks of the process that makes it
    and not started afresh: each would import for 7 s what is here already. (What CUDA has opened no fork can use.)"""

    class Forking(engine):
        @classmethod
        def _launch_scheduler_processes(cls, server_args: Any, *args: Any, **options: Any) -> Any:
            if server_args.device == "cpu":
                multiprocessing.set_start_method("fork", force=True)
            return super()._launch_scheduler_processes(server_args, *args, **options)

    return Forking


class Server(EngineServer):
    """SGLang's engine in this process, its workers in children of it."""

    def __init__(self, orders: Orders, arguments: dict[str, Any]):
        import sglang
        from sglang.srt.entrypoints.engine import Engine
        from sglang.srt.server_args import ServerArgs
        from sglang.srt.utils import get_device_memory_capacity

        super().__init__(orders, SGLANG)
        known = {field.name for field in dataclasses.fields(ServerArgs)}
        graphs = cuda_graphs(arguments, get_device_memory_capacity(arguments["device"]) or 0)
        arguments |= {name: graphs[name] for name in known & graphs.keys()}
        check_arguments(SGLANG, arguments, sorted(known), sglang.__version__)
        self.engine = forking(Engine)(**arguments, custom_weight_loader=[LOADER])
        self.loop = self.engine.loop
        self._manager = self.engine.tokenizer_manager
        self._ranks = arguments["tp_size"]
        self.is_first = arguments.get("node_rank", 0) == 0  # only the first node's process takes requests

    def facts(self) -> dict[str, Any]:
        import sglang

        info = self.engine.server_args
        model = self._manager.model_config
        return {
            "version": sglang.__version__,
            "end_tokens": sorted(model.hf_eos_token_id or ()),
            "attention_backend": info.attention_backend,
            "sampling_backend": info.sampling_backend,
            "max_total_tokens": self.engine._scheduler_init_result.scheduler_infos[0].get("max_total_num_tokens"),
        }

    async def serve(self, first_order: int) -> None:
        if not self.is_first:
            return await self._serve_part(first_order)
        self._manager.auto_create_handle_loop()  # its signal handlers and readers, before anything can go wrong
        await self._manager.freeze_gc()  # what is here now stays, and no collection looks at it again
        await super().serve(first_order)

    async def _serve_part(self, first_order: int) -> None:
        """SGLang leaves the processes of other nodes to themselves: one that has lost a worker ends here."""
        workers = self.engine._scheduler_init_result.all_child_pids
        self._orders.answer(first_order, True, {})

        async def look() -> None:
            while not any(map(_has_ended, workers)):
                await asyncio.sleep(LOOK_EVERY)
            os.killpg(0, signal.SIGKILL)

        looking = asyncio.ensure_future(look())
        await self._orders.serve({}, self.shutdown)
        looking.cancel()

    def shutdown(self) -> None:
        self.engine.shutdown()

    # ---- orders

    async def outputs(self, request: GenerateRequest) -> AsyncIterator[TokenChunk]:
        from sglang.srt.managers.io_struct import GenerateReqInput

        sent = GenerateReqInput(
            rid=request.id,
            input_ids=request.prompt_ids,
            image_data=list(request.images) or None,
            sampling_params=sampling_params(request),
            return_logprob=True,
            stream=request.stream,
        )
        reported = 0
        async for output in self._manager.generate_request(sent, None):
            meta = output["meta_info"]
            ids, log_probs = output["output_ids"], meta["output_token_logprobs"]
            finish = (meta["finish_reason"] or {}).get("type")
            new = [log_prob for log_prob, _, _ in log_probs[reported:]]
            yield TokenChunk(request.id, list(ids[reported : reported + len(new)]), new, finish)
            reported += len(new)

    async def abort_in_engine(self, request_ids: Sequence[str]) -> None:
        for id in request_ids:
            self._manager.abort_request(rid=id)

    async def receive_weights(self, version: int | None) -> None:
        from sglang.srt.managers.io_struct import UpdateWeightsFromTensorReqInput
        from sglang.srt.utils import MultiprocessingSerializer

        request = UpdateWeightsFromTensorReqInput(
            serialized_named_tensors=[MultiprocessingSerializer.serialize([])] * self._ranks,
            load_format=LOADER,
            flush_cache=False,  # it was dropped before, and nothing was drawn since
            weight_version=None if version is None else str(version),
        )
        worked, message = await self._manager.update_weights_from_tensor(request)
        if not worked:
            raise RuntimeError(f"SGLang refused the weight update: {message}")

    async def flush(self) -> str | None:
        """Also says that the scheduler is idle, which it asserts in orders that follow."""
        answer = await self._manager.flush_cache()
        return None if answer.success else str(answer.message)

    async def sleep(self, tags: Sequence[str]) -> None:
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        await self._manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=list(tags)), None)

    async def wake(self, tags: Sequence[str]) -> None:
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        await self._manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=list(tags)), None)

    def generated_so_far(self, request_ids: Sequence[str]) -> list[int]:
        """What the scheduler has in its batch."""
        states = self._manager.rid_to_state
        return [len(states[id].output_ids) for id in request_ids if id in states]

    async def health(self) -> None:
        """An answer from every scheduler, without a forward: the memory may be asleep."""
        await self._manager.get_internal_state()


def _has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


if __name__ == "__main__":
    run(Server)
