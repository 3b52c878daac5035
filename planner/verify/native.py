"""llama.cpp through its C interface, as llama-bench and llama-perplexity use it. Only a child process imports this.

The class ``llama_cpp.Llama`` is no help here: it keeps ``n_batch × n_vocab`` floats of its own and chooses flash
attention differently. Struct fields are those of llama-cpp-python 0.3.36.
"""

from __future__ import annotations

import ctypes
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.core.errors import MODEL_REFUSED, ExecutionFailed, InputError, MissingDependency, UsageError
from planner.core.units import MIB
from planner.verify.trial import Buffer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from planner.core.candidate import Placement

_BUFFER_LINE = re.compile(r"(\S+)\s+(model|KV|RS|compute|output) buffer size =\s*([\d.]+) MiB")
_LOG_LEVEL_DEBUG = 1
"""GGML_LOG_LEVEL_DEBUG; the levels are none, debug, info, warn, error, cont."""

# enum ggml_type in ggml.h, for the types a KV cache can have
_KV_TYPE_IDS = {
    "f32": 0,
    "f16": 1,
    "q4_0": 2,
    "q4_1": 3,
    "q5_0": 6,
    "q5_1": 7,
    "q8_0": 8,
    "iq4_nl": 20,
    "bf16": 30,
}

FLASH_ATTENTION_AUTO = -1
"""LLAMA_FLASH_ATTN_TYPE_AUTO, llama-perplexity's default; 0 is off and 1 is on."""

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction done."""


@dataclass(slots=True)
class NativeLog:
    """llama.cpp's log: passed on to stderr, and its memory report kept."""

    buffers: list[Buffer] = field(default_factory=list)
    _line: str = ""

    def write(self, level: int, text: bytes) -> None:
        """Take one piece of log, which need not be a whole line."""
        if level == _LOG_LEVEL_DEBUG:
            return
        self._line += text.decode("utf-8", errors="replace")
        while "\n" in self._line:
            line, self._line = self._line.split("\n", 1)
            sys.stderr.write(line + "\n")
            if match := _BUFFER_LINE.search(line):
                size = round(float(match[3]) * MIB)
                self.buffers.append(Buffer(name=match[1], kind=match[2], size_bytes=size))

    def take_buffers(self) -> tuple[Buffer, ...]:
        """The memory report since the last call, equal (name, kind) added up: window layers report apart."""
        totals: dict[tuple[str, str], int] = {}
        for buffer in self.buffers:
            totals[buffer.name, buffer.kind] = totals.get((buffer.name, buffer.kind), 0) + buffer.size_bytes
        self.buffers.clear()
        return tuple(Buffer(name=name, kind=kind, size_bytes=size) for (name, kind), size in totals.items())


LOG = NativeLog()


