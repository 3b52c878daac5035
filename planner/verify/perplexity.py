"""Perplexity and KL divergence of logits, with the definitions of llama.cpp's ``llama-perplexity``.

Arrays are ``logits[rows, n_vocab]`` in float32; sums are taken in float64. Rows are worked in blocks, so that the
temporaries stay a few MB for any vocabulary. Source of the definitions: llama.cpp, ``tools/perplexity``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from planner.core.errors import ExecutionFailed
from planner.verify.trial import Comparison, Perplexity

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

_BLOCK_ELEMENTS = 1 << 22
"""Elements of one block of rows: 16 MiB a temporary."""

_STORED_RANGE_NATS = 16.0
"""llama-perplexity's logits file keeps log-probabilities down to e**-16 of the largest, in 16 bits."""


def log_softmax(logits: Floats) -> tuple[Floats, Doubles]:
    """``logits`` less their row maximum, and the logarithm of each row's sum of exponentials.

    ``shifted[i, j] - log_sum[i]`` is the log-probability of token j in row i.
    """
    import numpy as np

    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted, np.log(np.exp(shifted).sum(axis=1, dtype=np.float64))


@dataclass(slots=True)
class Scores:
    """Per-token results, 8 bytes a token and quantity, in the order of the text."""

    nll: list[Any] = field(default_factory=list)
    reference_nll: list[Any] = field(default_factory=list)
    kl: list[Any] = field(default_factory=list)
    same_top: list[Any] = field(default_factory=list)

    def add(self, logits: Floats, targets: NDArray[np.int64], reference: Floats | None, *, stored: bool) -> None:
        """Score one chunk.

        Args:
            logits: of the model, ``[rows, n_vocab]``.
            targets: the token that really followed each row, ``[rows]``.
            reference: logits of the reference for the same rows.
            stored: round the reference as llama-perplexity's logits file does.

        Raises:
            ExecutionFailed: a logit is not finite.
        """
        rows = max(1, _BLOCK_ELEMENTS // logits.shape[1])
        for start in range(0, len(targets), rows):
            block = slice(start, start + rows)
            part = None if reference is None else reference[block]
            self._add_block(logits[block], targets[block], part, stored=stored)

    def _add_block(self, logits: Floats, targets: NDArray[np.int64], reference: Floats | None, *, stored: bool) -> None:
        import numpy as np

        _require_finite(logits, "the model")
        index = np.arange(len(targets))
        shifted, log_sum = log_softmax(logits)
        self.nll.append(log_sum - shifted[index, targets])
        if reference is None:
            return
        _require_finite(reference, "the reference")
        base, base_log_sum = (stored_log_softmax if stored else log_softmax)(reference)
        self.reference_nll.append(base_log_sum - base[index, targets])
        self.kl.append(kl_divergence(base, base_log_sum, shifted, log_sum, floor=stored))
        self.same_top.append(logits.argmax(axis=1) == base.argmax(axis=1))

    def perplexity(self) -> Perplexity:
        """Of the model."""
        return perplexity_of(_joined(self.nll))

    def comparison(self) -> Comparison | None:
        """Against the reference, where there was one."""
        return compare(self) if self.reference_nll else None


def _joined(parts: list[Any]) -> Any:
    import numpy as np

    return np.concatenate(parts)


def _require_finite(logits: Floats, whose: str) -> None:
    import numpy as np

    bad = int(np.count_nonzero(~np.isfinite(logits)))
    if bad:
        raise ExecutionFailed(
            f"{whose} gives logits that are not finite numbers",
            numbers=f"{bad} of {logits.size} in one block of {logits.shape[0]} tokens",
            hint="the file is damaged or was quantized from weights that were; quantize it again from the original",
            code="not-finite",
        )


def kl_divergence(base: Floats, base_log_sum: Doubles, shifted: Floats, log_sum: Doubles, *, floor: bool) -> Doubles:
    """KL(reference ‖ model) in nats of each row: Σ p·(ln p - ln q), p of the reference.

    Arguments are pairs of :func:`log_softmax`. ``floor`` leaves out terms below e**-16, as llama-perplexity does.
    Equal logits give exactly 0.
    """
    import numpy as np

    p = np.exp(base - base_log_sum[:, None].astype(np.float32))
    if floor:
        p[base - base_log_sum[:, None] <= -_STORED_RANGE_NATS] = 0
        kept = p.sum(axis=1, dtype=np.float64)
    else:
        kept = np.ones(len(p))
    terms = np.einsum("ij,ij->i", p, base - shifted, dtype=np.float64)
    result: Doubles = terms + kept * (log_sum - base_log_sum)
    return result


def stored_log_softmax(logits: Floats) -> tuple[Floats, Doubles]:
    """:func:`log_softmax` after llama-perplexity's 16-bit file: what its KL divergence is really taken against.

    The file holds, for each row, the smallest kept log-probability, a step, and 16-bit counts of steps above it.
    """
    import numpy as np

    top = logits.max(axis=1, keepdims=True)
    lowest = np.maximum(logits.min(axis=1, keepdims=True), top - np.float32(_STORED_RANGE_NATS))
    _, log_sum = log_softmax(logits)
    step = (top - lowest) / np.float32(65535)
    with np.errstate(divide="ignore", invalid="ignore"):
        count = np.where(step > 0, np.rint((logits - lowest) * (np.float32(1) / step)), np.float32(0))
    count = np.where(logits > lowest, count, np.float32(0))
    smallest = lowest - top - log_sum[:, None].astype(np.float32)
    return (step * count + smallest).astype(np.float32), np.zeros(len(logits))


def mean_and_error(values: Doubles) -> tuple[float, float]:
    """Mean and standard error of the mean (0 for fewer than two values)."""
    import numpy as np

    count = len(values)
    error = math.sqrt(float(np.var(values)) / (count - 1)) if count > 1 else 0.0
    return float(np.mean(values, dtype=np.float64)), error


def perplexity_of(nll: Doubles) -> Perplexity:
    """exp of the mean of ``nll`` [nats]; the error is that of the mean times the perplexity."""
    mean, error = mean_and_error(nll)
    value = _exp(mean)
    return Perplexity(value=value, standard_error=value * error)


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        raise ExecutionFailed(
            "the perplexity is too large for a number",
            numbers=f"mean negative log-likelihood {value:.1f} nats per token",
            hint="the file is damaged, or the text is not what the model was trained on",
            code="not-finite",
        ) from None


def compare(scores: Scores) -> Comparison:
    """Ratio of the perplexities and KL divergence with standard errors.

    The error of the log ratio is that of the paired differences: var(a) + var(b) - 2 cov(a, b), as llama-perplexity.
    """
    import numpy as np

    nll, base, kl = _joined(scores.nll), _joined(scores.reference_nll), _joined(scores.kl)
    same = _joined(scores.same_top)
    log_ratio, log_ratio_error = mean_and_error(nll - base)
    kl_mean, kl_error = mean_and_error(kl)
    top = float(np.mean(same))
    return Comparison(
        reference=perplexity_of(base),
        log_ratio=log_ratio,
        log_ratio_standard_error=log_ratio_error,
        kl_mean_nats=kl_mean,
        kl_standard_error_nats=kl_error,
        kl_median_nats=float(np.median(kl)),
        kl_quantile_99_nats=float(np.quantile(kl, 0.99)),
        kl_maximum_nats=float(kl.max()),
        same_top_fraction=top,
        same_top_standard_error=math.sqrt(top * (1 - top) / (len(same) - 1)) if len(same) > 1 else 0.0,
    )
