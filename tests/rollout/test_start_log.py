"""What a starting engine says it is doing."""

from itertools import pairwise

from verl.rollout.engines.sglang.arguments import MILESTONES
from verl.rollout.processes.start_log import StartLog

# As SGLang 0.5.14 writes them.
LINES = [
    "[2026-12-01 00:00:00] server_args=ServerArgs(model_path='m')",
    "[2026-12-01 00:00:08] Init torch distributed begin.",
    "[2026-12-01 00:00:10] Load weight begin. avail mem=139.00 GB",
    "[2026-12-01 00:00:12] KV Cache is allocated. dtype: torch.bfloat16, #tokens: 7",
    "[2026-12-01 00:00:20] Capture decode cuda graph begin. This can take up to several minutes.",
]


def test_each_milestone_is_noted_once_as_the_log_reaches_it(tmp_path):
    notes: list[str] = []
    now = 0.0
    path = tmp_path / "sglang.log"
    log = StartLog(path, MILESTONES, notes.append, "SGLang", clock=lambda: now)
    log.look()  # there is no log yet
    text = "\n".join(LINES) + "\n"
    cuts = [0, text.index("Load weight begin") + 5, text.index("Capture") - 3, len(text)]  # in the middle of lines
    for number, (start, end) in enumerate(pairwise(cuts), start=1):
        now = 10.0 * number
        with path.open("a") as file:
            file.write(text[start:end])
        log.look()
        log.look()
    with path.open("a") as file:
        file.write("\rCapturing batches (bs=512)\r" + text)
    log.look()
    assert notes == [
        "SGLang, after 10 s: setting up the device",
        "SGLang, after 20 s: loading the weights",
        "SGLang, after 20 s: the KV cache is allocated",
        "SGLang, after 30 s: capturing CUDA graphs",
    ]
