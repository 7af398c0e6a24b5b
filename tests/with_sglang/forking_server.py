"""``python -m sglang.launch_server``, whose workers are forks of it: they start in less time."""

import runpy

from sglang.srt.entrypoints import engine

from verl.rollout.engines.sglang.engine_process import forking

if __name__ == "__main__":
    engine.Engine = forking(engine.Engine)
    runpy.run_module("sglang.launch_server", run_name="__main__")
