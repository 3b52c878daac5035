"""``python -m planner.verify.tune_child``: search the best settings, asked as ``execute/process.py`` says."""

from __future__ import annotations

import sys

from planner.core.codec import decode
from planner.execute.process import Progress, serve
from planner.verify.tuning_trial import TuneAnswer, TuneRequest


def work(asked: object, progress: Progress) -> TuneAnswer:
    """Carry out the request, telling what is being done and the fraction done."""
    from planner.verify.tuning import Tuning

    return Tuning(request=decode(TuneRequest, asked, what="the request"), progress=progress).run()


if __name__ == "__main__":
    sys.exit(serve(work))
