"""Whether a model can still be trained from, told by what it computes."""

from __future__ import annotations

import numpy as np

# Nats. Logits of a model that can be trained differ by hundreds at most.
LEAST_LOG_PROB = -1e4


def broken_log_probs(log_probs: np.ndarray) -> str:
    """What is wrong with a model's log-probs of real tokens; "" if nothing is."""
    if not np.isfinite(log_probs).all():
        return "its log-probs are not finite"
    if len(log_probs) and log_probs.min() < LEAST_LOG_PROB:
        return f"its log-probs go down to {log_probs.min():.2g}"
    return ""
