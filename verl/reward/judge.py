"""The question for the judge (a language model that gives scores), and the checks of its settings. Uses no network."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

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
    """The first thing that ``reward.judge`` lacks before the judge can be asked, or None."""
    for name in ("url", "model"):
        if not settings[name]:
            return MissingDependency("a judge scores a data source of this run", f"set reward.judge.{name}")
    if not _is_address(settings["url"]):
        return MissingDependency(
            f"reward.judge.url={settings['url']} is not a web address", "set it to http://HOST:PORT/v1, for example"
        )
    if importlib.util.find_spec("openai") is None:
        return MissingDependency("the judge needs the package openai", 'run pip install -e ".[judge]"')
    variable = settings["api_key_env"]
    if variable and not os.environ.get(variable):
        return MissingDependency(
            f"reward.judge.api_key_env={variable}, but this environment variable is not set", f"export {variable}=..."
        )
    try:
        groups = re.compile(settings["pattern"]).groups
    except re.error as error:
        return MissingDependency(f"reward.judge.pattern is not a regular expression ({error})", "correct it")
    if groups != 1:
        return MissingDependency(
            f"reward.judge.pattern has {groups} groups", "put parentheses around the number and nothing else"
        )
    if settings["lowest"] >= settings["highest"]:
        return MissingDependency(
            f"reward.judge.lowest={settings['lowest']:g} is not below highest={settings['highest']:g}", "raise highest"
        )
    if settings["template"] and "{response}" not in settings["template"]:
        return MissingDependency("reward.judge.template lacks the response", "put {response} into it")
    return None


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # brackets or a port that cannot be read
        return False


def fill(template: str, sample: Mapping[str, Any]) -> str:
    """The template with {prompt}, {response} and {ground_truth} filled in. All other braces stay as they are."""
    texts = {
        "prompt": conversation(json.loads(sample["prompt"])),
        "response": sample["solution_str"],
        "ground_truth": sample["ground_truth"],
    }
    return PLACES.sub(lambda place: texts[place[1]], template)


def conversation(messages: list[dict[str, Any]]) -> str:
    """The text of a single message, or several messages with their roles."""
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in messages)
