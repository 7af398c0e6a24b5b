"""``python3 -m verl.trainer.main_ppo key=value ...`` trains a model with PPO. ``--help`` shows the usage.

The module is light: torch is imported only after the checks have passed. Scoring processes import this module too.
"""

from __future__ import annotations

import sys

from verl.errors import UserError
from verl.trainer.environment import share_cores


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 for success, 2 for wrong settings, 1 for other errors that the user can fix."""
    from verl.checks.dry_run import print_plan
    from verl.checks.preflight import check
    from verl.config.loading.load import load
    from verl.config.loading.problems import report
    from verl.config.sections.models import Config

    try:
        loaded = load(sys.argv[1:] if argv is None else argv, Config)
        if loaded.draft.trainer.dry_run:
            return print_plan(loaded)
        plan, findings = check(loaded, dry_run=False)
        if findings.problems:
            print(report(findings.problems), file=sys.stderr)
            return 2
        share_cores()
        from verl.trainer.ppo.run import run

        return run(loaded, plan, findings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # before or after the run, which handles its own
        print("Stopped.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
