"""A finished run as one HTML file that needs no network: what was planned, what was measured, and the evidence.

The page is made of what ``report.json`` and the header of the artifact hold; no number is computed here but positions
on paper. Names in a report come from strangers, so all text goes through a template with autoescaping.
"""
