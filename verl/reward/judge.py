"""What a judge (a language model that is asked for scores) is asked, and what it takes to ask it: without a network."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

from verl.reward.dependencies import MissingDependency

TEMPLATE = """\
Judge how well the response answers the prompt. Say briefly why, then write on the last line "Score: " and a number from
0 (useless) to 10 (perfect).

# Prompt

{prompt}

# Reference answer

{ground_truth}

# Response

{response}
"""

PLACES = re.compile(r"\{(prompt|response|ground_truth)\}")


def missing(**settings: Any) -> MissingDependency | None:
    """What the judge's settings (reward.judge) lack to be asked."""
    for name in ("url", "model"):
        if not settings[name]:
            return MissingDependency("a judge scores a data source of this run", f"set reward.judge.{name}")
    variable = settings["api_key_env"]
    if variable and not os.environ.get(variable):
        return MissingDependency(
            f"reward.judge.api_key_env={variable}, and no such variable is set", f"export {variable}=..."
        )
    try:
        groups = re.compile(settings["pattern"]).groups
    except re.error as error:
        return MissingDependency(f"reward.judge.pattern is no regular expression ({error})", "mend it")
    if groups != 1:
        return MissingDependency(
            f"reward.judge.pattern has {groups} groups", "put the number, and only it, in parentheses"
        )
    if settings["lowest"] >= settings["highest"]:
        return MissingDependency(
            f"no number is from reward.judge.lowest={settings['lowest']:g} to highest", "raise highest"
        )
    if settings["template"] and "{response}" not in settings["template"]:
        return MissingDependency("reward.judge.template does not hold the response", "put {response} into it")
    return None


def fill(template: str, sample: Mapping[str, Any]) -> str:
    """The template with {prompt}, {response} and {ground_truth}; other braces stay, and so do those in the texts."""
    texts = {
        "prompt": conversation(json.loads(sample["prompt"])),
        "response": sample["solution_str"],
        "ground_truth": sample["ground_truth"],
    }
    return PLACES.sub(lambda place: texts[place[1]], template)


def conversation(messages: list[dict[str, Any]]) -> str:
    """The text of a single message; of several, each behind its role."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
