"""``python -m planner.execute.oracle_child``: ask llama.cpp, which ends its process on bad input."""

from __future__ import annotations

import ctypes
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from planner.core.candidate import Placement, Variant
from planner.core.codec import decode
from planner.core.errors import InputError
from planner.core.model import ModelSpec
from planner.core.units import MIB
from planner.execute.accounts import AccountsUnreadable, BufferAccount, read_accounts
from planner.execute.oracle import OracleAnswer, OracleDevice, OracleQuestion, OracleReport, OracleRequest, missing
from planner.execute.process import Progress, serve
from planner.execute.stub import write_stub
from planner.formats.ggml import type_traits
from planner.methods import gguf_mix

TENSOR_LINE = re.compile(r"^\[ *\d+/ *\d+\] +(\S+) +- \[([\d, ]+)\], type = +(\S+), size = .*?(?:\((\w+)\))?$", re.M)
"""A tensor of the dry run: name, shape, type, and the new type where it changes."""
TOTAL_LINE = re.compile(r"quant size += +([\d.]+) MiB")
BUFFER_LINE = re.compile(r"(\S+) +(compute|output) buffer size = +([\d.]+) MiB")
CACHE_LINE = re.compile(r": size = +([\d.]+) MiB \(")
LOG_ROUNDING_BYTES = 0.006 * MIB
"""The log has two decimals of a MiB."""
EXPERTS_OF_LAYER = r"blk\.{}\.ffn_(up|down|gate|gate_up)_(ch|)exps"
"""As ``--n-cpu-moe`` has it (``LLM_FFN_EXPS_REGEX`` in common/common.h)."""
REFUSAL_LINES = 3
_CPU, _GPUS = 0, (1, 2)  # enum ggml_backend_dev_type of ggml-backend.h: CPU, GPU, integrated GPU
_LOAD_MODE_NONE = 0  # LLAMA_LOAD_MODE_NONE: a mapped file is never counted without being allocated


class _BufferOverride(ctypes.Structure):
    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


class Refused(Exception):
    """llama.cpp says no; the message is its own."""


class Log:
    """llama.cpp's log since the last :meth:`take`; passed on to stderr, where a crash leaves it."""

    def __init__(self) -> None:
        self._parts: list[str] = []

    def write(self, text: str) -> None:
        """Take one piece of log, which need not be a whole line."""
        self._parts.append(text)
        sys.stderr.write(text)

    def take(self) -> str:
        """What was written since the last call."""
        text = "".join(self._parts)
        self._parts.clear()
        return text


