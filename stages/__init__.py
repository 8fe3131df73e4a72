"""One module per stage of the data engine (paper §4)."""
