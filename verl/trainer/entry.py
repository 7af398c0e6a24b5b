"""What the entry points without a plan of PPO's have in common: settings, checks, the run, an exit code."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from verl.errors import UserError
from verl.trainer.environment import share_cores


def enter(
    argv: Sequence[str] | None,
    schema: Any,
    check: Callable[..., Any],
    print_plan: Callable[[Any], int],
    run: Callable[[Any, Any], int],
) -> int:
    """The exit code: 0 when all went well, 2 when the settings are wrong, 1 for other errors that the user can mend.

    schema: class of the configuration. check(loaded, dry_run=False) finds what is wrong with it; run(loaded, findings)
    imports torch, print_plan(loaded) does not. argv: None for the command line.
    """
    from verl.config.load import load
    from verl.config.problems import report

    try:
        loaded = load(sys.argv[1:] if argv is None else argv, schema)
        if loaded.draft.trainer.dry_run:
            return print_plan(loaded)
        findings = check(loaded, dry_run=False)
        if findings.problems:
            print(report(findings.problems), file=sys.stderr)
            return 2
        share_cores()
        return run(loaded, findings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
