"""Which ggml type each tensor gets: the mixes behind llama.cpp's file types.

``Q4_K_M`` names no type but a recipe: most tensors get Q4_K, half of ``attn_v`` and ``ffn_down`` Q6_K, and
so on. The recipes depend on the layer, the architecture, the number of experts, grouped-query attention and
on whether an importance matrix is at hand. Source of all rules here: ``src/llama-quant.cpp`` of llama.cpp as
in llama-cpp-python 0.3.36; the tests compare with its own dry run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache

from planner.core.data import read_table
from planner.core.errors import InputError, UsageError
from planner.core.model import ModelSpec, Tensor
from planner.formats.ggml import type_traits


@dataclass(frozen=True, slots=True)
class FileType:
    """One of llama.cpp's file types (``LLAMA_FTYPE_MOSTLY_…``)."""

    name: str
    id: int
    default_type: str
    requires_imatrix: bool
    usable: bool
    """False for types that only models trained for them survive."""
    note: str

    @property
    def gains_by_imatrix(self) -> bool:
        """Whether a matrix is worth its minutes unasked: types of less than 4 bits, and those of the IQ kind.

        ggerganov/llama.cpp PR 4930 (2024-01): Q2_K to Q3_K lose a fifth to a third less perplexity, Q6_K a sixth of
        next to nothing.
        """
        return self.usable and (self.requires_imatrix or self.default_type.startswith(("IQ", "Q2_", "Q3_")))


@cache
def file_types() -> dict[str, FileType]:
    """All file types by name, from the largest to the smallest."""
    return {
        row["name"]: FileType(
            row["name"],
            int(row["id"]),
            row["default_type"],
            row["requires_imatrix"] == "1",
            row["usable"] == "1",
            row["note"],
        )
        for row in read_table("gguf_ftypes.csv")
    }


def file_type(name: str) -> FileType:
    """The file type called ``name``.

    Raises:
        UsageError: llama.cpp has no such file type (``unknown-type``).
    """
    found = file_types().get(name)
    if found is None:
        raise UsageError(f"{name!r} is not a GGUF type", hint=f"one of {', '.join(file_types())}", code="unknown-type")
    return found


ATTENTION_V, ATTENTION_QKV, ATTENTION_K, ATTENTION_Q, ATTENTION_OUTPUT = "v", "qkv", "k", "q", "attention output"
FFN_UP, FFN_GATE, FFN_DOWN, OUTPUT, TOKEN_EMBEDDING, OTHER = "up", "gate", "down", "output", "embedding", "other"

_CATEGORY_BY_PART = (
    ("attn_qkv.weight", ATTENTION_QKV),
    ("attn_kv_b.weight", ATTENTION_V),
    ("attn_v.weight", ATTENTION_V),
    ("attn_k.weight", ATTENTION_K),
    ("attn_q.weight", ATTENTION_Q),
    ("attn_output.weight", ATTENTION_OUTPUT),
    ("ffn_up", FFN_UP),
    ("ffn_gate", FFN_GATE),
    ("ffn_down", FFN_DOWN),
)

_KEPT_PARTS = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ffn_gate_tid2eid.weight",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
    "attn_rel_b.weight",
    ".position_embd",
    ".patch_embd",
)
"""Parts of the names of matrices that llama.cpp never quantizes."""
_KEPT_NAMES = ("position_embd.weight", "token_types.weight")
_F32_IN_SOURCE = (
    "ffn_gate_inp.weight",
    "ffn_gate_inp_shexp.weight",
    "ssm_conv1d",
    "shortconv.conv.weight",
    "altup_correct_coef",
    "altup_predict_coef",
)
"""Matrices that the converter writes as F32 (``conversion/base.py``)."""

_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
"""Type of smaller blocks for a row that is no whole number of blocks."""

_LOW_BIT = frozenset({"IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ2_S", "IQ2_M", "IQ1_M"})
_EIGHT_EXPERT_OUTPUT = frozenset(
    {"Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS"}
)


@cache
def category(name: str) -> str:
    """What role the tensor called ``name`` plays for the mixes."""
    if name == "output.weight":
        return OUTPUT
    if name in ("token_embd.weight", "per_layer_token_embd.weight"):
        return TOKEN_EMBEDDING
    return next((found for part, found in _CATEGORY_BY_PART if part in name), OTHER)


def is_quantized(tensor: Tensor) -> bool:
    """Whether llama.cpp quantizes ``tensor`` at all: a matrix whose name ends in ``weight``, with exceptions."""
    return _may_quantize(tensor.name) and _dimension_count(tensor.shape) >= 2


@cache
def _may_quantize(name: str) -> bool:
    return name.endswith("weight") and name not in _KEPT_NAMES and not any(part in name for part in _KEPT_PARTS)


