"""Train two small models of other shapes than the demo model, on the same text: for ``benchmarks/budget.py``.

    python benchmarks/budget_models.py OUT            # fused/ and wide/; minutes on a GPU, hours on a CPU

``fused`` is a Phi-3 (fused QKV and gate/up matrices, untied, 6 blocks of 256), ``wide`` a Llama with 8 heads on 2
key-value heads, tied embeddings and 3 blocks of 512. Everything else is ``data/demo/train.py``'s: corpus, split,
tokenizer, optimizer. The models of the published table are of 2026-11-26, 30 epochs, one NVIDIA H100, a minute each
(held-out loss 3.244 and 3.293 nats per token).
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

_DEMO = Path(__file__).resolve().parent.parent / "data" / "demo"
_TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SAME: dict[str, Any] = {
    "vocab_size": 2048,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def fused() -> tuple[Any, Any]:
    """Configuration and class of the Phi-3."""
    from transformers import Phi3Config, Phi3ForCausalLM

    shape = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "tie_word_embeddings": False, "sliding_window": None}
    return Phi3Config(**shape, **more, original_max_position_embeddings=512, **_SAME), Phi3ForCausalLM


def wide() -> tuple[Any, Any]:
    """Configuration and class of the Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 3, "num_attention_heads": 8}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = LlamaConfig(**shape, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=rope, **_SAME)
    return config, LlamaForCausalLM


MODELS = {"fused": fused, "wide": wide}


def train_one(name: str, out: Path) -> None:
    """Train one model into ``out/name``, a checkpoint folder with its tokenizer."""
    sys.path.insert(0, str(_DEMO))
    import train  # type: ignore[import-not-found]

    config, model_class = MODELS[name]()
    train.model_config = lambda _: config
    train.LlamaForCausalLM = model_class
    work = out / f".{name}"
    sys.argv = ["train.py", "--corpus", str(_DEMO / "corpus.txt.xz"), "--out", str(work), "--epochs", "30"]
    train.main()
    (work / "model").rename(out / name)
    for file in _TOKENIZER:
        if not (out / name / file).exists():
            shutil.copy(_DEMO / "model" / file, out / name / file)


def main() -> None:
    """Command line entry point."""
    out = Path(sys.argv[1])
    out.mkdir(parents=True, exist_ok=True)
    for name in MODELS:
        train_one(name, out)


if __name__ == "__main__":
    main()
