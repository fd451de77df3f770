"""Everything that measures: single calls at real sizes, rotation kernels, whole forwards, step caching."""