def source_type(model: ModelSpec, tensor: Tensor) -> str:
    """Type of ``tensor`` in the 16-bit file that is quantized: F32 for vectors, norms and biases."""
    if model.source.is_gguf and tensor.dtype is not None:
        return tensor.dtype
    kept_f32 = any(part in tensor.name for part in _F32_IN_SOURCE)
    if len(tensor.shape) < 2 or tensor.name.endswith("_norm.weight") or kept_f32:
        return "F32"
    return "F16" if tensor.name.endswith(".weight") else "F32"


def _dimension_count(shape: tuple[int, ...]) -> int:
    """``ggml_n_dims``: trailing dimensions of one do not count."""
    return max((i + 1 for i, length in enumerate(shape) if length > 1), default=1)


@dataclass(slots=True)
class _Mix:
    """One pass over a model's tensors in llama.cpp's order, with its counters."""

    ftype: str
    imatrix: bool
    architecture: str
    tied: bool
    gqa: int
    expert_count: int
    layer_count: int
    is_70b: bool
    attention_v_count: int
    attention_v_seen: int = 0
    ffn_down_seen: int = 0
    ffn_gate_seen: int = 0
    ffn_up_seen: int = 0

    @property
    def falcon(self) -> bool:
        return self.architecture == "falcon"

    def layer_of(self, tensor: Tensor, seen: int) -> int:
        """Layer as the rules count it: from the name in a mixture of experts, else the tensors seen so far."""
        return seen if self.expert_count < 2 or tensor.layer is None else tensor.layer


