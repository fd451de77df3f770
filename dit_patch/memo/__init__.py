"""A memoised call: its key, what its result depends on besides, where results are kept. Knows no model."""
