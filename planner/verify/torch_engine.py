"""A checkpoint directory run by transformers: 16-bit, or quantized by what transformers itself loads. Only in a child.

GPTQ, AWQ, bitsandbytes and the like are loaded by transformers' own quantizers, as users run them. Weights in 16 bits
are computed in float32 on a CPU, which is exact and what llama.cpp does with an F16 file; a GPU takes them as they are.
Quantized ones are computed in the type that the checkpoint names.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.errors import MODEL_REFUSED, ExecutionFailed, InputError, MissingDependency, first_line
from planner.verify.trial import AS_IT_IS, Loading

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_UNLIMITED = 1 << 20
"""Context of a model whose configuration states none."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A loaded model with its tokenizer."""

    model: Any
    tokenizer: Any
    vocab_size: int
    trained_context: int

    def tokenize(self, text: str) -> list[int]:
        """Tokens of ``text`` with the specials that the model puts around a text; markup in it is plain text."""
        found: list[int] = self.tokenizer(
            text, add_special_tokens=True, split_special_tokens=True, verbose=False
        ).input_ids
        return found

    def beginning(self) -> int | None:
        """The BOS token, where the tokenizer puts one before a text."""
        first = self.tokenizer("a", add_special_tokens=True).input_ids[0]
        return int(first) if first == self.tokenizer.bos_token_id else None

    def prepare(self, context: int) -> None:
        """Nothing: a forward pass without a cache needs no context."""

    def logits(self, chunks: list[list[int]], first: int) -> NDArray[np.float32]:
        """Logits from position ``first`` on, one chunk at a time: ``[len(chunks), length - first, n_vocab]``."""
        import numpy as np
        import torch

        out = np.empty((len(chunks), len(chunks[0]) - first, self.vocab_size), np.float32)
        with torch.inference_mode():
            for made, chunk in zip(out, chunks, strict=True):
                tokens = torch.tensor([chunk], device=self.model.device)
                logits = self.model(input_ids=tokens, use_cache=False, logits_to_keep=len(chunk) - first).logits
                made[:] = logits[0, -len(made) :].float().cpu().numpy()
        return out


def open_checkpoint(
    path: Path,
    *,
    on_gpu: bool,
    threads: int,
    progress: Callable[[str, float], None],
    loading: Loading = AS_IT_IS,
) -> Checkpoint:
    """Load a checkpoint directory; only safetensors, and no code from it is run.

    Args:
        on_gpu: all of it on the first GPU.
        threads: of torch, for what runs on the CPU.
        loading: in which type, and by which kernel.

    Raises:
        MissingDependency: torch, transformers or what the checkpoint's quantization needs is not installed.
        InputError: transformers cannot load it.
        ExecutionFailed: the memory does not suffice.
    """
    progress(f"load {path.name}", 0.0)
    torch, transformers = _libraries()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    cuda = _cuda(torch) if on_gpu else False
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        quantized = getattr(config, "quantization_config", None)
        if quantized is not None and loading.backend is not None:
            config.quantization_config = {**quantized, "backend": loading.backend}
        dtype = loading.dtype or ("auto" if quantized is not None or cuda else "float32")
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        model = _model(path, config, kind, "cuda" if cuda else None)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except ImportError as error:
        raise MissingDependency(
            f"{path.name} is quantized in a way that needs another package", numbers=str(error), hint=_package(path)
        ) from None
    except torch.OutOfMemoryError as error:
        raise ExecutionFailed(f"{path.name} does not fit in memory", numbers=str(error), code="no-memory") from None
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        raise InputError(
            f"transformers cannot load {path}",
            numbers=first_line(error)[:300],
            hint="give a checkpoint directory with config.json, safetensors files and a tokenizer",
            code=MODEL_REFUSED,
        ) from None
    model.eval()
    progress(f"load {path.name}", 1.0)
    text_config = config.get_text_config()
    context = int(getattr(text_config, "max_position_embeddings", None) or _UNLIMITED)
    return Checkpoint(model, tokenizer, int(text_config.vocab_size), context)


def _model(path: Path, config: Any, dtype: Any, device: str | None) -> Any:
    """The model by transformers' own quantizers, by GPTQModel itself where transformers would need optimum for it."""
    if _method(path) == "gptq" and importlib.util.find_spec("optimum") is None:
        from gptqmodel import GPTQModel

        return GPTQModel.load(
            str(path),
            device=device or "cpu",
            dtype=dtype,
            backend=config.quantization_config.get("backend", "auto"),
            trust_remote_code=False,
            local_files_only=True,
        ).model
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(
        path,
        config=config,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
        dtype=dtype,
        device_map=device,
    )


def _cuda(torch: Any) -> bool:
    """True, where torch sees a GPU.

    Raises:
        MissingDependency: it sees none, although one is planned.
    """
    if not torch.cuda.is_available():
        raise MissingDependency(
            "the installed torch sees no GPU",
            numbers=f"torch {torch.__version__}",
            hint="install a build for your GPU: https://pytorch.org/get-started/locally/",
            code="no-gpu-build",
        )
    return True


_BACKENDS = {"gptq": ("gptqmodel",), "awq": ("gptqmodel",), "bitsandbytes": ("bitsandbytes",)}
"""Packages that transformers imports for a quantization method."""


def backend_packages(path: Path) -> tuple[str, ...]:
    """Packages besides transformers that load a checkpoint, by its config.json."""
    return _BACKENDS.get(_method(path), ())


def import_backend(path: Path) -> None:
    """Import everything that loading a checkpoint imports, so that it counts as the bare process.

    Raises:
        MissingDependency: a package is not installed.
    """
    _libraries()
    for package in backend_packages(path):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise MissingDependency(
                f"{path.name} is quantized in a way that needs {package}", numbers=str(error), hint=_package(path)
            ) from None


def tool_version(path: Path) -> str:
    """``transformers 5.23.0, gptqmodel 7.6.0, torch 2.13.0``: all that runs a checkpoint."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("transformers", *backend_packages(path), "torch"):
        try:
            found.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def _libraries() -> tuple[Any, Any]:
    """``torch`` and ``transformers``.

    Raises:
        MissingDependency: one is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependency(
            "torch and transformers are needed to measure a checkpoint directory",
            numbers=str(error),
            hint="`pip install transformers torch`, or measure its GGUF file",
        ) from None
    return torch, transformers


_PACKAGES = {"gptq": "gptqmodel optimum", "awq": "gptqmodel", "bitsandbytes": "bitsandbytes accelerate"}


def _package(path: Path) -> str:
    """How to install what a checkpoint's quantization needs."""
    method = _method(path)
    wanted = _PACKAGES.get(method)
    return f"`pip install {wanted}`" if wanted else f"its quantization is {method!r}; see transformers' documentation"


def _method(path: Path) -> str:
    """``quant_method`` of a checkpoint; empty where it is not quantized."""
    from planner.models.directory import read_config

    return str((read_config(path).get("quantization_config") or {}).get("quant_method", ""))
