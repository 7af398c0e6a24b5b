"""Resolves collected settings: follows references, converts types, divides old batch sizes, and decides defaults that
depend on other keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import NoneType
from typing import Any, get_args

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from verl.config.loading.collect import Settings
from verl.config.loading.schema import choices, defaults_of, get, keys_of, put
from verl.config.policy_losses import LOSS_MODES

ACTOR = "actor_rollout_ref.actor"


def resolve_references(settings: Settings) -> None:
    """Replaces ``${another.key}`` by that key's setting or default."""
    referring = [key for key in settings.origins if "${" in str(get(settings.tree, key))]
    if not referring:
        return
    known = keys_of(settings.schema)
    everything = OmegaConf.create(defaults_of(settings.schema))
    for key in settings.origins:
        with _reported(settings, key):
            OmegaConf.update(everything, key, get(settings.tree, key), merge=False)
    for key in referring:
        with _reported(settings, key):
            value = OmegaConf.select(everything, key, throw_on_missing=True)
            resolved = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            put(settings.tree, key, _fit(resolved, known[key].annotation))


@contextmanager
def _reported(settings: Settings, key: str) -> Iterator[None]:
    """Reports a reference that cannot be read or followed as a problem of its key."""
    try:
        yield
    except OmegaConfBaseException as error:
        fix = "write references as ${section.key}, with a key that exists and has a value"
        settings.misfit(key, str(error).splitlines()[0], fix)


def fit_types(settings: Settings) -> None:
    """Converts values to their keys' types: 5 is text for a key that takes text."""
    known = keys_of(settings.schema)
    for key, origin in settings.origins.items():
        put(settings.tree, key, _fit(get(settings.tree, key), known[key].annotation, origin.text))


def _fit(value: Any, annotation: Any, text: str | None = None) -> Any:
    kinds = choices(annotation)
    if isinstance(value, list) and list in kinds:
        return [_fit(item, get_args(annotation)[0]) for item in value]
    takes_only_text = kinds <= {str, NoneType}
    if isinstance(value, int | float) and (takes_only_text or (isinstance(value, bool) and bool not in kinds)):
        return text or str(value)  # a True for a number, too: as text it is refused, where True would pass as 1
    if isinstance(value, str) and str not in kinds and kinds & {int, float}:
        return _number(value)  # such as an environment variable's
    return value


def _number(text: str) -> Any:
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    return text


def divide_over_ranks(settings: Settings) -> None:
    """Divides old batch sizes of all ranks together by the number of ranks."""
    world = 1
    for key in ("trainer.nnodes", "trainer.n_gpus_per_node"):
        size = get(settings.tree, key)
        world *= size if isinstance(size, int) and size > 0 else 1
    for key, origin in settings.origins.items():
        value = get(settings.tree, key)
        if origin.per_rank and isinstance(value, int) and value > 0:
            share = max(1, value // world)
            put(settings.tree, key, share)
            ranks = "1 rank" if world == 1 else f"{world} ranks"
            settings.notices.append(
                f"{origin.given}={value} is the old form, for all ranks together: for each of {ranks}, {key}={share}."
            )


def decide_aggregation(settings: Settings) -> None:
    """A policy loss may have a default for ``loss_agg_mode`` of its own. A value that the user set stays."""
    key, loss = f"{ACTOR}.loss_agg_mode", get(settings.tree, f"{ACTOR}.policy_loss.loss_mode")
    averages = LOSS_MODES[loss].averages if isinstance(loss, str) and loss in LOSS_MODES else None
    if averages is not None and key not in settings.set_keys:
        put(settings.tree, key, averages)
        settings.notices.append(f"{key}={averages} is the default for {ACTOR}.policy_loss.loss_mode={loss}.")


def decide_kl(settings: Settings) -> None:
    """Turns the KL penalty on if the user set its coefficient and did not set its switch."""
    switch, coefficient = "algorithm.use_kl_in_reward", "algorithm.kl_ctrl.kl_coef"
    chosen = switch in settings.set_keys and get(settings.tree, switch) is not None
    if switch not in keys_of(settings.schema) or chosen or get(settings.tree, switch) is True:
        return
    value = get(settings.tree, coefficient)
    on = coefficient in settings.set_keys and isinstance(value, int | float) and value > 0
    put(settings.tree, switch, on)
    if on:
        settings.notices.append(
            f"{switch}=True, because {coefficient} is set: rewards carry a KL penalty and a reference model is built. "
            f"{switch}=False would leave it out."
        )
