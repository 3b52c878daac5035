"""What a calibration text of another domain costs, measured: data/calibration_domains.csv and a table.

    python benchmarks/domains.py [MODEL]     the demo model unless a checkpoint folder is named; minutes

The matrix is made of narration, of speech, of code and of qplan's general text, of as many tokens each; files of low
bit rates are made with it, and their KL divergence from the 16-bit model is measured on held-out text of each domain.
Narration and speech are paragraphs of the demo model's corpus without and with quotation marks, code is qplan's own:
what is measured on is none of what is calibrated with. The demo model has read novels and no code.
"""

from __future__ import annotations

import csv
import datetime
import lzma
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from budget import Workshop

from planner.core.data import data_path
from planner.core.plan import CalibrationSource
from planner.execute import calibration as texts

TYPES = ("Q2_K", "IQ2_M")
CHUNKS = 20  # of 512 tokens, to calibrate with: what the shortest of the texts has
MEASURED_CHUNKS = 10
THREADS = 1  # the model is small, and threads that wait for one another are slow on a busy machine
TEXT_CHARACTERS = 120_000
QUOTED, GENERAL = '"', "general"


def paragraphs(text: str, *, spoken: bool) -> str:
    """Paragraphs with or without speech."""
    lines = (line for line in text.splitlines() if len(line) > 80 and not line.startswith("="))
    return "\n".join(line for line in lines if (QUOTED in line) == spoken)[:TEXT_CHARACTERS]


def write_texts(folder: Path) -> dict[str, tuple[Path, Path]]:
    """Domain → text to calibrate with, text to measure on."""
    held = data_path("demo/heldout.txt").read_text("utf-8")
    corpus = lzma.decompress(data_path("demo/corpus.txt.xz").read_bytes()).decode("utf-8")
    held_lines = set(held.splitlines())
    seen = "\n".join(line for line in corpus.splitlines() if line not in held_lines)
    modules = sorted((Path(__file__).parent.parent / "planner").glob("*/*.py"))
    shipped = data_path("calibration/code.txt").read_text("utf-8")
    others = [text for path in modules if (text := path.read_text("utf-8"))[:200] not in shipped]
    made = {
        "narration": (paragraphs(seen, spoken=False), paragraphs(held, spoken=False)),
        "speech": (paragraphs(seen, spoken=True), paragraphs(held, spoken=True)),
        "code": (shipped, "\n".join(others)[-TEXT_CHARACTERS:]),
    }
    found = {}
    for domain, both in made.items():
        paths = folder / f"{domain}.txt", folder / f"{domain}-heldout.txt"
        for path, text in zip(paths, both, strict=True):
            path.write_text(text, encoding="utf-8")
        found[domain] = paths
    return found


class Domains(Workshop):
    """What is made of a model with matrices of several texts."""

    def calibrate(self, domain: str, text: CalibrationSource) -> Path:
        """A matrix."""
        return self.run(self.measuring("imatrix", text), self.full, f"{domain}.gguf")


def rows(bench: Domains, domains: dict[str, tuple[Path, Path]]) -> Iterator[dict[str, str]]:
    """One measurement each; a type that needs no matrix without one too."""
    matrices: dict[str, Path | None] = {
        name: bench.calibrate(name, texts.from_text(path, CHUNKS)) for name, (path, _) in domains.items()
    }
    matrices[GENERAL] = bench.calibrate(GENERAL, texts.built_in(CHUNKS))
    for type_ in TYPES:
        for calibrated, matrix in ({"nothing": None} | matrices if type_ == "Q2_K" else matrices).items():
            made = bench.quantize(type_, matrix)
            for measured, (_, text) in domains.items():
                found = bench.measure(made.name, made, text, MEASURED_CHUNKS)
                yield {
                    "model": bench.name,
                    "type": type_,
                    "calibrated_with": calibrated,
                    "measured_on": measured,
                    "kl_nats": f"{found.divergence:.5f}",
                    "kl_error_nats": f"{found.error:.5f}",
                    "log_perplexity_ratio": f"{found.log_ratio:.5f}",
                    "source": f"benchmarks/domains.py: {CHUNKS} chunks to calibrate, {MEASURED_CHUNKS} to measure",
                    "date": datetime.date.today().isoformat(),
                }


def main() -> None:
    """Measure, print, write."""
    found = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        domains = write_texts(folder)
        bench = Domains(sys.argv[1] if len(sys.argv) > 1 else "demo", folder, THREADS)
        for row in rows(bench, domains):
            found.append(row)
            print(*(row[key] for key in list(row)[1:7]), flush=True)
    with data_path("calibration_domains.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]))
        writer.writeheader()
        writer.writerows(found)


if __name__ == "__main__":
    main()
