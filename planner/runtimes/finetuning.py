"""The training script with a plan's settings in it, and how its adapter is used: text for a person."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import fields

from planner.core.data import data_path
from planner.core.finetuning import FinetuneSettings

SCRIPT = "train.py"
_BEGIN, _END = "# begin settings\n", "# end settings\n"
_SETTING = re.compile(r'    "(\w+)": .*?,(  #.*)?')


def script(settings: FinetuneSettings, model: str, revision: str | None = None, threads: int = 0) -> str:
    """``data/finetune/train.py`` with these settings as its defaults; comments stay.

    Args:
        settings: of the plan.
        model: directory or hub id of the 16-bit checkpoint.
        revision: of a hub id.
        threads: CPU threads; 0: as many as torch takes.
    """
    text = data_path("finetune/train.py").read_text("utf-8")
    values = {field.name: getattr(settings, field.name) for field in fields(settings)}
    values |= {"model": model, "revision": revision, "threads": threads}
    before, rest = text.split(_BEGIN)
    block, after = rest.split(_END)
    lines = [_line(line, values) for line in block.splitlines()]
    return before + _BEGIN + "\n".join(lines) + "\n" + _END + after


def _line(line: str, values: dict[str, object]) -> str:
    match = _SETTING.fullmatch(line)
    if match is None:
        return line
    value = values[match[1]]
    shown = json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
    return f'    "{match[1]}": {shown},{match[2] or ""}'


def commands(model: str, adapter: str, *, rank: int, four_bits: bool, compute_dtype: str) -> dict[str, str]:
    """What to do with a trained adapter: load it, serve it, merge it, make a GGUF file.

    Args:
        model: directory or hub id of the 16-bit checkpoint.
        adapter: directory of the adapter.
        rank: of its matrices.
        four_bits: load the model in NF4, as it was trained.
        compute_dtype: torch's name of the type to multiply in.
    """
    name = adapter.rstrip("/").rsplit("/", 1)[-1]
    merged = f"{name}-merged"
    return {
        "transformers": _load(model, adapter, four_bits, compute_dtype),
        "vllm": shlex.join(
            ["vllm", "serve", model, "--enable-lora", "--lora-modules", f"{name}={adapter}", "--max-lora-rank",
             str(_vllm_rank(rank))]
        ),
        "merge": _merge(model, adapter, merged),
        "gguf": f"{shlex.join(['qplan', 'plan', merged, '-o', 'plan.json'])} && qplan apply plan.json",
        "llama.cpp": "\n".join((
            shlex.join(["convert_lora_to_gguf.py", adapter, "--base", model, "--outfile", f"{name}.gguf"]),
            shlex.join(["llama-server", "--model", "MODEL.gguf", "--lora", f"{name}.gguf"]),
        )),
    }  # fmt: skip


_VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What ``--max-lora-rank`` takes, https://docs.vllm.ai/en/latest/features/lora.html."""


def _vllm_rank(rank: int) -> int:
    return next((known for known in _VLLM_RANKS if known >= rank), rank)


def _load(model: str, adapter: str, four_bits: bool, compute_dtype: str) -> str:
    dtype = f"torch.{compute_dtype}"
    extra = []
    if four_bits:
        extra = [
            "    quantization_config=BitsAndBytesConfig(",
            '        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,',
            f"        bnb_4bit_compute_dtype={dtype},",
            "    ),",
        ]
    return "\n".join((
        "import torch",
        "from peft import PeftModel",
        f"from transformers import AutoModelForCausalLM, AutoTokenizer{', BitsAndBytesConfig' * bool(extra)}",
        "model = AutoModelForCausalLM.from_pretrained(",
        f"    {model!r}, dtype={dtype}, device_map=\"auto\",",
        *extra,
        ")",
        f"model = PeftModel.from_pretrained(model, {adapter!r})",
        f"tokenizer = AutoTokenizer.from_pretrained({adapter!r})",
    ))  # fmt: skip


def _merge(model: str, adapter: str, merged: str) -> str:
    """Into 16-bit weights: merging into 4-bit ones would round the sum."""
    return "\n".join((
        "import torch",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"model = AutoModelForCausalLM.from_pretrained({model!r}, dtype=torch.bfloat16)",
        f"model = PeftModel.from_pretrained(model, {adapter!r}).merge_and_unload()",
        f"model.save_pretrained({merged!r})",
        f"AutoTokenizer.from_pretrained({model!r}).save_pretrained({merged!r})",
    ))  # fmt: skip
