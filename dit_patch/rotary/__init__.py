"""Rotary position embeddings as one operation."""
