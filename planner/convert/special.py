"""Special tokens and chat templates of a checkpoint, as llama.cpp's converter derives them (gguf-py's SpecialVocab).

Done here rather than with the ``gguf`` package because its releases differ in it, and the same checkpoint must give
the same bytes whichever is installed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

from planner.convert.keyvalue import KeyValue, array, flag, string, u32
from planner.core.errors import InputError
from planner.formats.json_file import read_object

KINDS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_ID_KEYS = {
    "bos": "bos_token_id",
    "eos": "eos_token_id",
    "unk": "unknown_token_id",
    "sep": "seperator_token_id",  # spelled so in GGUF
    "pad": "padding_token_id",
    "mask": "mask_token_id",
    "eot": "eot_token_id",
    "eom": "eom_token_id",
}
_ADD_KINDS = ("bos", "eos", "sep")
MAX_TEMPLATE_BYTES = 10 * 10**6
"""Sanity bound; the longest published chat templates are some tens of kilobytes."""


@dataclass(slots=True)
class _Settings:
    """The tokenizer's settings while they are read: token texts by kind, and which are added."""

    texts: dict[str, str]
    flags: dict[str, bool]
    adds: dict[str, bool] = field(default_factory=dict)
    kinds: list[str] = field(default_factory=lambda: list(KINDS))


def optional_object(path: Path) -> dict[str, Any] | None:
    """The JSON object in ``path``; ``None`` where there is no such file.

    Raises:
        InputError: it is there and no JSON object (``bad-json``).
    """
    return read_object(path) if path.is_file() else None


