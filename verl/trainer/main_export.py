"""``python3 -m verl.trainer.main_export CHECKPOINT OUT``: writes a checkpoint as a folder that transformers, SGLang and
vLLM load. It needs no GPU and no other process, whatever the run used."""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from verl.errors import UserError
from verl.trainer.environment import share_cores

if TYPE_CHECKING:
    from verl.config.sections.models import ModelConfig

DTYPES = ("float32", "bfloat16", "float16")


class Source(NamedTuple):
    """step: the checkpoint's folder, global_step_N. role: folder in it, of the model."""

    step: Path
    role: str


class Trained(NamedTuple):
    """The model that training started from. dtype: type of the computation, or auto."""

    model: ModelConfig
    tokenizer_path: str
    dtype: str


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 for success, 1 for errors that the user can fix."""
    parser = argparse.ArgumentParser(
        prog="verl export", description=__doc__.partition(". ")[0].partition(": ")[2] + "."
    )
    parser.add_argument("checkpoint", type=Path, help="a run's folder (its newest checkpoint), or .../global_step_N")
    parser.add_argument("out", type=Path, help="folder to write; it must not exist")
    parser.add_argument("--role", choices=("actor", "critic"), help="which model of a PPO run (default: actor)")
    parser.add_argument("--dtype", choices=DTYPES, help="type of the tensors (default: that of the original model)")
    parser.add_argument("--model", help="the original model, if it is not at the path in the run's config.yaml")
    chosen = parser.parse_args(argv)
    try:
        share_cores()
        print(export(chosen.checkpoint.expanduser(), chosen.out.expanduser(), chosen.role, chosen.dtype, chosen.model))
        return 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def export(checkpoint: Path, out: Path, role: str | None, dtype: str | None, model: str | None) -> str:
    """A sentence on what was written. ``out`` appears only when it is complete."""
    import torch

    from verl.data.tokenizer import load_tokenizer
    from verl.engine.export import export_checkpoint

    if out.exists():
        raise UserError(f"{out} is there already: name a new folder")
    source = find(checkpoint, role)
    trained = model_of(source)
    settings = trained.model if model is None else trained.model.model_copy(update={"path": model})
    named = dtype or (trained.dtype if trained.dtype != "auto" else None)
    tokenizer = load_tokenizer(model or trained.tokenizer_path, settings.trust_remote_code)
    partial = out.with_name(f".partial-{out.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        saved, kind = source.step / source.role, getattr(torch, named) if named else None
        written = export_checkpoint(saved, partial, settings, kind, tokenizer)
        partial.rename(out)
    except OSError as error:
        raise UserError(f"{out} could not be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{source.role} of {source.step} is in {out} ({str(written).removeprefix('torch.')})."


def find(path: Path, role: str | None) -> Source:
    """The checkpoint at a path. UserError if there is none or it is damaged."""
    from verl.trainer.checkpoints import MANIFEST, Checkpoint, Checkpoints

    if (path / MANIFEST).is_file():
        step = path
    elif (path.parent / MANIFEST).is_file():
        step, role = path.parent, role or path.name
    elif newest := Checkpoints(path).latest(warn=lambda text: print(f"warning: {text}")):
        step = newest.folder
    else:
        raise UserError(f"{path} is neither a run's folder with checkpoints nor one of them (.../global_step_N)")
    if damage := Checkpoint(step, 0).damage():
        raise UserError(f"{step} is damaged: {damage}")
    known = [name for name in ("actor", "critic", "model") if (step / name).is_dir()]
    role = role or next(iter(known), "")
    if role not in known:
        raise UserError(f"{step} has no {role or 'model'} (it has: {', '.join(known) or 'none'})")
    return Source(step, role)


def model_of(source: Source) -> Trained:
    """The original model, from the run's config.yaml."""
    from verl.config.loading.load import load
    from verl.config.sections.models import Config, Root, SFTConfig

    places = [
        folder / "config.yaml" for folder in source.step.absolute().parents[:2]
    ]  # also of a checkpoint that was set aside
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UserError(f"there is no {places[0]}, which says what model the checkpoint is of")
    schema: type[Root] = SFTConfig if source.role == "model" else Config
    loaded = load(["--config", str(file)], schema)
    if loaded.problems:
        raise UserError(f"{file} is not of this version: {loaded.problems[0].key}: {loaded.problems[0].why}")
    match loaded.config:
        case SFTConfig(model=model, fsdp_config=fsdp):
            return Trained(model, model.tokenizer_path, fsdp.dtype)
        case Config(critic=critic, actor_rollout_ref=policy) if source.role == "critic":
            return Trained(critic.model, policy.model.tokenizer_path, critic.model.fsdp_config.dtype)
        case Config(actor_rollout_ref=policy):
            return Trained(policy.model, policy.model.tokenizer_path, policy.actor.fsdp_config.dtype)
    raise AssertionError(loaded.config)


if __name__ == "__main__":
    sys.exit(main())
