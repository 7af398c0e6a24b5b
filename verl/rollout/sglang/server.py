"""``python -m verl.rollout.sglang.server``: the process of one SGLang replica, started by ``SGLangProcess``."""

from __future__ import annotations

import asyncio
import dataclasses
import difflib
import os
import signal
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import psutil

from verl.errors import UserError
from verl.rollout.backend import Draw, Drawn
from verl.rollout.serve import Orders
from verl.rollout.sglang.receiver import LOADER
from verl.rollout.sglang.requests import sampling_params

IDLE_TIMEOUT = 60.0
ABORT_INTERVAL = 0.05
LOOK_EVERY = 0.5


def main() -> None:
    orders = Orders()
    number, order, (arguments,) = orders.first()
    assert order == "start", order
    try:
        server = Server(orders, arguments)
    except UserError as error:
        orders.answer(number, False, error)
        return
    serve = server.serve(number) if server.is_first else server.serve_part(number)
    server.engine.loop.run_until_complete(serve)


class Server:
    """SGLang's engine in this process, its workers in children of it."""

    def __init__(self, orders: Orders, arguments: dict[str, Any]):
        import sglang
        from sglang.srt.server_args import ServerArgs

        _check_arguments(arguments, [field.name for field in dataclasses.fields(ServerArgs)], sglang.__version__)
        self._orders = orders
        self._under_way: set[str] = set()
        self.engine = sglang.Engine(**arguments, custom_weight_loader=[LOADER])
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
        self._manager.auto_create_handle_loop()  # its signal handlers and readers, before anything can go wrong
        self._orders.answer(first_order, True, self.facts())
        handlers: dict[str, Callable[..., Awaitable[Any]]] = {
            "draw": self.draw,
            "recall": self.recall,
            "receive_weights": self.receive_weights,
            "drop_cache": self.drop_cache,
            "sleep": self.sleep,
            "wake": self.wake,
            "health": self.health,
            "tokens_under_way": self.tokens_under_way,
        }
        await self._orders.serve(handlers, self.engine.shutdown)

    async def serve_part(self, first_order: int) -> None:
        """SGLang leaves the processes of other nodes to themselves: one that has lost a worker ends here."""
        workers = self.engine._scheduler_init_result.all_child_pids
        self._orders.answer(first_order, True, {})

        async def look() -> None:
            while not any(map(_has_ended, workers)):
                await asyncio.sleep(LOOK_EVERY)
            os.killpg(0, signal.SIGKILL)

        looking = asyncio.ensure_future(look())
        await self._orders.serve({}, self.engine.shutdown)
        looking.cancel()

    # ---- orders

    async def draw(self, draws: Sequence[Draw]) -> None:
        self._under_way.update(draw.id for draw in draws)
        await asyncio.gather(*(self._draw(draw) for draw in draws))

    async def _draw(self, draw: Draw) -> None:
        from sglang.srt.managers.io_struct import GenerateReqInput

        request = GenerateReqInput(
            rid=draw.id,
            input_ids=draw.prompt_ids,
            image_data=list(draw.images) or None,
            sampling_params=sampling_params(draw),
            return_logprob=True,
            stream=draw.stream,
        )
        reported = 0
        try:
            async for output in self._manager.generate_request(request, None):
                meta = output["meta_info"]
                ids, log_probs = output["output_ids"], meta["output_token_logprobs"]
                finish = (meta["finish_reason"] or {}).get("type")
                new = [log_prob for log_prob, _, _ in log_probs[reported:]]
                self._orders.report(Drawn(draw.id, list(ids[reported : reported + len(new)]), new, finish))
                reported += len(new)
        except Exception as error:
            self._orders.report((draw.id, f"SGLang did not take the request: {error}"))
        finally:
            self._under_way.discard(draw.id)

    async def recall(self, draw_ids: Sequence[str]) -> None:
        """Again and again: a request that has not reached the scheduler yet is not there to be aborted."""
        while under_way := [id for id in draw_ids if id in self._under_way]:
            for id in under_way:
                self._manager.abort_request(rid=id)
            await asyncio.sleep(ABORT_INTERVAL)

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

    async def drop_cache(self) -> None:
        """Also says that the scheduler is idle, which it asserts in orders that follow."""
        deadline = time.monotonic() + IDLE_TIMEOUT
        while not (answer := await self._manager.flush_cache()).success:
            if time.monotonic() > deadline:
                raise RuntimeError(f"SGLang is not idle after {IDLE_TIMEOUT:.0f} s: {answer.message}")
            await asyncio.sleep(0.005)

    async def sleep(self, tags: Sequence[str]) -> None:
        from sglang.srt.managers.io_struct import ReleaseMemoryOccupationReqInput

        await self._manager.release_memory_occupation(ReleaseMemoryOccupationReqInput(tags=list(tags)), None)

    async def wake(self, tags: Sequence[str]) -> None:
        from sglang.srt.managers.io_struct import ResumeMemoryOccupationReqInput

        await self._manager.resume_memory_occupation(ResumeMemoryOccupationReqInput(tags=list(tags)), None)

    async def tokens_under_way(self) -> int:
        """Of all draws that have not ended: what the scheduler has in its batch. 0 where it does not say."""
        states = self._manager.rid_to_state
        return max((len(states[id].output_ids) for id in self._under_way if id in states), default=0)

    async def health(self) -> None:
        """An answer from every scheduler, without a forward: the memory may be asleep."""
        await self._manager.get_internal_state()


def _has_ended(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def _check_arguments(arguments: dict[str, Any], known: Sequence[str], version: str) -> None:
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; the nearest is {near[0]}" if near else ""
            raise UserError(
                f"actor_rollout_ref.rollout.engine_kwargs.sglang.{name}: SGLang {version} has no such argument{hint}"
            )


if __name__ == "__main__":
    main()
