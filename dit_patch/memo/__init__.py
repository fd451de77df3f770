"""A memoised call: its key, what its result depends on besides, where results are kept.

Knows no model. `keys` turns arguments into a key, and `context` adds the state around the call. `guards` and
`module_guards` notice that weights or attributes have changed. `lookup` finds a result, or computes, checks and stores
it; `store` holds results within a budget; `results` is the one walk over nested ones.
"""
