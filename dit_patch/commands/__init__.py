"""The commands of `dit-patch`, a module each: `arguments(parser)` says what it takes, `run(options)` does it.

They are found by `dit_patch.cli`. None imports torch before it runs.
"""