def _use_more_bits(i: int, n: int) -> bool:
    """The first and last eighth and every third layer between."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _output_type(mix: _Mix, tensor: Tensor, default: str) -> str:
    if mix.ftype == "MXFP4_MOE" or mix.falcon or tensor.shape[0] % type_traits(default).block_weights:
        return "Q8_0"
    if mix.ftype in _LOW_BIT or mix.ftype == "IQ3_XXS":
        return "Q5_K"
    return default if default == "Q8_0" else "Q6_K"


def _token_embedding_type(mix: _Mix, default: str) -> str:
    if mix.ftype in ("IQ2_XXS", "IQ2_XS", "IQ1_S", "IQ1_M"):
        return "Q2_K"
    if mix.ftype in ("IQ2_S", "IQ2_M", "IQ3_XXS"):
        return "IQ3_S"
    return "Q4_K" if mix.ftype in ("TQ1_0", "TQ2_0", "Q2_0") else default


def _low_bit_type(mix: _Mix, role: str, default: str) -> str:
    """IQ1 and IQ2: a branch of its own, with counters of its own."""
    wider = mix.ftype in ("IQ2_S", "IQ2_M")
    if role in (ATTENTION_V, ATTENTION_QKV):
        mix.attention_v_seen += 1
        return "Q4_K" if mix.gqa >= 4 or mix.expert_count >= 4 else "IQ3_S" if wider else "Q2_K"
    if role == ATTENTION_K and mix.expert_count == 8:
        return "Q4_K"
    if role == FFN_DOWN:
        mix.ffn_down_seen += 1
        first = mix.ffn_down_seen - 1 < mix.layer_count // 8
        return ("IQ3_S" if wider else "Q2_K") if first else default
    if role == ATTENTION_OUTPUT:
        if mix.expert_count == 8:
            return "Q5_K"
        return "IQ2_XXS" if mix.ftype in ("IQ1_S", "IQ1_M") else "IQ3_S" if wider else default
    return default


def _attention_v_rule(mix: _Mix, default: str) -> str:
    i, grouped = mix.attention_v_seen, mix.gqa >= 4
    more = _use_more_bits(i, mix.attention_v_count)
    rules: dict[str, str] = {
        "Q2_K": "Q4_K" if grouped else "Q3_K",
        "Q2_K_S": "Q4_K" if grouped else default,
        "IQ3_XXS": "Q4_K" if grouped else default if mix.imatrix else "IQ3_S",
        "IQ3_XS": "Q4_K" if grouped else default,
        "IQ3_S": "Q4_K" if grouped else default,
        "IQ3_M": "Q4_K",
        "Q3_K_M": "Q5_K" if i < 2 else "Q4_K",
        "Q3_K_L": "Q5_K",
        "IQ4_NL": "Q5_K" if grouped else default,
        "IQ4_XS": "Q5_K" if grouped else default,
        "Q4_K_M": "Q6_K" if more else default,
        "Q5_K_M": "Q6_K" if more else default,
        "Q4_K_S": "Q5_K" if i < 4 else default,
    }
    return rules.get(mix.ftype, default)


def _attention_v_type(mix: _Mix, tensor: Tensor, default: str) -> str:
    chosen = _attention_v_rule(mix, default)
    mix.attention_v_seen += 1
    if mix.expert_count == 8:
        return "Q8_0"
    # eight query heads share one attn_v here, so more bits cost next to nothing
    return "Q5_K" if mix.is_70b and chosen in ("Q3_K", "Q4_K") else chosen


def _attention_k_type(mix: _Mix, tensor: Tensor, default: str) -> str:
    return "Q8_0" if mix.expert_count == 8 else _attention_q_type(mix, tensor, default)


def _attention_q_type(mix: _Mix, tensor: Tensor, default: str) -> str:
    return {"IQ3_XS": "IQ3_XXS", "IQ3_XXS": "IQ2_S"}.get(mix.ftype, default)


def _ffn_down_type(mix: _Mix, tensor: Tensor, default: str) -> str:
    i, n = mix.layer_of(tensor, mix.ffn_down_seen), mix.layer_count
    mix.ffn_down_seen += 1
    eighth, more = i < n // 8, _use_more_bits(i, n)
    if mix.falcon and mix.ftype in ("Q3_K_M", "Q3_K_L", "Q4_K_M", "Q4_K_S"):
        return _falcon_ffn_down_type(mix.ftype, i < n // 16, more, default)
    rules: dict[str, str] = {
        "Q2_K": "Q3_K",
        "Q2_K_S": "Q4_K" if eighth else default,
        "IQ3_XXS": default if mix.imatrix else "Q4_K" if eighth else "Q3_K",
        "Q3_K_M": "Q5_K" if i < n // 16 else "Q4_K",
        "IQ3_M": "Q4_K" if eighth or (mix.expert_count == 8 and more) else default,
        "Q3_K_L": "Q5_K",
        "Q4_K_M": "Q6_K" if more else default,
        "Q5_K_M": "Q6_K" if more else default,
        "IQ4_NL": "Q5_K" if eighth and not mix.imatrix else default,
        "IQ4_XS": "Q5_K" if eighth and not mix.imatrix else default,
        "Q4_K_S": "Q5_K" if eighth else default,
        "Q4_0": "Q4_1" if eighth and mix.imatrix else default,
        "Q5_0": "Q5_1" if eighth and mix.imatrix else default,
    }
    return rules.get(mix.ftype, default)


def _falcon_ffn_down_type(ftype: str, first: bool, more: bool, default: str) -> str:
    if ftype == "Q3_K_M":
        return "Q5_K" if first else "Q4_K" if more else "Q3_K"
    if ftype == "Q4_K_M":
        return "Q6_K" if first else "Q5_K" if more else "Q4_K"
    return "Q4_K" if ftype == "Q3_K_L" else default


def _attention_output_type(mix: _Mix, tensor: Tensor, default: str) -> str:
    if mix.falcon:
        return "Q4_K" if mix.ftype == "Q3_K_L" else default
    if mix.expert_count == 8:
        return "Q5_K" if mix.ftype in _EIGHT_EXPERT_OUTPUT else default
    rules = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K", "IQ3_M": "Q4_K"}
    return rules.get(mix.ftype, default)


def _ffn_gate_type(mix: _Mix, tensor: Tensor, default: str) -> str:
    i = mix.layer_of(tensor, mix.ffn_gate_seen)
    mix.ffn_gate_seen += 1
    return _ffn_middle_type(mix, i, default)


def _ffn_up_type(mix: _Mix, tensor: Tensor, default: str) -> str:
    i = mix.layer_of(tensor, mix.ffn_up_seen)
    mix.ffn_up_seen += 1
    return _ffn_middle_type(mix, i, default)


def _ffn_middle_type(mix: _Mix, i: int, default: str) -> str:
    middle = mix.layer_count // 8 <= i < 7 * mix.layer_count // 8
    return "IQ3_XXS" if mix.ftype == "IQ3_XS" and middle else default


_RULES: dict[str, Callable[[_Mix, Tensor, str], str]] = {
    ATTENTION_V: _attention_v_type,
    ATTENTION_QKV: _attention_v_type,
    ATTENTION_K: _attention_k_type,
    ATTENTION_Q: _attention_q_type,
    FFN_DOWN: _ffn_down_type,
    ATTENTION_OUTPUT: _attention_output_type,
    FFN_GATE: _ffn_gate_type,
    FFN_UP: _ffn_up_type,
}


def _mixed_type(mix: _Mix, tensor: Tensor, default: str) -> str:
    role = category(tensor.name)
    if role == OUTPUT or (mix.tied and role == TOKEN_EMBEDDING):
        return _output_type(mix, tensor, default)
    if mix.ftype == "MXFP4_MOE":
        return "MXFP4" if len(tensor.shape) > 2 and tensor.shape[2] > 1 else "Q8_0"
    if role == TOKEN_EMBEDDING:
        return _token_embedding_type(mix, default)
    if mix.ftype in _LOW_BIT:
        return _low_bit_type(mix, role, default)
    rule = _RULES.get(role)
    return rule(mix, tensor, default) if rule else default


@cache
def _whole_blocks(row: int, type_: str) -> bool:
    return row % type_traits(type_).block_weights == 0


def _with_fallback(tensor: Tensor, chosen: str) -> str:
    row, block = tensor.shape[0], type_traits(chosen).block_weights
    if row % block == 0:
        return chosen
    smaller = chosen if block <= 32 else _FALLBACK.get(chosen)
    if smaller is None:
        raise InputError(
            f"llama.cpp refuses {chosen} for this model: {tensor.name} has rows of {row} weights",
            numbers=f"{chosen} packs {block} weights to a block and has no fallback type",
            hint="Q2_K, IQ4_NL and Q4_0 work with such rows",
            code="row-not-divisible",
        )
    return smaller if row % type_traits(smaller).block_weights == 0 else "F16"


def _is_70b(model: ModelSpec, expert_count: int) -> bool:
    """What llama.cpp calls its 70B type, by architecture and layer count (``src/models/*.cpp``)."""
    if model.architecture == "llama":
        return model.n_layer == 80 and expert_count != 8 and model.n_head != model.n_head_kv
    return (model.architecture, model.n_layer) in {("qwen2", 80), ("deci", 80), ("olmo", 80), ("jais2", 68)}


@lru_cache(maxsize=256)
def _visited(model: ModelSpec) -> tuple[tuple[int, Tensor, str | None], ...]:
    """The tensors with their indexes in the order in which llama.cpp visits them; a type for one it leaves alone."""
    order = sorted(range(len(model.tensors)), key=lambda i: _order(model.tensors[i]))
    tensors = [(i, model.tensors[i]) for i in order]
    return tuple((i, tensor, None if is_quantized(tensor) else source_type(model, tensor)) for i, tensor in tensors)


def _order(tensor: Tensor) -> tuple[int, bytes]:
    layer = tensor.layer
    return (-1 if layer is None else layer, tensor.name.encode())


@lru_cache(maxsize=256)
def _counts(model: ModelSpec) -> tuple[int, int]:
    """Layers, and tensors that the rules take for V."""
    roles = [category(tensor.name) for tensor in model.tensors]
    layers = max((t.layer + 1 for t in model.tensors if t.layer is not None), default=model.n_layer)
    return layers, sum(role in (ATTENTION_V, ATTENTION_QKV) for role in roles)


def _start(model: ModelSpec, ftype: str, imatrix: bool) -> _Mix:
    expert_count = model.mixture.expert_count if model.mixture else 0
    first = model.attention[0]
    # Qwen's hybrids state one number for all blocks
    hybrid = first.kind == "recurrent" and model.architecture.startswith("qwen")
    head_count_kv = 1 if model.mla else model.n_head_kv if hybrid else first.head_count_kv
    layer_count, attention_v_count = _counts(model)
    return _Mix(
        ftype=ftype,
        imatrix=imatrix,
        architecture=model.architecture,
        tied=model.tied_embeddings,
        gqa=(model.n_head if hybrid else first.head_count) // head_count_kv if head_count_kv else 0,
        expert_count=expert_count,
        layer_count=layer_count,
        is_70b=_is_70b(model, expert_count),
        attention_v_count=attention_v_count,
    )


@lru_cache(maxsize=512)
def tensor_types(model: ModelSpec, ftype: str, imatrix: bool = False) -> tuple[str, ...]:
    """The ggml type of each tensor of ``model`` quantized to ``ftype``, in the order of ``model.tensors``.

    Raises:
        UsageError: ``ftype`` is none of llama.cpp's file types (``unknown-type``).
        InputError: llama.cpp refuses this type for a row of this model (``row-not-divisible``).
    """
    default = file_type(ftype).default_type
    mix = _start(model, ftype, imatrix)
    plain = type_traits(default).block_weights == 1
    types = [""] * len(model.tensors)
    for index, tensor, kept in _visited(model):
        if kept is not None:
            types[index] = "F32" if default == "F32" else kept
        elif plain:
            types[index] = default
        else:
            chosen = _mixed_type(mix, tensor, default)
            types[index] = chosen if _whole_blocks(tensor.shape[0], chosen) else _with_fallback(tensor, chosen)
    return tuple(types)
