"""``python3 -m verl.trainer.main_sft key=value ...`` trains a model on prompts and responses.

``--help`` shows the usage. The module is light: torch is imported only after the checks have passed.
"""

from __future__ import annotations

import sys
from typing import Any

from verl.trainer.entry import enter


def main(argv: list[str] | None = None) -> int:
    """The exit code, see ``enter``."""
    from verl.checks.sft import check, plan_text
    from verl.config.sections.models import SFTConfig

    def run(*found: Any) -> int:
        from verl.trainer.sft.run import run

        return run(*found)

    return enter(argv, SFTConfig, check, plan_text, run)


if __name__ == "__main__":
    sys.exit(main())