def dicts(value: object) -> list[dict[str, Any]]:
    """The objects of a JSON list; nothing where it is no list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _text(entry: object) -> str | None:
    """A token as tokenizer_config.json gives it: a string, or an object with its content."""
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


def special_tokens(directory: Path, config: Mapping[str, Any], *, vocab_size: int) -> list[KeyValue]:
    """Ids of special tokens, which of them are added to a text, and chat templates.

    ``config`` is the checkpoint's ``config.json``; ids at or above ``vocab_size`` are left out.

    Raises:
        InputError: a tokenizer file is malformed (``bad-json``, ``bad-chat-template``).
    """
    tokenizer = optional_object(directory / "tokenizer.json")
    stated = optional_object(directory / "tokenizer_config.json")
    texts = {kind: text for kind in (*KINDS, "eot", "eom") if (text := _text((stated or {}).get(f"{kind}_token")))}
    flags = {kind: value for kind in KINDS if isinstance(value := (stated or {}).get(f"add_{kind}_token"), bool)}
    settings = _Settings(texts=texts, flags=flags)
    if tokenizer is not None:
        _read_post_processor(tokenizer, settings, stated is not None)
    ids = _ids(tokenizer, settings, config, vocab_size)
    entries = [u32(f"tokenizer.ggml.{_ID_KEYS[kind]}", number) for kind, number in ids.items() if kind in _ID_KEYS]
    for kind in settings.kinds:
        if kind in settings.flags:
            settings.adds.setdefault(kind, settings.flags[kind])
    entries += [
        flag(f"tokenizer.ggml.add_{kind}_token", value) for kind, value in settings.adds.items() if kind in _ADD_KINDS
    ]
    return entries + chat_templates(directory, stated)


def _ids(
    tokenizer: dict[str, Any] | None, settings: _Settings, config: Mapping[str, Any], vocab_size: int
) -> dict[str, int]:
    by_text: dict[str, int] = {}
    for token in dicts((tokenizer or {}).get("added_tokens")):
        if isinstance(token.get("id"), int) and isinstance(token.get("content"), str):
            by_text.setdefault(token["content"], token["id"])
    found: dict[str, int] = {}
    nested = config.get("text_config")
    for kind in settings.kinds:
        if (text := settings.texts.get(kind)) is not None and text in by_text:
            _keep(found, kind, by_text[text], vocab_size)
    for kind in settings.kinds:
        number = config.get(f"{kind}_token_id")
        if number is None and isinstance(nested, dict):
            number = nested.get(f"{kind}_token_id")
        _keep(found, kind, number, vocab_size)
    return found


def _keep(found: dict[str, int], kind: str, number: object, vocab_size: int) -> None:
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < vocab_size:
        found.setdefault(kind, number)


def _read_post_processor(tokenizer: dict[str, Any], settings: _Settings, stated: bool) -> None:
    texts = settings.texts
    for wanted, other in (("bos", "cls"), ("eos", "sep")):
        if wanted not in texts and other in texts:
            texts[wanted] = texts[other]
    post = tokenizer.get("post_processor")
    if not isinstance(post, dict):
        return
    for processor in dicts(post.get("processors") or [post]):
        kind = processor.get("type")
        if kind == "ByteLevel":
            settings.adds.setdefault("bos", False)
            settings.adds.setdefault("eos", False)
        elif kind == "RobertaProcessing":
            settings.adds |= {"bos": True, "eos": True, "sep": True}
        elif kind == "TemplateProcessing":
            _read_template(processor, settings, stated)


def _special(part: dict[str, Any]) -> str | None:
    entry = part.get("SpecialToken")
    text = entry.get("id") if isinstance(entry, dict) else None
    return text if isinstance(text, str) else None


def _read_template(processor: dict[str, Any], settings: _Settings, stated: bool) -> None:
    """Whether BOS, EOS and SEP are added, from a ``TemplateProcessing``; simple templates only."""
    single, pair = dicts(processor.get("single")), dicts(processor.get("pair"))
    texts, first, last = settings.texts, None, None
    if len(single) > 1:
        first, last = _special(single[0]), _special(single[-1])
        if first:
            texts.setdefault("bos", first)
            settings.adds["bos"] = first in (texts["bos"], texts.get("cls"))
        if last:
            if stated and last != texts.get("eos"):
                _replace_eos(settings, last)
            texts["eos"] = last
            settings.adds["eos"] = True
    start = 1 if first and pair and _special(pair[0]) == first else 0
    stop = len(pair) - 1 if last and pair and _special(pair[-1]) == last else len(pair)
    middle = pair[start:stop][1:-1]
    if middle:
        ends = (texts.get("sep"), texts.get("eos"))
        add = bool(_special(middle[0]) in ends and not last)
        if len(middle) == 2 and _special(middle[1]) in ends:
            add = True
        settings.adds["sep"] = add
        if add and "sep" not in texts and "eos" in texts:
            texts["sep"] = texts["eos"]


def _replace_eos(settings: _Settings, last: str) -> None:
    """The template ends in another token than the stated EOS: the stated one becomes EOT (or EOM)."""
    kind = "eot" if "eot" not in settings.kinds else "eom"
    if kind not in settings.kinds:
        settings.kinds.append(kind)
        if "eos" in settings.texts:
            settings.texts[kind] = settings.texts["eos"]


def chat_templates(directory: Path, stated: dict[str, Any] | None) -> list[KeyValue]:
    """Chat templates: tokenizer_config.json's own first, else chat_template.jinja, else chat_template.json.

    Raises:
        InputError: a template is no UTF-8 text, or too large (``bad-chat-template``).
    """
    template = (stated or {}).get("chat_template")
    if template is None:
        template = _template_files(directory)
    if isinstance(template, str):
        return [string("tokenizer.chat_template", template)] if template else []
    if not isinstance(template, list):
        return []
    named = {}
    for choice in template:
        if isinstance(choice, dict) and isinstance(choice.get("template"), str):
            name = "".join(sign if sign in ascii_letters + digits else "_" for sign in str(choice.get("name", "")))
            named[name] = choice["template"]
    default = named.pop("default", None)
    named.pop("", None)
    entries = [string(f"tokenizer.chat_template.{name}", text) for name, text in sorted(named.items())]
    if named:
        entries.append(array("tokenizer.chat_templates", sorted(named)))
    if default is not None:
        entries.append(string("tokenizer.chat_template", default))
    return entries


def _template_files(directory: Path) -> object:
    jinja = directory / "chat_template.jinja"
    if jinja.is_file():
        more = sorted((directory / "additional_chat_templates").glob("*.jinja"))
        default = _read_template_file(jinja)
        if not more:
            return default
        return [
            {"name": "default", "template": default},
            *({"name": path.stem, "template": _read_template_file(path)} for path in more),
        ]
    return (optional_object(directory / "chat_template.json") or {}).get("chat_template")


def _read_template_file(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise InputError(f"{path.name} is too large to be a chat template", code="bad-chat-template")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path.name} cannot be read", numbers=str(error), code="bad-chat-template") from None
