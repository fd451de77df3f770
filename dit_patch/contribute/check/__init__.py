"""`dit-patch check`: a spec tried on the real class that it names, and everything that is wrong with it, by name.

`cases` are the models to try it on, `probe` what the sites of an unpatched one are called with and give, `blocks` what
its transformer blocks take and return, `trial` the whole of it.
"""
