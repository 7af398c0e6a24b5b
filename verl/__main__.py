"""``verl COMMAND ...`` or ``python3 -m verl COMMAND ...`` runs an entry point by its short name."""

from __future__ import annotations

import importlib
import sys

COMMANDS = {
    "ppo": ("verl.trainer.main_ppo", "train with PPO and related algorithms"),
    "sft": ("verl.trainer.main_sft", "supervised fine-tuning"),
    "generate": ("verl.trainer.main_generation", "generate responses to a file of prompts"),
    "eval": ("verl.trainer.main_eval", "score a file of responses"),
    "export": ("verl.trainer.main_export", "export a checkpoint as a Hugging Face folder"),
}


def main(argv: list[str] | None = None) -> int:
    """The command's exit code; 2 if there is no such command."""
    name, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        return importlib.import_module(COMMANDS[name][0]).main(rest)
    known = [f"  {command:<9} {what} (python3 -m {module})" for command, (module, what) in COMMANDS.items()]
    text = "\n".join(["usage: verl COMMAND ...; verl COMMAND --help shows its options", *known])
    if name in ("--help", "-h"):
        print(text)
        return 0
    print(f"error: there is no command {name!r}\n{text}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
