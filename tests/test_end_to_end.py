"""A checkpoint never seen before goes through plan, apply and verify, and computes what transformers computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Qplan

pytestmark = pytest.mark.slow

HIDDEN, LAYERS, FEED_FORWARD = 768, 12, 2048
TOKENIZER = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")

MAKE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(7)
config = LlamaConfig(vocab_size=2048, hidden_size={hidden}, num_hidden_layers={layers}, intermediate_size={ff},
    num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=1024, tie_word_embeddings=False)
model = LlamaForCausalLM(config).to(torch.bfloat16)
model.save_pretrained(sys.argv[1], max_shard_size="60MB")
"""

LOGITS = """
import sys, json, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
tokens = json.loads(sys.argv[2])
with torch.no_grad():
    print(json.dumps(model(torch.tensor([tokens])).logits[0, -1].tolist()))
"""

LLAMA = """
import sys, json, numpy as np, llama_cpp
llm = llama_cpp.Llama(sys.argv[1], n_ctx=64, n_threads=2, logits_all=True, verbose=False)
tokens = json.loads(sys.argv[2])
llm.eval(tokens)
print(json.dumps(np.asarray(llm.scores[len(tokens) - 1], dtype=float).tolist()))
"""


def python(program: str, *arguments: str) -> str:
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1] if done.stdout else ""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, demo_checkpoint: Path) -> Path:
    """About 100 million random weights in bf16, sharded, with the demo model's SentencePiece tokenizer."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("fresh") / "random-llama-100m"
    python(MAKE.format(hidden=HIDDEN, layers=LAYERS, ff=FEED_FORWARD), str(folder))
    for name in TOKENIZER:
        shutil.copy(demo_checkpoint / name, folder / name)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def test_plan_apply_verify_on_a_fresh_checkpoint(qplan: Qplan, checkpoint: Path, tmp_path: Path) -> None:
    import numpy as np

    planned = qplan("plan", str(checkpoint), "--context", "512", "--types", "Q8_0", "-o", "plan.json", cwd=tmp_path)
    assert planned.returncode == 0, planned.stderr
    done = qplan(
        "apply", "plan.json", "--output", "out", "--seconds", "60", "--keep-intermediate", "--json", cwd=tmp_path
    )
    assert done.returncode in {0, 5}, done.stderr
    report = json.loads(done.stdout)
    verdicts = {v["quantity"]: v for v in report["verdicts"]}
    assert verdicts["file_bytes"]["ok"]
    assert report["measured"]["perplexity_ratio"] == pytest.approx(1.0, abs=0.01)

    tokens = [1, 300, 17, 1999, 45, 678, 901, 5]
    reference = np.array(json.loads(python(LOGITS, str(checkpoint), json.dumps(tokens))))
    full = tmp_path / "out" / "random-llama-100m-BF16.gguf"
    ours = np.array(json.loads(python(LLAMA, str(full), json.dumps(tokens))))
    assert np.corrcoef(reference, ours)[0, 1] > 0.9999
    assert np.max(np.abs(reference - ours)) < 0.05 * np.std(reference) + 0.02
    verified = qplan("verify", str(tmp_path / "out" / "random-llama-100m-Q8_0.gguf"), "--seconds", "20")
    assert verified.returncode in {0, 5}, verified.stderr
