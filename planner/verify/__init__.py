"""Measure an artifact (memory, speed, quality), compare with the plan, write the report."""
