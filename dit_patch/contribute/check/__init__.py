"""`dit-patch check`: try a spec on the real class that it names, and name everything that is wrong with it.

    result = try_spec(spec, cases.minis(spec))
    print(result_text(result))

`cases` builds the models to try a spec on.
`probe` records what the sites of an unpatched model are called with and return, and tests their keys on that.
`blocks` finds the forward pattern that the transformer blocks follow.
`trial` runs the models patched and unpatched.
`results` holds what came of it as values; `judge` draws conclusions from them, `text` puts them into words.
"""
