"""Train qplan's demo model: a small Llama on Jane Austen's novels.

One run does everything, from the compressed corpus to a checkpoint folder in
the layout of a Llama-2 release:

1. split the corpus by chapter into training, validation and held-out text;
2. train a SentencePiece BPE tokenizer with byte fallback on the training text;
3. train the model (AdamW, cosine schedule), keeping the weights with the best
   validation loss;
4. write ``model/`` (bfloat16 weights, configuration, tokenizer files),
   ``heldout.txt`` and ``train_report.json``.

The corpus (``corpus.txt.xz``) is made by ``make_corpus.py``.  Needs torch,
transformers, tokenizers and sentencepiece; a GPU makes it minutes
instead of hours.

Usage::

    python train.py --corpus corpus.txt.xz --out .
"""

from __future__ import annotations

import argparse
import io
import json
import lzma
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import sentencepiece as spm
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, processors
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

BOS, EOS = 1, 2
SPECIALS = ("<unk>", "<s>", "</s>")


@dataclass(frozen=True)
class Split:
    """The corpus, cut by chapter; each entry is one chapter's text."""

    train: list[str]
    valid: list[str]
    heldout: list[str]


# --------------------------------------------------------------------- corpus


def read_corpus(path: Path) -> list[list[str]]:
    """Return the novels of the corpus, each a list of chapters."""
    text = lzma.decompress(path.read_bytes()).decode("utf-8")
    novels: list[list[list[str]]] = []
    for line in text.splitlines():
        if line.startswith("== "):
            novels[-1].append([])
        elif line.startswith("= "):
            novels.append([])
        else:
            novels[-1][-1].append(line)
    return [["\n".join(paragraphs) for paragraphs in novel] for novel in novels]


def split_corpus(novels: list[list[str]], seed: int, heldout_share: float) -> Split:
    """Take whole chapters of every novel out of training, chosen by ``seed``.

    One chapter of each novel is for validation (it picks the checkpoint), and
    ``heldout_share`` of them, at least one, is never used before the end.
    """
    rng = random.Random(seed)
    split = Split([], [], [])
    for chapters in novels:
        order = rng.sample(range(len(chapters)), len(chapters))
        n_heldout = max(1, math.ceil(heldout_share * len(chapters)))
        heldout, valid = set(order[:n_heldout]), {order[n_heldout]}
        for number, chapter in enumerate(chapters):
            if number in heldout:
                split.heldout.append(chapter)
            elif number in valid:
                split.valid.append(chapter)
            else:
                split.train.append(chapter)
    return split


# ------------------------------------------------------------------ tokenizer


def train_sentencepiece(chapters: list[str], folder: Path, vocab_size: int) -> Path:
    """Train the tokenizer with Llama-2's settings; return ``tokenizer.model``."""
    sentences = [line for chapter in chapters for line in chapter.split("\n")]
    model = io.BytesIO()  # a file prefix would be recorded in the model
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        character_coverage=1.0,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        max_sentence_length=100_000,
        num_threads=1,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        minloglevel=2,
    )
    model_file = folder / "tokenizer.model"
    model_file.write_bytes(model.getvalue())
    return model_file


def merges_of(rank: dict[str, int]) -> list[tuple[str, str]]:
    """List the BPE merges for the pieces of a SentencePiece model, best first.

    ``rank`` gives each piece its id; ids follow the scores.  SentencePiece joins
    the neighbours whose union has the best score, so every way of cutting a piece
    into two pieces is a merge, ranked by that piece.
    """
    found: list[tuple[int, int, int, str, str]] = []
    for piece, at in rank.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in rank and right in rank:
                found.append((at, rank[left], rank[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(found)]


def fast_tokenizer(model_file: Path) -> Tokenizer:
    """Build the ``tokenizers`` twin of a SentencePiece BPE model."""
    slow = spm.SentencePieceProcessor(model_file=str(model_file))
    vocab = {slow.id_to_piece(at): at for at in range(slow.get_piece_size())}
    special = {at for at in vocab.values() if slow.is_control(at) or slow.is_unknown(at)}
    merges = merges_of({text: at for text, at in vocab.items() if at not in special and not slow.is_byte(at)})
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", BOS)]
    )
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIALS])
    return tokenizer


