"""Pipelines from disk, the hub or random weights: loaded, called, and what they make as pictures and videos."""
