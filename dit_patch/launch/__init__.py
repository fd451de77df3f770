"""`dit-patch run`: an unmodified program, with the models in it and in its child processes patched.

`parent` starts the command and reports when it has ended; `site/sitecustomize.py` is what every Python process that the
command starts comes by, as light as can be; `hooks` watches there for the classes that have specs, `first` patches each
new instance at its first forward, and `around` finds the pipeline that runs it. What a process did is written down by
`dit_patch.report.journal`, and put together by `summary`. The two sides share a folder, see `folder`.
"""