def save_tokenizer(model_file: Path, context: int) -> None:
    """Write the files that stand beside ``tokenizer.model`` in a Llama-2 folder."""
    folder = model_file.parent
    fast_tokenizer(model_file).save(str(folder / "tokenizer.json"))
    special = {
        name: {
            "content": text,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
        }
        for name, text in zip(("unk_token", "bos_token", "eos_token"), SPECIALS, strict=True)
    }
    config = {
        "add_bos_token": True,
        "add_eos_token": False,
        **{name: entry["content"] for name, entry in special.items()},
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": context,
        "pad_token": None,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    write_json(folder / "special_tokens_map.json", special)
    write_json(folder / "tokenizer_config.json", config)


def check_tokenizers(folder: Path, text: str) -> None:
    """Fail unless both tokenizers give the same ids and give the text back."""
    slow = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    fast = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for sample in (text, "  two  spaces\ttab\n\n\ncafé £5 — naïve 漢字 🙂 ", "x" * 999):
        ids = slow.encode(sample)
        if fast.encode(sample, add_special_tokens=False).ids != ids:
            raise SystemExit("tokenizer.json and tokenizer.model disagree")
        if slow.decode(ids) != sample:
            raise SystemExit("the tokenizer does not give the text back")


# ---------------------------------------------------------------------- model


def model_config(args: argparse.Namespace) -> LlamaConfig:
    """Return the architecture: every matrix row is a multiple of 256 long."""
    return LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=args.context,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=None,
    )


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Drop out the embeddings and what each block adds to the residual stream.

    Llama has no such dropout of its own; hooks add it for training without
    leaving a trace in the checkpoint.
    """

    def hook(module: torch.nn.Module, _args: object, out: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(out, rate, training=module.training)

    model.model.embed_tokens.register_forward_hook(hook)
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(hook)
        layer.mlp.down_proj.register_forward_hook(hook)


def token_stream(folder: Path, chapters: list[str]) -> torch.Tensor:
    """Encode chapters into one stream, each chapter closed by the end token."""
    slow = spm.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    ids = [token for chapter in chapters for token in [*slow.encode(chapter), EOS]]
    return torch.tensor(ids, dtype=torch.long)


def windows(stream: torch.Tensor, starts: torch.Tensor, context: int) -> torch.Tensor:
    """Cut windows of ``context`` tokens, each begun by the start token."""
    body = stream[starts[:, None] + torch.arange(context - 1, device=stream.device)]
    return torch.cat([torch.full_like(body[:, :1], BOS), body], dim=1)


def batch_loss(model: LlamaForCausalLM, batch: torch.Tensor, half: bool = False) -> torch.Tensor:
    """Mean next-token loss of a batch; ``half`` scores the second half only."""
    with torch.autocast(batch.device.type, dtype=torch.bfloat16):
        logits = model(batch[:, :-1]).logits.float()
    first = batch.shape[1] // 2 if half else 0
    return torch.nn.functional.cross_entropy(logits[:, first:].flatten(0, 1), batch[:, first + 1 :].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, stream: torch.Tensor, context: int) -> float:
    """Mean loss over consecutive windows, their second halves scored."""
    model.eval()
    starts = torch.arange(0, len(stream) - context, context - 1, device=stream.device)
    losses = [
        float(batch_loss(model, windows(stream, part, context), half=True)) * len(part) for part in starts.split(32)
    ]
    model.train()
    return sum(losses) / len(starts)


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 3 %, then a cosine down to 2 % of the peak."""
    warmup = max(1, steps * 3 // 100)
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    """AdamW with weight decay on the matrices, none on the norms."""
    params = list(model.parameters())
    groups = [
        {"params": [p for p in params if p.ndim > 1], "weight_decay": args.weight_decay},
        {"params": [p for p in params if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def train(
    model: LlamaForCausalLM, stream: torch.Tensor, valid: torch.Tensor, args: argparse.Namespace
) -> dict[str, float]:
    """Train; leave the weights with the best validation loss in ``model``."""
    optimizer = make_optimizer(model, args)
    generator = torch.Generator().manual_seed(args.seed)
    steps = math.ceil(args.epochs * len(stream) / (args.batch * (args.context - 1)))
    best, best_step = math.inf, 0
    best_weights: dict[str, torch.Tensor] = {}
    started = time.monotonic()
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, args.lr)
        starts = torch.randint(len(stream) - args.context, (args.batch,), generator=generator)
        loss = batch_loss(model, windows(stream, starts.to(stream.device), args.context))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % args.eval_every == 0 or step + 1 == steps:
            score = evaluate(model, valid, args.context)
            seconds = time.monotonic() - started
            print(
                f"step {step + 1}/{steps} loss {loss.item():.4f} valid {score:.4f} {seconds:.0f} s",
                flush=True,
            )
            if score < best:
                best, best_step = score, step + 1
                best_weights = {k: v.detach().clone() for k, v in model.state_dict().items()}
    model.load_state_dict(best_weights)
    return {"steps": steps, "best_step": best_step, "seconds": round(time.monotonic() - started)}


# --------------------------------------------------------------------- output


def write_json(path: Path, value: object) -> None:
    """Write ``value`` as indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def unigram_perplexity(stream: torch.Tensor, reference: torch.Tensor, vocab: int) -> float:
    """Perplexity of ``stream`` under ``reference``'s add-one token counts."""
    counts = torch.bincount(reference.cpu(), minlength=vocab).double() + 1
    return float(torch.exp(-(counts / counts.sum()).log()[stream.cpu()].mean()))


def save_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the checkpoint in bfloat16, as transformers does."""
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS)
    model.to(torch.bfloat16).save_pretrained(folder)


def parse_args() -> argparse.Namespace:
    """Read the command line; the defaults are those of the shipped model."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, default=here / "corpus.txt.xz")
    parser.add_argument("--out", type=Path, default=here, help="folder for model/ and the rest")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--heldout-share", type=float, default=0.03)
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--epochs", type=float, default=50.0)
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--weight-decay", type=float, default=0.3)
    parser.add_argument("--dropout", type=float, default=0.3)
    parser.add_argument("--eval-every", type=int, default=200, help="steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def main() -> None:
    """Command line entry point."""
    args = parse_args()
    random.seed(args.seed)
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    folder: Path = args.out / "model"
    folder.mkdir(parents=True, exist_ok=True)

    split = split_corpus(read_corpus(args.corpus), args.seed, args.heldout_share)
    heldout_text = "\n".join(split.heldout) + "\n"
    (args.out / "heldout.txt").write_text(heldout_text, encoding="utf-8")
    save_tokenizer(train_sentencepiece(split.train, folder, args.vocab), args.context)
    check_tokenizers(folder, heldout_text)

    parts = {name: token_stream(folder, getattr(split, name)) for name in Split.__annotations__}
    streams = {name: stream.to(args.device) for name, stream in parts.items()}
    model = LlamaForCausalLM(model_config(args)).to(args.device)
    add_dropout(model, args.dropout)
    report: dict[str, object] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": {name: len(stream) for name, stream in streams.items()},
        "characters": {name: sum(map(len, getattr(split, name))) for name in streams},
        "unigram_perplexity": unigram_perplexity(streams["heldout"], streams["train"], args.vocab),
        "options": {k: v for k, v in vars(args).items() if k not in ("corpus", "out")},
    }
    print(json.dumps(report, indent=2), flush=True)
    report |= train(model, streams["train"], streams["valid"], args)
    for name, stream in streams.items():
        report[f"{name}_loss"] = evaluate(model, stream, args.context)
    save_model(model, folder)
    write_json(args.out / "train_report.json", report)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
