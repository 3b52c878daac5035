"""A model as a value: its tensors, its attention layers and where it came from. Never its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache, lru_cache
from math import prod


@cache
def layer_of(name: str) -> int | None:
    """Block index of a GGUF tensor name; cached, as every estimate asks for every tensor's."""
    return int(name.split(".", 2)[1]) if name.startswith("blk.") else None


@dataclass(frozen=True, slots=True)
class Tensor:
    """One weight tensor by its GGUF name.

    ``shape`` is in ggml's order: ``shape[0]`` is the length of a row (the input dimension of a
    linear layer), the rows follow, experts come last. A Hugging Face ``(out, in)`` matrix is ``(in, out)`` here.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    """Storage type in the file it was read from (``F16``, ``BF16``, ``Q4_K`` …); unknown in the catalog."""

    @property
    def element_count(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def layer(self) -> int | None:
        """Block index ``i`` of a ``blk.i.`` tensor; ``None`` outside the blocks."""
        return layer_of(self.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionLayer:
    """What one block keeps between tokens.

    A layer with ``kind`` ``full`` or ``sliding`` keeps ``head_count_kv * (k_dim + v_dim)`` values per cached
    token; multi-head latent attention keeps one head of ``kv_lora_rank + rope_dim`` and ``v_dim`` 0. A
    ``recurrent`` layer keeps ``state_bytes`` per sequence, whatever the context; ``none`` keeps nothing.
    """

    kind: str
    head_count: int
    head_count_kv: int
    k_dim: int
    v_dim: int
    window: int | None = None
    """Tokens seen by a ``sliding`` layer."""
    owns_kv_cache: bool = True
    """False where a later layer reads an earlier one's cache (Gemma 3n)."""
    state_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOfExperts:
    """Routing of a mixture-of-experts model."""

    expert_count: int
    expert_used_count: int
    expert_feed_forward: int
    shared_expert_count: int = 0
    leading_dense_layer_count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of the model, as the plan pins it."""

    name: str
    size_bytes: int
    sha256: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where a model came from."""

    kind: str
    """``catalog``, ``directory``, ``gguf``, ``hub`` or ``size``."""
    location: str
    """Catalog name, path or hub id."""
    hub_id: str | None = None
    """Where the weights of a catalog model are published."""
    revision: str | None = None
    files: tuple[SourceFile, ...] = ()
    source: str | None = None
    """Where a catalog entry's figures were read."""
    date: str | None = None

    @property
    def is_gguf(self) -> bool:
        """Whether the weights are in a GGUF file, here or on the hub."""
        return self.kind == "gguf" or any(file.name.endswith(".gguf") for file in self.files)


@dataclass(frozen=True, slots=True, kw_only=True, eq=True)
class ModelSpec:
    """Everything the estimates need to know about a model.

    The hash is cheap (name and a few counts) because estimates are cached per model; equality compares all.
    """

    name: str
    architecture: str
    """llama.cpp's name: ``llama``, ``qwen2``, ``qwen3moe``, ``gemma3``, ``deepseek2`` …"""
    family: str
    """What quality is looked up by: ``llama-2``, ``llama-3``, ``qwen2.5`` …"""
    source: ModelSource
    n_layer: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_ff: int
    tensors: tuple[Tensor, ...]
    attention: tuple[AttentionLayer, ...]
    """One per block."""
    mixture: MixtureOfExperts | None = None
    mla: bool = False
    """Multi-head latent attention (DeepSeek): one KV head, K only."""
    n_head: int = 0
    n_head_kv: int = 0
    dtype: str = "bf16"
    """Type the weights were published in: ``bf16``, ``f16``, ``f32``, ``fp8``, ``mxfp4``, or a GGUF type."""
    tokenizer: str | None = None
    """``spm``, ``bpe`` or ``wpm``; decides how much metadata a GGUF file carries."""
    file_type: str | None = None
    """llama.cpp's file type of a GGUF file that is quantized already: it runs as it is."""
    guided: bool = False
    """Such a file says that an importance matrix guided its making."""
    convertible: bool = False
    """qplan itself converts the checkpoint to GGUF, as far as its config.json tells."""
    notes: tuple[str, ...] = ()

    def __hash__(self) -> int:
        return hash((self.name, self.architecture, self.n_layer, self.n_embd, self.n_vocab, len(self.tensors)))

    @property
    def tied_embeddings(self) -> bool:
        """The output matrix is the token embedding."""
        return not any(tensor.name == "output.weight" for tensor in self.tensors)

    @property
    def offloadable_count(self) -> int:
        """What llama.cpp counts ``-ngl`` up to: all blocks, those that only predict further tokens too, and the output.

        The last come first: of such a model ``n_layer + 1`` leaves the first layer in RAM.
        """
        return self.n_layer + further_block_count(self) + 1

    @property
    def parameter_count(self) -> int:
        """All weights, tied ones once."""
        return sum(tensor.element_count for tensor in self.tensors)

    @property
    def active_parameter_count(self) -> int:
        """Weights read for one token: the routed share of the experts, and no embedding lookup."""
        total = 0
        for tensor in self.tensors:
            if tensor.name == "token_embd.weight" and not self.tied_embeddings:
                continue
            total += round(tensor.element_count * self.routed_fraction(tensor))
        return total

    def routed_fraction(self, tensor: Tensor) -> float:
        """Share of ``tensor`` that one token uses: used/all experts for ``_exps`` tensors, else 1."""
        if self.mixture is None or "_exps" not in tensor.name:
            return 1.0
        return self.mixture.expert_used_count / self.mixture.expert_count


@lru_cache(maxsize=512)
def further_block_count(model: ModelSpec) -> int:
    """Blocks after ``n_layer``: they predict further tokens (MTP, ``nextn``) and are not loaded by default."""
    return max((t.layer + 1 - model.n_layer for t in model.tensors if t.layer is not None), default=0)


@lru_cache(maxsize=512)
def shape_sha256(model: ModelSpec) -> str:
    """SHA-256 over the architecture and every tensor's name and shape, in hex; the order does not matter.

    Two checkpoints of one architecture share it: sizes, speeds and memory carry over, the weights need not be equal.
    """
    digest = hashlib.sha256(f"{model.architecture}\n".encode())
    for tensor in sorted(model.tensors, key=lambda tensor: tensor.name):
        digest.update(f"{tensor.name}:{'x'.join(map(str, tensor.shape))}\n".encode())
    return digest.hexdigest()


_TWINS: dict[object, ModelSpec] = {}


@lru_cache(maxsize=512)
def shape_twin(model: ModelSpec) -> ModelSpec:
    """The first model seen with the same tensors, attention and architecture: what only depends on these is shared.

    A catalog holds many fine-tunes of one base. Names, families and tokenizers differ between twins.
    """
    key = (
        model.architecture,
        model.tensors,
        model.attention,
        model.mixture,
        model.mla,
        (model.n_layer, model.n_embd, model.n_vocab, model.n_ff, model.n_head, model.n_head_kv),
        model.source.is_gguf,
        model.dtype,
        (model.file_type, model.guided),
    )
    return _TWINS.setdefault(key, model)
