"""Steps that many families share: sizes, tied embeddings, sliding patterns, long-context tables."""

from __future__ import annotations

from planner.core.errors import InputError
from planner.models.architectures.fields import Fields
from planner.models.architectures.layout import Dims

WIDTH = ("hidden_size", "n_embd", "n_embed", "d_model")
NEXTN_NOTE = "the file holds a block for multi-token prediction, which llama.cpp does not load by default"
HEADS = ("num_attention_heads", "n_head")


def read_dims(fields: Fields, *, head_dim: bool = True) -> Dims:
    """The sizes under their usual names.

    Args:
        fields: the config.
        head_dim: whether the family has its own ``head_dim``; otherwise it is width / heads.

    Raises:
        InputError: a size is missing or impossible (``bad-config``).
    """
    width, heads = fields.count(*WIDTH), fields.count(*HEADS)
    explicit = fields.optional_count("head_dim") if head_dim else None
    if explicit is None and width % heads:
        raise InputError(
            f"config.json of a {fields.model_type} model: hidden_size does not divide into its attention heads",
            numbers=f"{width} / {heads}",
            code="bad-config",
        )
    return Dims(
        n_layer=fields.layer_count,
        n_embd=width,
        n_vocab=fields.count("vocab_size", "padded_vocab_size"),
        n_ctx_train=fields.count("max_position_embeddings", "n_positions", "seq_length", default=2048),
        n_ff=fields.count("intermediate_size", "ffn_hidden_size", "n_inner", default=4 * width),
        n_head=heads,
        n_head_kv=fields.count("num_key_value_heads", "num_kv_heads", "n_head_kv", default=heads),
        head_dim=explicit or width // heads,
    )


def is_tied(fields: Fields, *, default: bool = False) -> bool:
    """Whether the output matrix is the embedding; ``default`` is the family's value where the config is silent."""
    return fields.flag("tie_word_embeddings", default=default)


def periodic(window: int, period: int, layer_count: int) -> tuple[int | None, ...]:
    """Sliding windows with every ``period``-th block full: block i is full when i mod period = period - 1."""
    return tuple(None if layer % period == period - 1 else window for layer in range(layer_count))


def windows_from_types(fields: Fields, layer_count: int, window: int, *, period: int) -> tuple[int | None, ...]:
    """Sliding windows by the config's ``layer_types``; by ``period`` where it has none."""
    kinds = fields.layer_types(layer_count)
    if kinds is None:
        return periodic(window, period, layer_count)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def llama3_rope_count(fields: Fields, head_dim: int) -> int:
    """Entries of ``rope_freqs``: half a head where Llama 3.1's frequency scaling applies, else 0."""
    return head_dim // 2 if fields.rope_type == "llama3" else 0
