"""Build ``corpus.txt.xz`` from Debian's ``r-cran-janeaustenr`` package.

The package carries Jane Austen's six completed novels (public domain) as R
character vectors, one element per printed line.  This script reads them
straight out of the package's lazy-load database (no R needed), drops what is
not the author's (title pages, editors' notes, footnotes of the editions),
joins each paragraph to one line and writes one compressed UTF-8 file::

    = Emma =
    == Chapter 1 ==
    First paragraph on one line.
    Second paragraph on one line.

Usage::

    apt-get download r-cran-janeaustenr=1.0.0-1
    dpkg -x r-cran-janeaustenr_1.0.0-1_all.deb pkg
    python make_corpus.py pkg/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb
"""

from __future__ import annotations

import argparse
import lzma
import re
import struct
import zlib
from pathlib import Path

# The order in which the six vectors are stored (the index file lists them so).
TITLES = (
    "Emma",
    "Mansfield Park",
    "Northanger Abbey",
    "Persuasion",
    "Pride and Prejudice",
    "Sense and Sensibility",
)
CHAPTER = re.compile(r"\s*chapter\s+(\d+|[ivxlc]+)\.?\s*", re.IGNORECASE)
VOLUME = re.compile(r"\s*volume\s+[ivx]+\s*", re.IGNORECASE)
BACK_MATTER = ("FINIS", "THE END", "A NOTE ON THE TEXT")


def r_strings(raw: bytes) -> list[str]:
    """Decode one R-serialised character vector (XDR format, version 3)."""
    if raw[:6] != b"X\n\x00\x00\x00\x03":
        raise ValueError("not an XDR version 3 R serialisation")
    (encoding_length,) = struct.unpack_from(">i", raw, 14)
    at = 18 + encoding_length
    kind, count = struct.unpack_from(">Ii", raw, at)
    if kind & 0xFF != 16:  # STRSXP
        raise ValueError(f"not a character vector: type {kind & 0xFF}")
    at += 8
    lines: list[str] = []
    for _ in range(count):
        _flags, length = struct.unpack_from(">Ii", raw, at)
        at += 8
        lines.append(raw[at : at + max(length, 0)].decode("utf-8"))
        at += max(length, 0)
    return lines


def read_rdb(path: Path) -> list[list[str]]:
    """Return every character vector of a zlib-compressed lazy-load database."""
    data = path.read_bytes()
    vectors: list[list[str]] = []
    at = 0
    while at < len(data):
        (size,) = struct.unpack_from(">I", data, at)
        inflate = zlib.decompressobj()
        raw = inflate.decompress(data[at + 4 :])
        if len(raw) != size:
            raise ValueError(f"record at {at}: {len(raw)} bytes, {size} expected")
        at = len(data) - len(inflate.unused_data)
        vectors.append(r_strings(raw))
    return vectors


def tidy(paragraph: str) -> str:
    """Normalise one paragraph: spacing, marks of italics, one footnote star."""
    text = re.sub(r"\s+", " ", paragraph).strip()
    text = text.replace("_", "")
    return text.replace("love is declared,* it", "love is declared, it")


def is_editorial(paragraph: str) -> bool:
    """Tell the editions' own marks (notes, rules of stars) from the text."""
    return (
        not re.search(r"[A-Za-z]", paragraph) or paragraph.startswith(("[", "*")) or bool(VOLUME.fullmatch(paragraph))
    )


def chapters(lines: list[str]) -> list[list[str]]:
    """Split one novel into chapters, each a list of one-line paragraphs."""
    found: list[list[str]] = []
    pending: list[str] = []

    def flush() -> None:
        paragraph = tidy(" ".join(pending))
        pending.clear()
        if paragraph and found and not is_editorial(paragraph):
            found[-1].append(paragraph)

    for line in [*lines, ""]:
        if line.strip().upper() in BACK_MATTER:
            break
        if CHAPTER.fullmatch(line):
            flush()
            found.append([])
        elif not line.strip():
            flush()
        else:
            pending.append(line)
    flush()
    return found


def corpus_text(novels: list[list[str]]) -> str:
    """Return the whole corpus as marked-up text."""
    if len(novels) != len(TITLES):
        raise ValueError(f"{len(novels)} novels found, {len(TITLES)} expected")
    out: list[str] = []
    for title, lines in zip(TITLES, novels, strict=True):
        out.append(f"= {title} =")
        for number, paragraphs in enumerate(chapters(lines), start=1):
            out.append(f"== Chapter {number} ==")
            out.extend(paragraphs)
    return "\n".join(out) + "\n"


def main() -> None:
    """Command line entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rdb", type=Path, help="the package's data/Rdata.rdb")
    parser.add_argument("--out", type=Path, default=Path("corpus.txt.xz"))
    args = parser.parse_args()
    text = corpus_text(read_rdb(args.rdb))
    args.out.write_bytes(lzma.compress(text.encode("utf-8"), preset=9 | lzma.PRESET_EXTREME))
    print(f"{args.out}: {len(text)} characters, {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
