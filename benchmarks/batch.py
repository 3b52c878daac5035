"""How long ``qplan estimate --batch`` takes for many different cases.

Run: ``python benchmarks/batch.py [--cases 10000] [--limit SECONDS] [--common]``. Every model of the catalog (or 31
common ones), types, contexts, KV types, offloads and devices, shuffled. With ``--limit`` the exit code says whether
it was fast enough.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from planner.models import catalog  # noqa: E402

TYPES = ("Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "Q4_0", "Q3_K_M", "Q2_K", "F16", "IQ4_XS")
OTHERS = (("awq", "4bit"), ("gptq", "4bit"), ("bitsandbytes", "nf4"))
CONTEXTS = (2048, 4096, 8192, 16384, 32768, 65536, 131072)
KV_TYPES = ("f16", "q8_0", "q4_0")
DEVICES = ("GeForce RTX 4090", "GeForce RTX 3060", "Radeon RX 7900 XTX", "M3 Max", "H100 SXM", "EPYC 9374F")
SEED = 7
RUN = "import sys; from planner.cli import main; sys.argv = ['qplan', *sys.argv[1:]]; main()"


COMMON = """
llama-2-7b llama-2-13b llama-2-70b llama-3-8b llama-3-70b llama-3.1-8b llama-3.1-70b llama-3.2-1b
llama-3.2-3b mistral-7b-v0.3 mixtral-8x7b tinyllama-1.1b qwen2.5-0.5b qwen2.5-7b qwen2.5-14b
qwen2.5-32b qwen2.5-72b qwen3-4b qwen3-8b qwen3-14b qwen3-32b qwen3-30b-a3b gemma-2-9b gemma-3-4b
gemma-3-12b gemma-3-27b phi-4 deepseek-v2-lite deepseek-v3 gpt-oss-20b gpt-oss-120b
""".split()  # noqa: SIM905


def cases(count: int, names: Sequence[str] = catalog.names()) -> list[dict[str, Any]]:
    """Different cases in random order: models and types by turns, so that all occur; the rest at random."""
    draw = random.Random(SEED)
    kinds = [("gguf", type_) for type_ in TYPES] * 3 + list(OTHERS)
    pairs = itertools.cycle(itertools.product(sorted(names), kinds))
    found: dict[str, dict[str, Any]] = {}
    while len(found) < count:
        name, (method, type_) = next(pairs)
        layers = catalog.lookup(name).n_layer  # type: ignore[union-attr]
        case: dict[str, Any] = {
            "model": name,
            "method": method,
            "type": type_,
            "context": draw.choice(CONTEXTS),
            "kv_type": draw.choice(KV_TYPES) if method == "gguf" else "f16",
            "gpu_layers": draw.choice(("all", 0, draw.randrange(layers + 2))),
            "device": draw.choice(DEVICES),
            "depth": draw.choice((0, 1024)),
        }
        found.setdefault(json.dumps(case), case)
    made = list(found.values())
    draw.shuffle(made)
    return [{"id": str(i), **case} for i, case in enumerate(made)]


def run(path: Path, *options: str) -> tuple[float, float, str]:
    """Wall seconds, CPU seconds and the answers of ``qplan estimate --batch``."""
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *options, "-c", RUN, "estimate", "--batch", str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
    )
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout


def main() -> int:
    """Print the time and how the cases were answered."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--common", action="store_true", help="31 common models instead of the whole catalog")
    parser.add_argument("--limit", type=float, help="fail above so many seconds")
    parser.add_argument("--keep", type=Path, help="write the cases here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = given.keep or Path(folder) / "cases.jsonl"
        path.write_text(
            "".join(json.dumps(case) + "\n" for case in cases(given.cases, COMMON if given.common else catalog.names()))
        )
        wall, cpu, answers = run(path)
    rows = [json.loads(line) for line in answers.splitlines()]
    errors = [row["error"]["code"] for row in rows if "error" in row]
    kinds = {code: errors.count(code) for code in sorted(set(errors))}
    print(f"{len(rows)} answers in {wall:.2f} s wall, {cpu:.2f} s CPU; {len(rows) - len(errors)} estimates, {kinds}")
    return int(len(rows) != given.cases or (given.limit is not None and wall > given.limit))


if __name__ == "__main__":
    sys.exit(main())
