"""What llama.cpp says about a GGUF file that has every tensor shape and no weights."""

from __future__ import annotations

from pathlib import Path

from tests.convert_fixtures import quiet_llama_cpp


def load_errors(path: Path) -> list[str]:
    """What llama.cpp says against the file; empty when it loads. Nothing is allocated."""
    import llama_cpp

    messages: list[str] = []

    @llama_cpp.llama_log_callback
    def collect(level: int, text: bytes, _: object) -> None:
        messages.append(text.decode(errors="replace"))

    llama_cpp.llama_backend_init()
    llama_cpp.llama_log_set(collect, None)
    params = llama_cpp.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = 0
    params.n_gpu_layers = 0
    params.load_mtp = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    llama_cpp.llama_log_set(quiet_llama_cpp(), None)  # `collect` is gone when this returns
    if model:
        llama_cpp.llama_model_free(model)
        return []
    return [line for line in messages if "error" in line or "fail" in line] or messages[-3:]
