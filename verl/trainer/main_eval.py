"""``python3 -m verl.trainer.main_eval key=value ...`` scores a file of responses. ``--help`` shows the usage.

The module is light: scoring processes import it too.
"""

from __future__ import annotations

import sys
from typing import Any

from verl.trainer.entry import enter


def main(argv: list[str] | None = None) -> int:
    """The exit code, see ``enter``."""
    from verl.checks.evaluation import check, plan_text
    from verl.config.sections.models import EvalConfig

    def run(*found: Any) -> int:
        from verl.trainer.evaluation.run import run

        return run(*found)

    return enter(argv, EvalConfig, check, plan_text, run)


if __name__ == "__main__":
    sys.exit(main())
