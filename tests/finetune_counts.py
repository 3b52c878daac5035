"""Run with the Python of the environment ``peft``: what autograd keeps of a layer, and what peft trains, as JSON.

``python tests/finetune_counts.py CONFIGS`` with a JSON list of ``[config, rank]``; the answer has, for each, the
trained weights as peft counts them and the bytes that one more layer adds to what autograd keeps per token.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

BATCH, LENGTH = 2, 48


def adapted(config: dict[str, Any], rank: int, layers: int) -> Any:
    """A small model of random weights in 4 bits with LoRA matrices."""
    made = AutoConfig.for_model(**{**config, "num_hidden_layers": layers})
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, quantization_config=quantization, device_map={"": "cpu"}
        )
    model.config.use_cache = False
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, lora).train()


def kept_bytes(model: Any) -> int:
    """Bytes of all storages that autograd keeps of a forward pass, but parameters."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, tuple[int, torch.Tensor]] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept.setdefault(storage.data_ptr(), (storage.nbytes(), tensor))
        return tensor

    ids = torch.randint(0, model.config.vocab_size, (BATCH, LENGTH))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids).loss
    del loss
    return sum(size for size, _ in kept.values())


def main() -> None:
    """Print the counts."""
    warnings.filterwarnings("ignore")
    found = []
    for config, rank in json.loads(sys.argv[1]):
        two, three = adapted(config, rank, 2), adapted(config, rank, 3)
        trained = sum(p.numel() for p in two.parameters() if p.requires_grad)
        found.append({"trained": trained, "per_token": (kept_bytes(three) - kept_bytes(two)) / (BATCH * LENGTH)})
    print(json.dumps(found))


if __name__ == "__main__":
    main()
