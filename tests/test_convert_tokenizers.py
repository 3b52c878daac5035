"""Tokenizers in every shape checkpoints carry them: identical token ids in llama.cpp, or a refusal."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from planner.convert import check_tokenizer, convert_checkpoint, prepare
from planner.convert.check import require_same_tokens
from planner.convert.encode import float32_to_bf16
from planner.convert.sentencepiece import read_sentencepiece
from planner.core.errors import InputError, QplanError
from tests import convert_fixtures as make
from tests.test_convert import CONFIG, llama_shapes, write_safetensors

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not all(find_spec(name) for name in ("tokenizers", "sentencepiece", "llama_cpp")),
        reason="needs tokenizers, sentencepiece and llama-cpp-python",
    ),
]

VOCAB = 1024
LEGACY = {
    "normalizer": {
        "type": "Sequence",
        "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ],
    },
    "pre_tokenizer": None,
}
METASPACE = {
    "normalizer": None,
    "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
}
GEMMA = {
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    "pre_tokenizer": {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
}
DECODER = {
    "type": "Sequence",
    "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ],
}


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama without a tokenizer."""
    directory = tmp_path / "m"
    directory.mkdir()
    shapes = {
        name: (VOCAB, *shape[1:]) if shape[0] == CONFIG["vocab_size"] else shape
        for name, shape in llama_shapes().items()
    }
    random = np.random.default_rng(0)
    tensors = {name: float32_to_bf16(random.normal(0, 0.1, shape).astype("<f4")) for name, shape in shapes.items()}
    write_safetensors(directory / "model.safetensors", tensors)
    config = {**CONFIG, "vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def as_fast_tokenizer(model: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """tokenizer.json of a SentencePiece BPE model, merges made as transformers makes them: all splits, by score."""
    pieces = read_sentencepiece(model).pieces
    vocab = {text: number for number, (text, _, _) in enumerate(pieces)}
    merges = []
    for text, score, kind in pieces:
        if kind == 1:
            cuts = [(text[:cut], text[cut:]) for cut in range(1, len(text))]
            known = [pair for pair in cuts if all(part in vocab for part in pair)]
            merges += [(-score, pair) for pair in sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))]
    merges.sort(key=lambda merge: merge[0])
    control = [{"id": number, "content": text, "special": True} for number, (text, _, kind) in enumerate(pieces[:3])]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{**token, **flags} for token in control],
        **settings,
        "post_processor": None,
        "decoder": DECODER,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": [list(pair) for _, pair in merges],
        },
    }


def scores(directory: Path) -> dict[str, float]:
    entries = {entry.key: entry.value for entry in prepare(directory).key_values}
    return dict(zip(entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.scores"], strict=True))


@pytest.mark.parametrize("settings", [LEGACY, METASPACE, GEMMA], ids=["llama-2", "metaspace", "gemma"])
def test_byte_fallback_json_gives_what_tokenizer_model_gives(
    checkpoint: Path, tmp_path: Path, settings: dict[str, Any]
) -> None:
    more = {"add_dummy_prefix": False} if settings is GEMMA else {}
    model = make.train_sentencepiece(checkpoint / "tokenizer.model", **more)
    expected = scores(checkpoint)
    tokenizer = as_fast_tokenizer(model, settings)
    model.unlink()
    (checkpoint / "tokenizer.json").write_text(json.dumps(tokenizer))
    found = scores(checkpoint)
    merged = ["".join(pair) for pair in tokenizer["model"]["merges"]]
    assert len(set(merged)) > 500
    assert {text: found[text] for text in merged} == {text: expected[text] for text in merged}
    convert_checkpoint(checkpoint, tmp_path / "out.gguf")
    check = check_tokenizer(checkpoint, tmp_path / "out.gguf")
    assert check.same, check
    # only Metaspace treats a leading space in its own way
    assert [note for note in check.notes if "in front" not in note] == []


def test_a_byte_fallback_bpe_trained_natively_is_refused(checkpoint: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=special, show_progress=False, max_token_length=8)
    tokenizer.train_from_iterator(make.corpus(), trainer)
    tokenizer.save(str(checkpoint / "tokenizer.json"))
    with pytest.raises(InputError) as caught:
        prepare(checkpoint)
    assert caught.value.code == "tokenizer-not-reproducible"


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_a_unigram_sentencepiece_model_with_default_settings(
    checkpoint: Path, tmp_path: Path, byte_fallback: bool
) -> None:
    make.train_sentencepiece(
        checkpoint / "tokenizer.model",
        model_type="unigram",
        normalization_rule_name="nmt_nfkc",
        remove_extra_whitespaces=True,
        allow_whitespace_only_pieces=False,
        byte_fallback=byte_fallback,
    )
    convert_checkpoint(checkpoint, tmp_path / "out.gguf")
    check = check_tokenizer(checkpoint, tmp_path / "out.gguf")
    if byte_fallback:
        # llama.cpp's unigram tokenizer has no byte fallback: characters never seen become <unk>
        assert check.same is False
        with pytest.raises(InputError) as caught:
            require_same_tokens(checkpoint, tmp_path / "out.gguf")
        assert caught.value.code == "tokenizer-differs"
    else:
        assert check.same, check


def test_a_bpe_sentencepiece_model_that_normalizes_is_converted_with_notes(checkpoint: Path, tmp_path: Path) -> None:
    make.train_sentencepiece(
        checkpoint / "tokenizer.model", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
    )
    result = convert_checkpoint(checkpoint, tmp_path / "out.gguf")
    assert any("NFKC" in note for note in result.notes) and any("spaces" in note for note in result.notes)
    check = check_tokenizer(checkpoint, tmp_path / "out.gguf")
    assert check.same and check.notes, check


def test_added_tokens_of_a_sentencepiece_vocabulary(checkpoint: Path, tmp_path: Path) -> None:
    make.write_sentencepiece(checkpoint)
    stated = json.loads((checkpoint / "tokenizer_config.json").read_text())
    stated["added_tokens_decoder"] = {
        "1000": {"content": "<|im_start|>", "special": True},
        "1001": {"content": "▁▁tool", "special": False},
    }
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(stated))
    entries = {entry.key: entry.value for entry in prepare(checkpoint).key_values}
    tokens, kinds = entries["tokenizer.ggml.tokens"], entries["tokenizer.ggml.token_type"]
    assert (tokens[1000], kinds[1000]) == ("<|im_start|>", 3)
    assert (tokens[1001], kinds[1001]) == ("  tool", 4)
    assert (tokens[1002], kinds[1002]) == ("[PAD1002]", 5)
    assert entries["tokenizer.chat_template"].startswith("{% for")
    assert len(tokens) == VOCAB


def test_user_defined_pieces_are_found_whole(checkpoint: Path, tmp_path: Path) -> None:
    make.train_sentencepiece(checkpoint / "tokenizer.model", user_defined_symbols=["brown fox", "1,234"])
    convert_checkpoint(checkpoint, tmp_path / "out.gguf")
    check = check_tokenizer(checkpoint, tmp_path / "out.gguf")
    assert check.same is not None
    entries = {entry.key: entry.value for entry in prepare(checkpoint).key_values}
    assert entries["tokenizer.ggml.token_type"][entries["tokenizer.ggml.tokens"].index("brown fox")] == 4


def test_a_tiktoken_file_called_tokenizer_model_is_passed_over(checkpoint: Path, tmp_path: Path) -> None:
    make.write_bpe(checkpoint, "llama3")
    (checkpoint / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    convert_checkpoint(checkpoint, tmp_path / "out.gguf")
    assert check_tokenizer(checkpoint, tmp_path / "out.gguf").same


def test_a_text_beside_no_tokenizer_is_an_error(checkpoint: Path) -> None:
    with pytest.raises(QplanError) as caught:
        prepare(checkpoint)
    assert caught.value.code == "no-tokenizer"
