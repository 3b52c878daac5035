"""Speed against published measurements: whole devices held out, decode and prefill, with the coverage of the intervals.

python benchmarks/speed_published.py        (needs numpy and scipy; about half a minute)
"""

from fit_speed import main

if __name__ == "__main__":
    main(["--check"])
