"""What other libraries do inside, and dit_patch has to know or to change.

Every private or undocumented name of another library that dit_patch touches is a fact here: one small function, or
one bound name where a call would cost too much, with its reason, what goes wrong without it, and the version in which
it was seen.
`tests/test_upstream.py` has a test for each, which fails with the name of the fact when a library has moved.

- `torch_internals`: versions and storages, a module's registries, modes, streams, capture, compiled modules, FSDP2.
- `accelerate_internals`, `diffusers_internals`, `peft_internals`, `fastvideo_internals`: what their hooks, adapters
  and parallel models keep, and where.
- `cache_dit_internals`: what drives its caching package block by block.
- `verbosity`: keeps upstream's advice quiet while small models are built.
"""
