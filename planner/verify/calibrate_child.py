"""``python -m planner.verify.calibrate_child``: measure a device, asked as ``execute/process.py`` says."""

from __future__ import annotations

import sys

from planner.core.codec import decode
from planner.execute.process import Progress, serve
from planner.verify.calibration_trial import CalibrationAnswer, CalibrationRequest


def work(asked: object, progress: Progress) -> CalibrationAnswer:
    """Carry out the request, telling what is being done and the fraction done."""
    from planner.verify.calibrating import Calibrating

    return Calibrating(request=decode(CalibrationRequest, asked, what="the request"), progress=progress).run()


if __name__ == "__main__":
    sys.exit(serve(work))
