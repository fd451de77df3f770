"""Functions that a spec may name in `use:`, `then:` and `reads:`, as `dit_patch.functions.<module>:<function>`.

    - at: forward:apply_rotary_emb
      kind: rotary
      use: dit_patch.functions.rotary:diffusers
      source: 0123456789ab

A function of `use:` replaces the original. It takes wrapt's four arguments (`original, instance, args, kwargs`), is
compared with the original bit for bit at the first sight of each signature, and is written for one source of it, whose
fingerprint the spec states. One of `then:` takes a result and returns what the caller gets; one of `reads:` takes
nothing and returns what a result depends on.

- `rotary`, `matrixgame`: rotary embeddings, by `dit_patch.rotary`.
- `sinusoid`: timestep embeddings with their frequencies built once.
- `attention`: which attention kernels compute, for `reads:`.
- `kv_cache`: KV caches with integer indices, for `then:`.
"""
