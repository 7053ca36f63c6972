"""Asset declarations, one file a domain."""
