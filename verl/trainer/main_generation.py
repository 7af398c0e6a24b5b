"""``python3 -m verl.trainer.main_generation key=value ...`` generates responses to a file of prompts.

``--help`` shows the usage. The module is light: torch is imported only after the checks have passed.
"""

from __future__ import annotations

import sys
from typing import Any

from verl.trainer.entry import enter


def main(argv: list[str] | None = None) -> int:
    """The exit code, see ``enter``; 130 if the run was interrupted. The same command then resumes it."""
    from verl.checks.generation import check, plan_text
    from verl.config.sections.models import GenerationConfig

    def run(*found: Any) -> int:
        from verl.trainer.generation.run import run

        return run(*found)

    return enter(argv, GenerationConfig, check, plan_text, run)


if __name__ == "__main__":
    sys.exit(main())
