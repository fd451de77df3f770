"""`dit-patch new`: begin a spec for a class of models.

    print(spec_text(draft("diffusers.WanTransformer3DModel")))

`guess` makes a tiny configuration and inputs from signatures.
`observe` runs that model, and proposes sites for calls whose results repeat, each with a key.
`rotary` finds the functions that rotate queries and keys.
`prune` tries what is proposed, and takes out what `dit-patch check` would refuse.
`draft` does all of that for a class; `write` puts it down as YAML, with comments for whoever goes on from there.
"""
