"""What step caching gains and costs: runs side by side, as tables and a page, and the search for a threshold."""
