"""Values only: units, hardware, model, workload, candidate, estimates, plan, measurement, errors."""
