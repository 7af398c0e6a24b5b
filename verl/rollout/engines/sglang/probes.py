"""What can be told of a server's weights from outside."""

from __future__ import annotations

import math
import random
from typing import Any

import torch

from verl.rollout.engines.sglang.api import Refused, ServerAPI

ROWS = 4  # of a tensor, from its beginning
SAMPLE = 16  # tensors that are read back
# SGLang makes a list of the whole tensor before it cuts it to the rows that were asked for.
MOST_ELEMENTS = 1 << 21

PROBE_TOKENS = 256
# Between two passes over the same text on the same device.
SCORE_TOLERANCE = 1e-3


class ReadBack:
    """The beginnings of some of the tensors that were sent, to be compared with what the server holds.

    SGLang 0.5 gives parameters by the names of a checkpoint for few kinds of models (Llama and its like).
    """

    def __init__(self) -> None:
        self._sent: dict[str, torch.Tensor] = {}

    def note(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.dim() and tensor.numel() <= MOST_ELEMENTS:
            self._sent[name] = tensor[:ROWS].clone()

    async def differences(self, server: ServerAPI) -> list[str]:
        """Of a sample. Empty if the server gives no parameters at all."""
        names = list(self._sent)
        held: dict[str, Any] = {}
        for name in names[:: -(-len(names) // SAMPLE) or 1]:
            try:
                held[name] = await server.post("/get_weights_by_name", {"name": name, "truncate_size": ROWS})
            except Refused as error:
                if error.status != 400:
                    return []
                held[name] = None
        if all(values is None for values in held.values()):
            return []
        return [f"  {name} {how}" for name, values in held.items() if (how := self._difference(name, values))]

    def _difference(self, name: str, values: Any) -> str | None:
        if values is None:
            return "is not held by the server"
        sent, found = self._sent[name].float(), torch.tensor(values, dtype=torch.float32)
        if sent.shape != found.shape:
            return f"begins with a shape of {list(found.shape)}, not {list(sent.shape)}"
        kinds = (torch.float32, torch.bfloat16, torch.float16)  # the server's, which it does not say
        if any(torch.equal(sent.to(kind).float(), found) for kind in kinds):
            return None
        return f"differs by up to {float((sent - found).abs().max()):g}"


def probe_prompt(vocab_size: int, longest: int | None) -> list[int]:
    """The same for every server and version."""
    request = random.Random(0)
    return [request.randrange(vocab_size) for _ in range(min(PROBE_TOKENS, (longest or PROBE_TOKENS) - 2))]


def compare_scores(before: list[float], after: list[float]) -> list[str]:
    """Log-probs of the same text; what to say if they are not the same."""
    furthest = max(abs(one - other) for one, other in zip(before, after, strict=True))
    if furthest <= SCORE_TOLERANCE and all(map(math.isfinite, before + after)):
        return []
    return [
        f"the log-probs of a fixed text differ by up to {furthest:g} once all of the server's parameters were "
        "overwritten and the weights sent again: they do not fill all of them, or it held others before"
    ]
