"""Replacements that a spec may name with `use: dit_patch.functions.<module>:<function>`.

Each takes wrapt's four arguments (`original, instance, args, kwargs`), is held to the original bit for bit at the first
sight of each signature, and is written for one source of it: the fingerprint that the spec states as `source:`.
"""
