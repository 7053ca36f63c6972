"""Asset declarations, one file per topic."""