@cache
def library() -> Any:
    """The ``llama_cpp`` module with its log led to :data:`LOG`.

    Raises:
        MissingDependency: it is not installed or its shared library does not load.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError, FileNotFoundError) as error:
        raise MissingDependency(
            "llama-cpp-python is needed to measure a GGUF file",
            numbers=str(error),
            hint="`pip install 'qplan[gguf]'`",
        ) from None
    callback = llama_cpp.llama_log_callback(lambda level, text, _user: LOG.write(level, text or b""))
    llama_cpp.llama_log_set(callback, None)
    library_callbacks.append(callback)
    llama_cpp.llama_backend_init()
    return llama_cpp


library_callbacks: list[Any] = []
"""Keeps the log callback alive: llama.cpp holds only its address."""


def tool_version() -> str:
    """As ``llama-cpp-python 0.3.36``."""
    return f"llama-cpp-python {library().__version__}"


def kv_type_id(kv_type: str) -> int:
    """ggml's number of a KV-cache type.

    Raises:
        UsageError: llama.cpp has no KV cache of this type.
    """
    if kv_type not in _KV_TYPE_IDS:
        raise UsageError(
            f"{kv_type!r} is not a type of a KV cache", hint=f"one of {', '.join(_KV_TYPE_IDS)}", code="bad-kv-type"
        )
    return _KV_TYPE_IDS[kv_type]


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model."""

    handle: Any
    vocabulary: Any
    vocab_size: int
    trained_context: int

    def tokenize(self, text: str) -> list[int]:
        """Tokens of ``text`` with the specials that the model puts around a text; markup in it is plain text."""
        import ctypes

        lib, data = library(), text.encode()
        count = len(data) + 2  # a token is at least a byte of text, plus BOS and EOS
        tokens = (ctypes.c_int32 * count)()
        made = lib.llama_tokenize(self.vocabulary, data, len(data), tokens, count, True, False)
        if made < 0:
            tokens = (ctypes.c_int32 * -made)()
            made = lib.llama_tokenize(self.vocabulary, data, len(data), tokens, -made, True, False)
        if made < 0:
            raise InputError("the model's tokenizer refuses the text", numbers=f"{len(data)} bytes", code="bad-text")
        return list(tokens[:made])

    def beginning(self) -> int | None:
        """The BOS token, where the model wants one."""
        lib = library()
        return int(lib.llama_vocab_bos(self.vocabulary)) if lib.llama_vocab_get_add_bos(self.vocabulary) else None

    def begun(self, chunk: Sequence[int]) -> list[int]:
        """A chunk of text with BOS in place of its first token, where the model wants one."""
        beginning = self.beginning()
        return list(chunk) if beginning is None else [beginning, *chunk[1:]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Offload:
    """Where a model's weights go, as llama.cpp's ``-ngl``, ``--n-cpu-moe`` and ``--tensor-split``."""

    gpu_layers: int = 0
    cpu_expert_layers: int = 0
    tensor_split: tuple[float, ...] = ()

    @classmethod
    def of(cls, placement: Placement) -> Offload:
        """The part of a placement that loading a model needs."""
        return cls(
            gpu_layers=placement.gpu_layers,
            cpu_expert_layers=placement.cpu_expert_layers,
            tensor_split=placement.tensor_split,
        )


ON_CPU = Offload()
"""No layer on a GPU."""


def set_offload(parameters: Any, offload: Offload) -> tuple[Any, ...]:
    """Set the model parameters; the caller keeps the answer, which llama.cpp only borrows."""
    import ctypes

    lib = library()
    parameters.n_gpu_layers = offload.gpu_layers
    kept: list[Any] = []
    if offload.tensor_split:
        count = max(int(lib.llama_max_devices()), len(offload.tensor_split))
        kept.append((ctypes.c_float * count)(*offload.tensor_split))
        parameters.tensor_split = kept[-1]
    if offload.cpu_expert_layers:
        # struct llama_model_tensor_buft_override of llama.h: a pattern and a buffer type; a null pattern ends the list
        buffer_type = lib.llama_cpp._lib.ggml_backend_cpu_buffer_type
        buffer_type.restype = ctypes.c_void_p
        rows = (ctypes.c_void_p * (2 * offload.cpu_expert_layers + 2))()
        for layer in range(offload.cpu_expert_layers):
            pattern = ctypes.create_string_buffer(rf"blk\.{layer}\.ffn_(up|down|gate|gate_up)_(ch)?exps".encode())
            kept.append(pattern)
            rows[2 * layer], rows[2 * layer + 1] = ctypes.addressof(pattern), buffer_type()
        kept.append(rows)
        parameters.tensor_buft_overrides = ctypes.addressof(rows)
    return tuple(kept)


@contextmanager
def open_model(
    path: Path, *, offload: Offload, repack: bool, progress: Progress, writable: bool = False
) -> Iterator[Model]:
    """Load ``path`` (the first part of a split file), memory-mapped as llama.cpp does by default.

    ``repack`` is llama.cpp's default; False is its programs' ``--no-repack``. ``writable``: into memory that may be
    written to, not mapped.

    Raises:
        InputError: llama.cpp refuses the file.
    """
    lib = library()
    parameters = lib.llama_model_default_params()
    borrowed = set_offload(parameters, offload)
    parameters.use_extra_bufts = repack
    if writable:
        parameters.load_mode = lib.LLAMA_LOAD_MODE_NONE

    def report(fraction: float, _user: object) -> bool:
        progress(f"load {path.name}", fraction)
        return True  # go on

    callback = lib.llama_progress_callback(report)  # held by this frame while llama.cpp may call it
    parameters.progress_callback = callback
    handle = lib.llama_model_load_from_file(str(path).encode(), parameters)
    if not handle:
        raise InputError(
            f"llama.cpp cannot load {path}",
            hint="its reason is in the log; quantize the model again if the file is damaged",
            code=MODEL_REFUSED,
        )
    try:
        vocabulary = lib.llama_model_get_vocab(handle)
        size = int(lib.llama_vocab_n_tokens(vocabulary))
        yield Model(handle, vocabulary, size, int(lib.llama_model_n_ctx_train(handle)))
    finally:
        lib.llama_model_free(handle)
        del borrowed  # the model reads the split as long as it lives


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextOptions:
    """What a context is opened with; counts are tokens."""

    context: int
    """Per sequence."""
    batch: int
    ubatch: int
    threads: int
    kv_type: str = "f16"
    flash_attention: int = FLASH_ATTENTION_AUTO
    sequences: int = 1
    eval_callback: Any = None
    """llama.cpp's ``cb_eval``, as :func:`planner.verify.tensors.eval_callback` makes it."""


@dataclass(frozen=True, slots=True)
class Context:
    """A KV cache with compute buffers."""

    handle: Any
    memory: Any
    vocab_size: int

    def clear(self) -> None:
        """Empty the KV cache."""
        library().llama_memory_clear(self.memory, True)

    def set_threads(self, count: int) -> None:
        """Use ``count`` threads from the next decode on."""
        library().llama_set_n_threads(self.handle, count, count)

    def cut(self, length: int) -> bool:
        """Keep the first ``length`` tokens; False where this kind of cache cannot."""
        return bool(library().llama_memory_seq_rm(self.memory, 0, length, -1))

    def state(self) -> bytearray | None:
        """The first sequence's cache as llama.cpp saves it; ``None`` where it does not."""
        lib = library()
        size = int(lib.llama_state_seq_get_size(self.handle, 0))
        held = bytearray(size)
        if not size or lib.llama_state_seq_get_data(self.handle, _bytes_of(held), size, 0) != size:
            return None
        return held

    def restore(self, state: bytearray) -> bool:
        """Empty the cache and fill it from a saved state; False where llama.cpp refuses it."""
        self.clear()
        lib = library()
        return bool(lib.llama_state_seq_set_data(self.handle, _bytes_of(state), len(state), 0) == len(state))

    def decode(self, tokens: Any, count: int) -> None:
        """Append ``count`` tokens of a ctypes int32 array and wait; only the last gives logits.

        Raises:
            ExecutionFailed: llama.cpp could not.
        """
        lib = library()
        _checked(lib.llama_decode(self.handle, lib.llama_batch_get_one(tokens, count)))
        lib.llama_synchronize(self.handle)

    def logits(self, chunks: Sequence[Sequence[int]], first: int) -> NDArray[np.float32]:
        """Logits of the positions from ``first`` on of fresh sequences of equal length, decoded in one batch.

        ``[len(chunks), length - first, n_vocab]``: a view of llama.cpp's memory, valid until the next decode.
        """
        import numpy as np

        lib, length = library(), len(chunks[0])
        self.clear()
        batch = lib.llama_batch_init(len(chunks) * length, 0, 1)
        try:
            batch.n_tokens = len(chunks) * length
            for i in range(batch.n_tokens):
                sequence, position = divmod(i, length)
                batch.token[i], batch.pos[i], batch.n_seq_id[i] = chunks[sequence][position], position, 1
                batch.seq_id[i][0], batch.logits[i] = sequence, position >= first
            _checked(lib.llama_decode(self.handle, batch))
        finally:
            lib.llama_batch_free(batch)
        pointer = lib.llama_get_logits_ith(self.handle, first)
        return np.ctypeslib.as_array(pointer, shape=(len(chunks), length - first, self.vocab_size))


def _bytes_of(buffer: bytearray) -> Any:
    return (ctypes.c_uint8 * len(buffer)).from_buffer(buffer)


def _checked(status: int) -> None:
    if status:
        raise ExecutionFailed(
            "llama.cpp could not run the model",
            numbers=f"llama_decode returned {status} (1: no room in the KV cache, -2: out of memory)",
            code="decode-failed",
        )


@contextmanager
def open_context(model: Model, options: ContextOptions) -> Iterator[Context]:
    """A context of ``model``.

    ``swa_full`` and ``kv_unified`` are off as in llama.cpp's own programs; the library's defaults differ.

    Raises:
        ExecutionFailed: llama.cpp refuses, for want of memory or as a quantized KV cache needs flash attention.
    """
    lib = library()
    parameters = lib.llama_context_default_params()
    parameters.n_ctx = options.context * options.sequences
    parameters.n_seq_max = options.sequences
    parameters.n_batch = min(options.batch, parameters.n_ctx)
    parameters.n_ubatch = min(options.ubatch, parameters.n_batch)
    parameters.n_threads = parameters.n_threads_batch = options.threads
    parameters.type_k = parameters.type_v = kv_type_id(options.kv_type)
    parameters.flash_attn_type = options.flash_attention
    parameters.offload_kqv = True
    parameters.swa_full = False
    parameters.kv_unified = False
    if options.eval_callback is not None:
        parameters.cb_eval = options.eval_callback
    handle = lib.llama_init_from_model(model.handle, parameters)
    if not handle:
        raise ExecutionFailed(
            "llama.cpp cannot open a context",
            numbers=f"{options.sequences} × {options.context} tokens, KV cache {options.kv_type}, "
            f"flash attention {options.flash_attention}",
            hint="a smaller context needs less memory; a quantized KV cache needs flash attention",
            code="context-refused",
        )
    try:
        yield Context(handle, lib.llama_get_memory(handle), model.vocab_size)
    finally:
        lib.llama_free(handle)
