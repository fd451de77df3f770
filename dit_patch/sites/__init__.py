"""A site of a spec live on one model: found by its address, wrapped, and answered from what is kept."""
