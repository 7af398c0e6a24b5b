"""Checks that the machines of a run have enough host memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from verl.errors import UserError
from verl.findings import Findings
from verl.machine import HostMemory, host_memory
from verl.memory.host_budget import HostBudget
from verl.units import gigabytes

LITTLE = 10**9  # bytes that every machine has
CLOSE = 0.85  # of the available memory: no budget includes processes themselves, engines and samples


@dataclass(frozen=True)
class Finding:
    """short: there is too little memory; False: there is only just enough. table: what the models hold."""

    short: bool
    why: str
    table: Sequence[str]
    fix: str

    def __str__(self) -> str:
        return "\n".join([f"host memory: {self.why}:", *(f"  {line}" for line in self.table), self.fix])


def judge(budgets: Sequence[HostBudget], machines: Sequence[tuple[str, HostMemory]], kind: str) -> Finding | None:
    """What is wrong; None if every machine has enough memory for its budget with room to spare.

    machines: name and memory of each, in the order of the budgets. kind: of the devices.
    """
    near = [
        (budget, name, memory)
        for budget, (name, memory) in zip(budgets, machines, strict=True)
        if budget.most()[0] > CLOSE * memory.available
    ]
    if not near:
        return None
    why = "; ".join(_need(*each) for each in near)
    short = any(budget.most()[0] > memory.available for budget, _, memory in near)
    return Finding(short, why, budget_table(near[0][0]), _fix(near[0][0], kind))


def _need(budget: HostBudget, name: str, memory: HostMemory) -> str:
    most, when = budget.most()
    limit = "the limit of its container or job" if memory.limited else "all"
    return (
        f"the run takes up to {gigabytes(most)} on {name}, {when}, and {gigabytes(memory.available)} are available "
        f"({limit}: {gigabytes(memory.total)})"
    )


def _fix(budget: HostBudget, kind: str) -> str:
    if kind == "cpu" or not budget.kept:  # a model is read whole there
        return "Take a smaller model, or a machine with more memory."
    return (
        "Leave param_offload or optimizer_offload off where a model fits on the GPUs, or take a machine with more "
        "memory; several machines (trainer.nnodes, in PPO) share what is held."
    )


def budget_table(budget: HostBudget) -> list[str]:
    """The lines of a table: the memory that each model holds throughout the run, and its section of keys."""
    rows = [("model", "weights", "optimizer", "keys")]
    rows += [(held.role, _amount(held.weights), _amount(held.optimizer), f"{held.section}.*") for held in budget.models]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"{role:<{widths[0]}}  {weights:>{widths[1]}}  {optimizer:>{widths[2]}}  {keys}".rstrip()
        for role, weights, optimizer, keys in rows
    ]


def _amount(count: int) -> str:
    return gigabytes(count) if count else "-"


def check_host_memory(findings: Findings, budget: HostBudget, kind: str, here: bool) -> None:
    """Checks a dry run by the sizes of the models' files. A real run checks its own machines before it builds a model
    (``require_host_memory``). here: whether the run would use this machine."""
    most, _ = budget.most()
    if not here and most > LITTLE:
        needed = gigabytes(most)
        findings.cannot_check(f"host memory: whether each machine has {needed}; a run checks before it builds a model")
    elif here and (found := judge([budget], [("this machine", host_memory())], kind)):
        if found.short:
            findings.problem(*_largest(budget, kind), found.why, found.fix)
        else:
            findings.warn(str(found))


def _largest(budget: HostBudget, kind: str) -> tuple[str, object]:
    """The setting that takes the most memory, and its value."""
    if kind == "cpu" or not budget.kept:
        return "trainer.device", kind
    held = max(budget.models, key=lambda model: max(model.weights, model.optimizer))
    return f"{held.section}.{'optimizer' if held.optimizer > held.weights else 'param'}_offload", True


def require_host_memory(
    budgets: Sequence[HostBudget], machines: Sequence[tuple[str, HostMemory]], kind: str
) -> str | None:
    """The text of a warning if a machine has hardly enough memory. UserError if one has too little. See ``judge``."""
    found = judge(budgets, machines, kind)
    if found is not None and found.short:
        raise UserError(str(found))
    return None if found is None else str(found)
