"""A memoised call: its key, what its result depends on besides, where results are kept.

Knows no model. `keys` turns arguments into a key, and `context` adds the state around the call. `model_guards` notices
at each forward that anything else has changed, and `site_guards` at each call that a weight has; `guards` has one class
for each kind of thing, `reachable` finds what there is to compare. `lookup` finds a result, or computes, checks and
stores it; `store` holds results within a budget; `results` is the one walk over nested ones.
"""
