"""`dit-patch new`: the beginning of a spec for a class of models.

`guess` makes a tiny configuration and inputs from signatures, `observe` runs that model and sees which of its calls
could be kept, and by which key, `write` puts it down as YAML, with comments for whoever goes on from there; `draft` is
all of that.
"""
