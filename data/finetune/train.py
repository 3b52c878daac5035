"""Fine-tune a language model with LoRA, on 4-bit weights (QLoRA) or on 16-bit ones.

    python train.py --data FILE --output DIR

FILE is .jsonl (an object a line: {"text": …}, {"messages": [{"role": …, "content": …}, …]} or {"prompt": …,
"completion": …}) or plain text. Needs torch, transformers, peft, accelerate and, for 4-bit weights, bitsandbytes.
Every setting below can be given on the command line too: --rank 32, --learning-rate 1e-4 …
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# begin settings
SETTINGS: dict[str, Any] = {
    "model": "path/or/hub-id",
    "revision": None,
    "base": "nf4",  # nf4: 4-bit weights with double quantization (QLoRA); 16bit: weights as they are (LoRA)
    "device": "cuda",  # cuda or cpu
    "compute_dtype": "bfloat16",  # from compute capability 8.0; float16 below, with loss scaling; float32 on a CPU
    "rank": 16,
    "alpha": 16,
    "target_modules": "all-linear",
    "sequence_length": 1024,
    "micro_batch": 1,  # sequences at once
    "accumulation": 16,  # micro-batches per step
    "gradient_checkpointing": True,
    "optimizer": "paged_adamw_8bit",
    "learning_rate": 2e-4,
    "max_gradient_norm": 0.3,
    "steps": 0,  # 0: once over the data
    "seed": 0,
    "threads": 0,  # CPU threads; 0: as many as torch takes
}
# end settings

HELD_BACK_FRACTION = 0.1
HELD_BACK_MOST = 8
"""Sequences that are not trained on: the loss on them is told before and after."""
M_MMAP_THRESHOLD = -3
"""From glibc's malloc.h."""
LARGE_TENSOR_BYTES = 1 << 18


def arguments(given: list[str] | None) -> argparse.Namespace:
    """The settings, with what the command line says instead."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path, help=".jsonl or text")
    parser.add_argument("--output", required=True, type=Path, help="directory for the adapter")
    for name, value in SETTINGS.items():
        option = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            parser.add_argument(option, action=argparse.BooleanOptionalAction, default=value)
        else:
            parser.add_argument(option, type=str if value is None else type(value), default=value)
    return parser.parse_args(given)


def texts(path: Path, tokenizer: Any) -> Iterator[str]:
    """The examples of a file, one by one."""
    if path.suffix != ".jsonl":
        yield path.read_text("utf-8-sig")
        return
    for number, line in enumerate(path.read_text("utf-8-sig").splitlines(), 1):
        if not line.strip():
            continue
        row = json.loads(line)
        if "messages" in row:
            yield tokenizer.apply_chat_template(row["messages"], tokenize=False)
        elif "text" in row:
            yield row["text"]
        elif "prompt" in row and "completion" in row:
            yield row["prompt"] + row["completion"]
        else:
            raise SystemExit(f"{path}, line {number}: no 'text', 'messages' or 'prompt' and 'completion'")


def sequences(path: Path, tokenizer: Any, length: int) -> list[list[int]]:
    """All examples one after another, each with its end token, cut into pieces of ``length``: no padding."""
    tokens: list[int] = []
    for text in texts(path, tokenizer):
        tokens += tokenizer(text, verbose=False)["input_ids"]
        if tokenizer.eos_token_id is not None:
            tokens.append(tokenizer.eos_token_id)
    return [tokens[start : start + length] for start in range(0, len(tokens) - length + 1, length)]


def load(chosen: argparse.Namespace) -> Any:
    """The model with its weights frozen, in 4 bits or as they are, and with LoRA matrices to train."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, chosen.compute_dtype)
    quantization = None
    if chosen.base == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        chosen.model,
        revision=chosen.revision,
        dtype=dtype,
        quantization_config=quantization,
        device_map={"": 0 if chosen.device == "cuda" else "cpu"},
    )
    # peft.prepare_model_for_kbit_training would make 32-bit floats of the embedding and the output matrix, gigabytes
    # with a large vocabulary; they are frozen, and adapters are kept in 32 bits anyway
    model.config.use_cache = False
    if chosen.gradient_checkpointing:
        model.enable_input_require_grads()
    return get_peft_model(
        model,
        LoraConfig(
            r=chosen.rank,
            lora_alpha=chosen.alpha,
            lora_dropout=0.0,
            target_modules=chosen.target_modules,
            task_type="CAUSAL_LM",
        ),
    )


