"""Checks of ``rollout.mode=server``: the servers' addresses, their key, and how they get weights."""

from __future__ import annotations

import ipaddress
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from verl.checks.settings import ROLLOUT
from verl.config.sections.rollout import RolloutConfig
from verl.findings import Findings

if TYPE_CHECKING:
    from verl.plan import EnginePlan

EXAMPLE = "http://10.0.0.5:30000"


def check_servers(findings: Findings, engine: EnginePlan, dry_run: bool) -> None:
    rollout = engine.rollout
    if rollout.mode != "server":
        return
    if rollout.name != "sglang":
        why = f"{ROLLOUT}.mode=server supports SGLang servers only"
        findings.problem(f"{ROLLOUT}.name", rollout.name, why, f"set it to sglang, or {ROLLOUT}.mode=colocated")
    _urls(findings, rollout.server_urls, has_key=rollout.server_api_key_env is not None)
    _key(findings, rollout.server_api_key_env, dry_run)
    if isinstance(rollout, RolloutConfig) and rollout.server_weight_update == "disk":
        _folder(findings, rollout.server_weights_dir, dry_run)


def _urls(findings: Findings, urls: list[str], has_key: bool) -> None:
    key = f"{ROLLOUT}.server_urls"
    if not urls:
        findings.problem(key, urls, f"{ROLLOUT}.mode=server needs server addresses", f"set it to [{EXAMPLE}]")
    plain = [url.rstrip("/") for url in urls]
    if twice := sorted({url for url in plain if plain.count(url) > 1}):
        shown = list(map(_presentable, urls))
        findings.problem(key, shown, f"{', '.join(map(_presentable, twice))} is named twice", "name each server once")
    for url in dict.fromkeys(urls):
        if problem := _malformed(url):
            findings.problem(key, _presentable(url), problem, f"write it as {EXAMPLE}")
        elif _loopback(urlsplit(url).hostname or ""):
            continue
        elif not has_key:
            findings.problem(
                key,
                url,
                "anybody who reaches this server could read its samples and replace its weights: it has no key",
                f"start it with --api-key, and set {ROLLOUT}.server_api_key_env to the name of an environment variable "
                "that holds that key",
            )
        elif urlsplit(url).scheme == "http":
            findings.warn(
                f"{key}: the key goes to {url} unencrypted; the network between has to be one that you trust."
            )


def _malformed(url: str) -> str | None:
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises
    except ValueError as error:
        return f"it is not a URL ({error})"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "it is not the URL of a server"
    if parts.username or parts.password:
        return f"a password has no place in it; a key goes into {ROLLOUT}.server_api_key_env's variable"
    if parts.query or parts.fragment:
        return "a server's URL has no query"
    return None


def _presentable(url: str) -> str:
    """What of a URL may be shown: no password, and no query, which may be a key."""
    before, at, after = url.rpartition("@")
    return (f"{before.partition('//')[0]}//...@{after}" if at else url).partition("?")[0]


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _key(findings: Findings, variable: str | None, dry_run: bool) -> None:
    if variable is None:
        return
    key = f"{ROLLOUT}.server_api_key_env"
    if not variable.isidentifier():  # perhaps the key itself: not to be shown
        fix = "set it to the name of an environment variable that holds the key, such as SGLANG_KEY"
        findings.problem(key, "...", "it is not the name of an environment variable", fix)
    elif not os.environ.get(variable, "").strip():
        if dry_run:
            findings.cannot_check(f"{key}={variable}: the variable is not set here")
        else:
            fix = f"export {variable} with what the servers were started with as --api-key"
            findings.problem(key, variable, "this environment variable is not set, or empty", fix)


def _folder(findings: Findings, folder: str | None, dry_run: bool) -> None:
    key = f"{ROLLOUT}.server_weights_dir"
    if folder is None:
        why = f"{ROLLOUT}.server_weight_update=disk needs a folder that trainer and servers see under the same path"
        findings.problem(key, None, why, f"name one, or set {ROLLOUT}.server_weight_update=tensors")
        return
    path = Path(folder).expanduser()
    if not path.is_absolute():
        findings.problem(key, folder, "the servers may run in another folder", "write it from / on")
        return
    existing = next(parent for parent in (path, *path.parents) if parent.exists())
    if existing.is_dir() and os.access(existing, os.W_OK):
        return
    if dry_run:
        findings.cannot_check(f"{key}={folder}: {existing} cannot be written here")
    else:
        findings.problem(key, folder, f"{existing} is not a folder that can be written", "name another")
