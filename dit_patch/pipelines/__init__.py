"""Diffusers pipelines: loaded or built small, called, and what they generate as pictures and videos.

`loading` loads a pipeline for a command line, and explains why it cannot.
`call_arguments` checks what a pipeline's `__call__` takes.
`timed_call` calls a pipeline and times it; `generate` is `dit-patch generate`.
`tiny_pipelines` builds small pipelines with random weights; `demo` is `dit-patch demo`, which generates with them.
`trained_example` is a small Wan that was trained, with its weights.
`sampling` generates with a trained pipeline to measure step caching, and `quality` compares the frames.
`pictures` compares videos, and writes them to files.
"""