def train(model: Any, pieces: list[list[int]], chosen: argparse.Namespace, tell: Callable[..., None]) -> list[float]:
    """Train on ``pieces``; the loss of every step."""
    import torch
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    losses: list[float] = []

    class Watch(TrainerCallback):
        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                losses.append(float(logs["loss"]))
                tell(state.global_step, state.max_steps, losses[-1])

    def collate(rows: list[list[int]]) -> dict[str, Any]:
        ids = torch.tensor(rows)
        return {"input_ids": ids, "labels": ids}

    settings = TrainingArguments(
        output_dir=str(chosen.output / "checkpoints"),
        per_device_train_batch_size=chosen.micro_batch,
        gradient_accumulation_steps=chosen.accumulation,
        max_steps=chosen.steps or -1,
        num_train_epochs=1,
        learning_rate=chosen.learning_rate,
        lr_scheduler_type="constant",
        max_grad_norm=chosen.max_gradient_norm,
        optim=chosen.optimizer,
        bf16=chosen.device == "cuda" and chosen.compute_dtype == "bfloat16",
        fp16=chosen.device == "cuda" and chosen.compute_dtype == "float16",
        gradient_checkpointing=chosen.gradient_checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        use_cpu=chosen.device == "cpu",
        dataloader_drop_last=True,
        dataloader_pin_memory=chosen.device == "cuda",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        seed=chosen.seed,
    )
    trainer = Trainer(model=model, args=settings, train_dataset=pieces, data_collator=collate, callbacks=[Watch()])
    trainer.remove_callback(PrinterCallback)  # Watch tells already
    trainer.train()
    return losses


def mean_loss(model: Any, pieces: list[list[int]]) -> float:
    """Mean loss per token on ``pieces``, without training.

    The model stays in training mode, which changes nothing without dropout: in evaluation mode bitsandbytes 0.50 packs
    4-bit weights for a CPU with AVX-512 BF16 once and for all, and products with those have no gradient.
    """
    import torch

    model.train()
    total = 0.0
    with torch.no_grad():
        for piece in pieces:
            ids = torch.tensor([piece], device=model.device)
            total += float(model(input_ids=ids, labels=ids).loss)
    return total / len(pieces)


def give_freed_memory_back() -> None:
    """Let glibc return tensors to the system when they are freed: it would keep about as much again in its heap."""
    with contextlib.suppress(OSError, AttributeError):  # no glibc: another system
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_TENSOR_BYTES)


def resident(field: str) -> int | None:
    """Bytes of ``VmRSS`` or ``VmHWM``, the peak since the last reset; None where the system does not tell."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(field)), None)


class Memory:
    """The peak of the memory that loading and training take: of the GPU, or of the process over what it had."""

    def __init__(self, device: str) -> None:
        self.device, self.before = device, resident("VmRSS")
        self.reset()

    def reset(self) -> None:
        """Forget the peak so far."""
        import torch

        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        elif Path("/proc/self/clear_refs").exists():
            Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int | None:
        """Bytes at the worst moment since the last reset."""
        import torch

        if self.device == "cuda":
            return int(torch.cuda.max_memory_allocated())
        now = resident("VmHWM")
        return None if now is None or self.before is None else now - self.before


def checked_pieces(chosen: argparse.Namespace, tokenizer: Any) -> tuple[list[list[int]], list[list[int]]]:
    """What is trained on, and what is held back."""
    pieces = sequences(chosen.data, tokenizer, chosen.sequence_length)
    held = max(1, min(HELD_BACK_MOST, int(len(pieces) * HELD_BACK_FRACTION)))
    if len(pieces) < held + chosen.micro_batch:
        raise SystemExit(
            f"{chosen.data} holds {len(pieces)} sequences of {chosen.sequence_length} tokens; "
            f"at least {held + chosen.micro_batch} are needed"
        )
    every = len(pieces) // held
    back = pieces[every - 1 :: every][:held]
    kept = [piece for index, piece in enumerate(pieces) if index % every != every - 1 or index // every >= held]
    return kept, back


def main(given: list[str] | None = None, tell: Callable[..., None] | None = None) -> dict[str, Any]:
    """Fine-tune, write the adapter, and say what it took and what it brought."""
    chosen = arguments(given)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import peft
    import torch
    from transformers import AutoTokenizer, Trainer, set_seed

    assert peft and Trainer  # loaded now, so that they do not count as memory of the training
    if chosen.device == "cpu":
        give_freed_memory_back()
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    set_seed(chosen.seed)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model, revision=chosen.revision)
    pieces, held_back = checked_pieces(chosen, tokenizer)
    memory = Memory(chosen.device)
    model = load(chosen)
    loading_peak = memory.peak()
    before = mean_loss(model, held_back)
    memory.reset()
    started = time.perf_counter()
    losses = train(model, pieces, chosen, tell or (lambda step, of, loss: print(f"step {step} of {of}: {loss:.4f}")))
    seconds = time.perf_counter() - started
    training_peak = memory.peak()
    after = mean_loss(model, held_back)
    model.save_pretrained(chosen.output)
    tokenizer.save_pretrained(chosen.output)
    steps, trainable = len(losses), sum(p.numel() for p in model.parameters() if p.requires_grad)
    result = {
        "trainable_parameters": trainable,
        "steps": steps,
        "tokens": steps * chosen.accumulation * chosen.micro_batch * chosen.sequence_length,
        "seconds": seconds,
        "held_back_sequences": len(held_back),
        "held_back_loss_before": before,
        "held_back_loss_after": after,
        "losses": losses,
        "settings": {name: getattr(chosen, name) for name in SETTINGS},
        "loading_peak_bytes": loading_peak,
        "training_peak_bytes": training_peak,
    }
    (chosen.output / "training.json").write_text(json.dumps(result, indent=2) + "\n")
    return result


if __name__ == "__main__":
    told = main()
    print(f"loss on held-back text: {told['held_back_loss_before']:.4f} → {told['held_back_loss_after']:.4f}")
