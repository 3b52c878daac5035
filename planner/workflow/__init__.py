"""The use cases both front ends call: survey, recommend, estimate, plan, apply, verify."""
