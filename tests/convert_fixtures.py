"""Small random-weight checkpoints of every family, their tokenizers, and llama.cpp's own converter to compare with.

Needs torch, transformers, tokenizers and sentencepiece; imported by slow tests only.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TEXT = Path(__file__).resolve().parent.parent / "planner"
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_REGEX = QWEN2_REGEX.replace(r"\p{N}| ?", r"\p{N}{1,3}| ?")
LLAMA_IDS = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": -1}
GEMMA_IDS = {"pad_id": 0, "eos_id": 1, "bos_id": 2, "unk_id": 3}

# conversion/*.py is imported with one function replaced: a tokenizer trained here has a hash it cannot know
_SCRIPT_RUNNER = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import conversion.base
pre = sys.argv.pop(2)
if pre:
    conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: pre
sys.argv.pop(0)
sys.argv[0] += "/convert_hf_to_gguf.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def corpus() -> list[str]:
    """Text to train tokenizers on: qplan's own sources."""
    lines = [line for path in sorted(TEXT.rglob("*.py")) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if line.strip()]


def train_sentencepiece(path: Path, **options: Any) -> Path:
    """A BPE SentencePiece model of 1000 pieces with byte fallback, settings as Llama's."""
    import sentencepiece

    settings: dict[str, Any] = {
        "vocab_size": 1000,
        "model_type": "bpe",
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "minloglevel": 2,
        **LLAMA_IDS,
        **options,
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(path.with_suffix("")), **settings
    )
    return path.with_suffix(".model")


def write_sentencepiece(directory: Path, **options: Any) -> None:
    """``tokenizer.model`` and the settings Llama 2 and Mistral publish with it."""
    train_sentencepiece(directory / "tokenizer.model", **options)
    (directory / "tokenizer.vocab").unlink()
    special = {"unk": "<unk>", "bos": "<s>", "eos": "</s>"}
    settings: dict[str, Any] = {f"{kind}_token": text for kind, text in special.items()}
    settings |= {"add_bos_token": True, "add_eos_token": False, "tokenizer_class": "LlamaTokenizer"}
    settings["chat_template"] = "{% for message in messages %}[INST] {{ message['content'] }}{% endfor %}"
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


def write_bpe(directory: Path, splitter: str, *, tokenizer_class: str = "PreTrainedTokenizerFast") -> None:
    """A byte-level BPE trained here: ``splitter`` is gpt2, qwen2, llama3, llama3-merges or digits."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=splitter == "llama3"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter in ("gpt2", "digits"))
    pattern = {"qwen2": QWEN2_REGEX, "llama3": LLAMA3_REGEX, "llama3-merges": LLAMA3_REGEX}.get(splitter)
    steps: list[Any] = [pre_tokenizers.Split(Regex(pattern), "isolated")] if pattern else []
    if splitter == "digits":
        steps.append(pre_tokenizers.Digits(individual_digits=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, level]) if steps else level
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    tokenizer.add_tokens(["<tool_call>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "tokenizer_class": tokenizer_class,
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    (directory / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")


def make_model(config: Any, directory: Path, *, dtype: str = "bfloat16", seed: int = 0) -> Any:
    """A random model of ``config`` saved in shards of 1 MB; gives it back in float32, weights as saved.

    Weights are scaled so that every part of a layer matters to the logits: a permutation or a norm that is wrong shows.
    """
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    gemma = config.model_type.startswith("gemma")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim >= 2:
                weight.normal_(0, 1.0 if "embed" in name and not gemma else 1.5 / weight.shape[-1] ** 0.5)
            else:
                weight.normal_(1.0 if name.endswith("norm.weight") and not gemma else 0.0, 0.2)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size="1MB")
    # read back, for .to() also rounds the rotary frequencies
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def transformers_logits(model: Any, tokens: list[int]) -> Any:
    """Logits (tokens, vocabulary) of a float32 forward pass with eager attention."""
    import torch

    model.set_attn_implementation("eager")
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0].float().numpy()


@cache
def quiet_llama_cpp() -> Any:
    """A callback that drops llama.cpp's log and lives as long as llama.cpp may point to it."""
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, data: None)


def llama_logits(gguf: Path, tokens: list[int]) -> Any:
    """Logits (tokens, vocabulary) from llama.cpp on the CPU: float32 cache, no flash attention."""
    import llama_cpp
    import numpy as np

    llama_cpp.llama_log_set(quiet_llama_cpp(), None)
    parameters = llama_cpp.llama_model_default_params()
    parameters.n_gpu_layers = 0
    model = llama_cpp.llama_model_load_from_file(str(gguf).encode(), parameters)
    assert model, f"llama.cpp does not load {gguf}"
    settings = llama_cpp.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
    settings.type_k = settings.type_v = llama_cpp.GGML_TYPE_F32
    settings.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
    settings.n_threads = settings.n_threads_batch = 2
    context = llama_cpp.llama_init_from_model(model, settings)
    batch = llama_cpp.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for place, token in enumerate(tokens):
        batch.token[place], batch.pos[place], batch.n_seq_id[place] = token, place, 1
        batch.seq_id[place][0], batch.logits[place] = 0, True
    assert llama_cpp.llama_decode(context, batch) == 0
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits(context), shape=(len(tokens), size)).copy()
    llama_cpp.llama_batch_free(batch)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return logits


def script_convert(llama_cpp_dir: Path, directory: Path, output: Path, out_type: str, *, pre: str = "") -> None:
    """Convert with llama.cpp's script; ``pre`` stands in for its table of known tokenizers."""
    command = [sys.executable, "-c", _SCRIPT_RUNNER, str(llama_cpp_dir), pre, str(directory)]
    command += ["--outfile", str(output), "--outtype", out_type]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def find_llama_cpp_source() -> Path:
    """llama.cpp's source of the release installed: ``QPLAN_LLAMA_CPP_DIR``, else out of llama-cpp-python's sdist.

    The sdist is downloaded once into the temporary directory. Skips the test where neither is to be had.
    """
    if stated := os.environ.get("QPLAN_LLAMA_CPP_DIR"):
        return Path(stated)
    from importlib.metadata import version

    release = version("llama-cpp-python")
    cache = Path(tempfile.gettempdir()) / f"qplan-llama-cpp-{release}"
    found = list(cache.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    if not found:
        cache.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:"]
        command += ["--quiet", f"llama-cpp-python=={release}", "--dest", str(cache)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        archives = list(cache.glob("*.tar.gz"))
        if not archives:
            pytest.skip(f"llama.cpp's converter is not to be had: {done.stderr.strip()[-200:]}")
        with tarfile.open(archives[0]) as archive:
            archive.extractall(cache, filter="data")
        found = list(cache.glob("*/vendor/llama.cpp/convert_hf_to_gguf.py"))
    return found[0].parent
