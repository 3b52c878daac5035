"""Peak memory of fine-tuning small models of random weights on the CPU, for ``tests/data/finetune_memory.csv``.

    PYTHON benchmarks/finetune_memory.py [--only NAME] > tests/data/finetune_memory.csv

with the Python of the environment ``peft`` (`qplan methods install peft`). Each case is a child process that runs
``data/finetune/train.py``, the script that qplan writes, for two steps, and reads the peak of its resident set over
what it had before the model was loaded.
``tests/test_finetuning.py`` compares them with the formula.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "data" / "finetune" / "train.py"
TOKENIZER = ROOT / "data" / "demo" / "model"
TEXT = ROOT / "data" / "calibration" / "code.txt"
STEPS = 2

BASE: dict[str, Any] = {
    "hidden": 256, "layers": 6, "ff": 768, "heads": 4, "kv_heads": 2, "vocab": 4096, "sequence_length": 512,
    "micro_batch": 2, "rank": 16, "checkpointing": 0, "optimizer": "adamw_torch", "base": "nf4",
    "architecture": "llama",
}  # fmt: skip
CHANGES: tuple[dict[str, Any], ...] = (
    {}, {"layers": 16}, {"vocab": 16000}, {"micro_batch": 6}, {"rank": 256},
    {"checkpointing": 1, "layers": 16, "micro_batch": 6}, {"checkpointing": 1, "vocab": 32000},
    {"optimizer": "adamw_8bit", "rank": 256}, {"base": "16bit"},
    {"hidden": 768, "heads": 12, "kv_heads": 12, "ff": 2048},
    {"architecture": "qwen2", "hidden": 448, "heads": 7, "kv_heads": 1, "ff": 2432, "vocab": 8000},
    {"architecture": "qwen3", "layers": 10, "micro_batch": 3, "sequence_length": 384},
    {"architecture": "gemma2", "kv_heads": 4, "vocab": 8000},
    {"architecture": "mistral", "hidden": 640, "heads": 10, "ff": 1792, "checkpointing": 1, "micro_batch": 8},
    {"sequence_length": 1024, "micro_batch": 1, "rank": 64, "ff": 1536},
)  # fmt: skip
"""What each case changes of :data:`BASE`, whose shape is that of a small Llama."""


def cases() -> list[dict[str, Any]]:
    """All cases, each with a name."""
    return [{"name": "_".join(f"{k}={v}" for k, v in change.items()) or "base", **BASE, **change} for change in CHANGES]


def checkpoint(case: dict[str, Any], folder: Path) -> None:
    """A model of random weights in the shape of ``case``, with the demo model's tokenizer."""
    import shutil

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(
        case["architecture"],
        hidden_size=case["hidden"],
        num_hidden_layers=case["layers"],
        intermediate_size=case["ff"],
        num_attention_heads=case["heads"],
        num_key_value_heads=case["kv_heads"],
        head_dim=case["hidden"] // case["heads"],
        vocab_size=case["vocab"],
        max_position_embeddings=4096,
        tie_word_embeddings=case["architecture"] == "gemma2",
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for file in TOKENIZER.glob("tokenizer*"):
        shutil.copy(file, folder)


def run(case: dict[str, Any], device: str = "cpu", dtype: str = "float32") -> dict[str, Any]:
    """What training ``case`` took on ``cpu`` or ``cuda``."""
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        checkpoint(case, folder / "model")
        command = [
            sys.executable, str(SCRIPT), "--data", str(TEXT), "--output", str(folder / "out"), "--model",
            str(folder / "model"), "--device", device, "--compute-dtype", dtype, "--accumulation", "1", "--steps",
            str(STEPS), "--base", case["base"], "--rank", str(case["rank"]), "--optimizer", case["optimizer"],
            "--sequence-length", str(case["sequence_length"]), "--micro-batch", str(case["micro_batch"]),
            "--gradient-checkpointing" if case["checkpointing"] else "--no-gradient-checkpointing",
        ]  # fmt: skip
        environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run(command, check=True, capture_output=True, env=environment)
        done = json.loads((folder / "out" / "training.json").read_text())
    names = ("trainable_parameters", "loading_peak_bytes", "training_peak_bytes")
    return {**case, **{name: done[name] for name in names}}


def main() -> None:
    """Print the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="cases whose name holds this")
    parser.add_argument("--case", metavar="JSON", help="this case instead, printed as JSON")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", default="float32")
    chosen = parser.parse_args()
    if chosen.case is not None:
        print(json.dumps(run({**BASE, **json.loads(chosen.case)}, chosen.device, chosen.dtype)))
        return
    wanted = [case for case in cases() if chosen.only is None or chosen.only in case["name"]]
    writer = None
    for case in wanted:
        row = run(case, chosen.device, chosen.dtype)
        if writer is None:
            writer = csv.DictWriter(sys.stdout, row, lineterminator="\n")
            writer.writeheader()
        writer.writerow(row)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