class Library:
    """llama.cpp through its C interface; the fields are those of llama-cpp-python 0.3.36."""

    def __init__(self) -> None:
        try:
            import llama_cpp
        except (ImportError, OSError, RuntimeError) as error:  # a shared library that does not load
            raise missing(str(error)) from None
        self.api: Any = llama_cpp
        self.log = Log()
        # llama.cpp keeps only the address, so this object must live on
        self._callback = llama_cpp.llama_log_callback(lambda level, text, _: self.log.write(_decoded(text)))
        llama_cpp.llama_log_set(self._callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.ggml: Any = llama_cpp.llama_cpp._lib
        for name in ("dev_get", "buft_get_device", "cpu_buffer_type"):
            getattr(self.ggml, f"ggml_backend_{name}").restype = ctypes.c_void_p
        for name in ("dev_name", "dev_description", "buft_name"):
            getattr(self.ggml, f"ggml_backend_{name}").restype = ctypes.c_char_p
        self.ggml.ggml_backend_dev_count.restype = ctypes.c_size_t
        self.ggml.ggml_row_size.restype = ctypes.c_size_t
        self.gpus = tuple(device for device in self._devices() if self.device_type(device) in _GPUS)

    def _devices(self) -> Iterator[int]:
        for index in range(self.ggml.ggml_backend_dev_count()):
            yield self.ggml.ggml_backend_dev_get(ctypes.c_size_t(index))

    def device_type(self, device: int) -> int:
        """Its ``ggml_backend_dev_type``."""
        return int(self.ggml.ggml_backend_dev_type(ctypes.c_void_p(device)))

    def device_name(self, device: int) -> str:
        """As the driver calls it."""
        return _decoded(self.ggml.ggml_backend_dev_description(ctypes.c_void_p(device)))

    def expert_overrides(self, layers: int) -> Any:
        """``llama_model_tensor_buft_override``s that keep the experts of the first ``layers`` layers in RAM."""
        buffer_type = self.ggml.ggml_backend_cpu_buffer_type()
        patterns = [EXPERTS_OF_LAYER.format(layer).encode() for layer in range(layers)]
        return (_BufferOverride * (layers + 1))(*(_BufferOverride(pattern, buffer_type) for pattern in patterns))

    def row_bytes(self, type_: str, weights: int) -> int:
        """``ggml_row_size``."""
        return int(self.ggml.ggml_row_size(type_traits(type_).id, ctypes.c_int64(weights)))


def _decoded(text: bytes | None) -> str:
    return (text or b"").decode("utf-8", errors="replace")


def work(request: dict[str, Any], progress: Progress) -> OracleReport:
    """Answer every question about one model."""
    asked = decode(OracleRequest, request, what="the request")
    library = Library()
    answers = []
    full = ["F32"] * len(asked.model.tensors)
    with _file(asked, "half.gguf", source_types(asked.model)) as half, _file(asked, "full.gguf", full) as source:
        for done, question in enumerate(asked.questions):
            answers.append(_answer(library, asked, source if question.variant.type == "F32" else half, question))
            progress(done + 1, len(asked.questions))
    names = tuple(library.device_name(gpu) for gpu in library.gpus)
    return OracleReport(tool=f"llama-cpp-python {library.api.__version__}", gpus=names, answers=tuple(answers))


def source_types(model: ModelSpec) -> list[str]:
    """Types of the 16-bit file that is quantized."""
    return [gguf_mix.source_type(model, tensor) for tensor in model.tensors]


@contextmanager
def _file(asked: OracleRequest, name: str, types: Sequence[str]) -> Iterator[Path]:
    path = Path(asked.directory) / name
    write_stub(asked.model, path, types)
    try:
        yield path
    finally:
        path.unlink()


def _answer(library: Library, asked: OracleRequest, source: Path, question: OracleQuestion) -> OracleAnswer:
    try:
        types, size = dry_run(library, asked.model, source, question.variant)
        counts = tuple(sorted(Counter(types).items()))
        if question.placement is None:
            return OracleAnswer(tensor_bytes=size, type_counts=counts)
        with _file(asked, "quantized.gguf", types) as quantized:
            return _placed(library, quantized, question, size, counts, asked.accounts)
    except Refused as refusal:
        return OracleAnswer(refused=str(refusal))


def dry_run(library: Library, model: ModelSpec, source: Path, variant: Variant) -> tuple[list[str], int]:
    """The type that llama.cpp chooses for each of ``model.tensors``, and the bytes of all.

    Raises:
        Refused: llama.cpp quantizes no such model to this type.
    """
    api = library.api
    settings = api.llama_model_quantize_default_params()
    settings.ftype, settings.dry_run, settings.nthread = gguf_mix.file_type(variant.type).id, True, 1
    settings.allow_requantize = True
    entries = (api.llama_model_imatrix_data * 2)()
    if variant.imatrix:
        entries[0].name = b"any"  # that there is one decides; a dry run reads none of it
        settings.imatrix = entries
    library.log.take()
    output = str(source.with_name("unwritten.gguf")).encode()
    code = api.llama_model_quantize(str(source).encode(), output, ctypes.byref(settings))
    text = library.log.take()
    if code:
        raise Refused(refusal(text))
    chosen = parse_types(text)
    try:
        types = [chosen[tensor.name] for tensor in model.tensors]
    except KeyError as error:
        raise InputError(
            f"llama.cpp's dry run does not name the tensor {error}", hint="its log has changed", code="oracle-log"
        ) from None
    pairs = zip(types, model.tensors, strict=True)
    size = sum(library.row_bytes(type_, t.shape[0]) * (t.element_count // t.shape[0]) for type_, t in pairs)
    _check_total(text, size)
    return types, size


def parse_types(text: str) -> dict[str, str]:
    """The ggml type of each tensor by name, out of a dry run's log, which mixes its cases (``q4_K``)."""
    return {name: (new or old).upper() for name, _, old, new in TENSOR_LINE.findall(text)}


def _check_total(text: str, size: int) -> None:
    told = TOTAL_LINE.findall(text)
    if not told or abs(float(told[-1]) * MIB - size) > LOG_ROUNDING_BYTES:
        raise InputError(
            "llama.cpp's dry run was not understood",
            numbers=f"its tensors add up to {size / MIB:.2f} MiB, it says {told[-1] if told else 'nothing'}",
            hint="its log has changed",
            code="oracle-log",
        )


def refusal(text: str) -> str:
    """The lines of a log that say why, or its last ones."""
    lines = [line.strip() for line in text.splitlines() if line.strip(" .")]
    told = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
    return "; ".join((told or lines)[-REFUSAL_LINES:]) or "it gave no reason"


def _placed(
    library: Library,
    path: Path,
    question: OracleQuestion,
    size: int,
    counts: tuple[tuple[str, int], ...],
    accounts: bool,
) -> OracleAnswer:
    placement = question.placement
    assert placement is not None
    shares = question.gpu_shares
    enough = len(shares) <= len(library.gpus)
    gpus = library.gpus[: len(shares)] if enough else ()
    with _model(library, path, placement, gpus, shares) as model:
        library.log.take()
        context = library.api.llama_init_from_model(model, _context_settings(library, placement))
        text = library.log.take()
        if not context:
            raise Refused(refusal(text))
        host, devices, notes = _devices(library, context, text, gpus, accounts)
        library.api.llama_free(context)
    return OracleAnswer(
        tensor_bytes=size, type_counts=counts, devices=devices, host=host, on_cpu_only=not enough, notes=notes
    )


@contextmanager
def _model(
    library: Library, path: Path, placement: Placement, gpus: Sequence[int], split: Sequence[float]
) -> Iterator[Any]:
    api = library.api
    settings = api.llama_model_default_params()
    settings.no_alloc, settings.load_mode = True, _LOAD_MODE_NONE
    settings.n_gpu_layers = placement.gpu_layers if gpus else 0
    # interleaved copies depend on this CPU, and with AMX the graph of MLA aborts without allocation (0.3.36)
    settings.use_extra_bufts = False
    chosen = (ctypes.c_void_p * (len(gpus) + 1))(*gpus, None)
    settings.devices = ctypes.cast(chosen, ctypes.c_void_p)
    shares = (ctypes.c_float * max(api.llama_max_devices(), len(split)))(*split)
    if len(gpus) > 1:
        settings.tensor_split = shares
    overrides = library.expert_overrides(placement.cpu_expert_layers if gpus else 0)
    if len(overrides) > 1:
        settings.tensor_buft_overrides = ctypes.cast(overrides, ctypes.c_void_p)
    library.log.take()
    model = api.llama_model_load_from_file(str(path).encode(), settings)
    if not model:
        raise Refused(refusal(library.log.take()))
    try:
        yield model
    finally:
        api.llama_model_free(model)


def _context_settings(library: Library, placement: Placement) -> Any:
    """As llama.cpp's own programs set it, where the library's defaults differ."""
    settings = library.api.llama_context_default_params()
    settings.n_ctx = placement.context * placement.sequences
    settings.n_seq_max = placement.sequences
    settings.n_batch = placement.batch
    settings.n_ubatch = placement.ubatch
    settings.type_k = settings.type_v = type_traits(placement.kv_type.upper()).id
    settings.flash_attn_type = int(placement.flash_attention)
    settings.offload_kqv = settings.op_offload = True
    settings.swa_full = settings.kv_unified = False
    return settings


def _devices(
    library: Library, context: Any, text: str, gpus: Sequence[int], accounts: bool
) -> tuple[OracleDevice, tuple[OracleDevice, ...], tuple[str, ...]]:
    output = sum(size for name, kind, size in logged_buffers(text) if kind == "output")
    try:
        if not accounts:
            raise AccountsUnreadable("reading them ended the process")
        found = read_accounts(library.ggml, context)
        _agree(library, found, text)
    except AccountsUnreadable as error:
        note = f"llama.cpp's accounts cannot be read ({error}); its log tells no weights"
        return _from_log(text, output, gpus, library), (), (note,)
    host = _summed("host", [a for a in found if _owner(library, a, gpus) is None], output)
    devices = tuple(
        _summed(library.device_name(gpu), [a for a in found if _owner(library, a, gpus) == gpu], None) for gpu in gpus
    )
    return host, devices, ()


def _owner(library: Library, account: BufferAccount, gpus: Sequence[int]) -> int | None:
    """The GPU in whose memory a buffer lies; ``None`` for RAM, pinned or not."""
    buffer_type = ctypes.c_void_p(account.buffer_type)
    device = library.ggml.ggml_backend_buft_get_device(buffer_type)
    if not device or device not in gpus:
        return None
    name = _decoded(library.ggml.ggml_backend_buft_name(buffer_type))
    return None if name.endswith("_Host") else int(device)


def _summed(name: str, accounts: Sequence[BufferAccount], output: int | None) -> OracleDevice:
    return OracleDevice(
        name=name,
        weights_bytes=sum(account.model_bytes for account in accounts),
        kv_cache_bytes=sum(account.context_bytes for account in accounts),
        compute_bytes=sum(account.compute_bytes for account in accounts),
        output_bytes=output,
    )


def _from_log(text: str, output: int, gpus: Sequence[int], library: Library) -> OracleDevice:
    compute = [size for name, kind, size in logged_buffers(text) if kind == "compute"]
    cache = round(sum(float(found) for found in CACHE_LINE.findall(text)) * MIB)
    known = not gpus  # with a GPU the log does not say where the cache lies
    return OracleDevice(
        name="host",
        kv_cache_bytes=cache if known else None,
        compute_bytes=sum(compute) if known else None,
        output_bytes=output,
        exact=False,
    )


def logged_buffers(text: str) -> list[tuple[str, str, int]]:
    """``(buffer, compute or output, bytes)`` of a log."""
    return [(name, kind, round(float(size) * MIB)) for name, kind, size in BUFFER_LINE.findall(text)]


def _agree(library: Library, accounts: Sequence[BufferAccount], text: str) -> None:
    """Believe the accounts only where the log says the same."""
    names = {_decoded(library.ggml.ggml_backend_buft_name(ctypes.c_void_p(a.buffer_type))): a for a in accounts}
    for name, kind, size in logged_buffers(text):
        known = names.get(name)
        if kind == "compute" and (known is None or abs(known.compute_bytes - size) > LOG_ROUNDING_BYTES):
            raise AccountsUnreadable(f"they do not agree with the log about {name}")
    cache = sum(float(found) for found in CACHE_LINE.findall(text)) * MIB
    counted = sum(account.context_bytes for account in accounts)
    if cache and counted < 0.99 * cache:
        raise AccountsUnreadable("they do not agree with the log about the KV cache")


if __name__ == "__main__":
    raise SystemExit(serve(work))
