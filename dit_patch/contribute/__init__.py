"""Tools for whoever writes a spec.

`check/` is `dit-patch check`: tries a spec on its model.
`new/` is `dit-patch new`: begins a spec.
`verify` compares the forwards of a model with and without dit_patch, bit by bit.
"""
