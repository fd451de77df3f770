"""Everything that measures.

`sites` is `dit-patch bench`: hits, single calls at real sizes, operations and whole forwards, plain and patched.
`rotary/` is `dit-patch bench rotary`: rotation functions side by side.
`step_cache/` is `dit-patch bench step-cache`: what step caching gains and costs.
`recorded_calls` records single calls of sites, to be repeated.
`rows` holds a row of figures, and writes rows as CSV.
`surroundings` chooses specs, and says what hardware and versions the figures were measured with.
"""
