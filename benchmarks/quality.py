"""Quality against published perplexities: whole models held out, by range of bits, method and model.

python benchmarks/quality.py        (needs numpy and scipy)
"""

from fit_quality import main

if __name__ == "__main__":
    main(["--check"])
