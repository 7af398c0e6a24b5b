"""``python3 -m verl.trainer.main_ppo key=value ...``: train a model with PPO. ``--help`` says more.

Light on purpose: torch is imported only once the checks have passed, and processes that score import this module, too.
"""

from __future__ import annotations

import sys

from verl.errors import UserError
from verl.trainer.environment import share_cores


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 when all went well, 2 when the settings are wrong, 1 for other errors that the user can mend."""
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
