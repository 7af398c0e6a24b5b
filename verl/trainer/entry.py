"""Shared by all entry points but PPO's: loads settings, checks them, runs, and returns an exit code."""

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
    plan_text: Callable[[Any], str],
    run: Callable[[Any, Any], int],
) -> int:
    """The exit code: 0 for success, 2 for wrong settings, 1 for other errors that the user can fix.

    schema: class of the configuration. check(loaded, dry_run=...) returns the findings. run(loaded, findings) imports
    torch; plan_text(config), for a dry run, does not. argv: None for the command line.
    """
    from verl.checks.dry_run import print_dry_run
    from verl.config.loading.load import load
    from verl.config.loading.problems import report

    try:
        loaded = load(sys.argv[1:] if argv is None else argv, schema)
        dry_run = loaded.draft.trainer.dry_run
        findings = check(loaded, dry_run=dry_run)
        if dry_run:
            return print_dry_run(None if loaded.config is None else plan_text(loaded.config), findings)
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
