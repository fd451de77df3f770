"""A site of a spec at work on one model: found by its address, wrapped, and answered from what is kept.

    binding = Binding.of(spec, model, Budget(1 << 30))
    patches, finding = bind(spec, site, binding, pipeline)  # looks everything up, and changes nothing
    patches[0].install()

- `bind`: from a site to its patches; `binding`: what they are bound with; `resolve`: what an address names in a model.
- `patch`: what may be asked of any patch, and what those of an attribute share. One file for each kind: `memoised`
  (results are kept), `replaced` (`use:`), `stand_in` (`unused:`), `result_filter` (`then:`), `span` (`a..b`); `output`:
  where and as what results go out.
- `layers`: an attribute wrapped and unwrapped; `inner_functions`: a function inside a function as such an attribute.
- `scope`: which forward of which model is running; `pipeline_models`: the models inside a pipeline.
"""
