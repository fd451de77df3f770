"""What a library needs before its models can be built and called outside of its own pipelines.

A spec's `mini: {host: dit_patch.hosts.name}` names one of these modules. Each has `prepare()`, which is called before
the library's classes are imported and may be called again, `build(cls, config)`, which returns a model with random
weights, and, where its classes are built from configuration objects, `defaults(cls)`; `RUNS_UNDER_AUTOCAST` where the
library's pipelines do that; and the functions that a spec's `rollout:` names.

- `fastvideo`: a process group of one, a forward context, rollouts with KV caches.
- `transformers`: models that are built from a configuration object.
- `zero_init`: models whose modulation begins at zero.
"""

HOSTS = {"fastvideo": f"{__name__}.fastvideo", "transformers": f"{__name__}.transformers"}
"""The host of each package all of whose models need one."""
