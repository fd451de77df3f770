"""What a library needs before its models can be built and called outside of its own pipelines.

A spec's `mini: {host: dit_patch.hosts.name}` names one of these modules. Each has `prepare()`, called before the
library's classes are imported and harmless when repeated, and `build(cls, config)`, a model with random weights; and
the functions that a spec's `rollout:` names.
"""
