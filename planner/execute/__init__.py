"""Carry a plan out: preflight, steps in child processes, receipts so that a rerun resumes."""
