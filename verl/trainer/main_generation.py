"""``python3 -m verl.trainer.main_generation key=value ...``: responses to a file of prompts. ``--help`` says more.

Light on purpose: torch is imported only once the checks have passed.
"""

from __future__ import annotations

import sys
from typing import Any

from verl.trainer.entry import enter


def main(argv: list[str] | None = None) -> int:
    """The exit code, see ``enter``; 130 when it was interrupted and the same command goes on."""
    from verl.checks.generation import check, plan_text
    from verl.config.sections.models import GenerationConfig

    def run(*found: Any) -> int:
        from verl.trainer.generation.run import run

        return run(*found)

    return enter(argv, GenerationConfig, check, plan_text, run)


if __name__ == "__main__":
    sys.exit(main())
