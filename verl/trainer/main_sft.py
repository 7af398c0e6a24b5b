"""``python3 -m verl.trainer.main_sft key=value ...``: supervised fine-tuning on prompts and responses.

Light on purpose: torch is imported only once the checks have passed.
"""

from __future__ import annotations

import sys

from verl.errors import UserError
from verl.trainer.environment import share_cores


def main(argv: list[str] | None = None) -> int:
    """The exit code, as of ``verl.trainer.main_ppo``."""
    from verl.checks.sft import check, print_plan
    from verl.config.load import load
    from verl.config.models import SFTConfig
    from verl.config.problems import report

    try:
        loaded = load(sys.argv[1:] if argv is None else argv, SFTConfig)
        if loaded.draft.trainer.dry_run:
            return print_plan(loaded)
        findings = check(loaded, dry_run=False)
        if findings.problems:
            print(report(findings.problems), file=sys.stderr)
            return 2
        share_cores()
        from verl.trainer.sft.run import run

        return run(loaded, findings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
