"""What runs by itself: credentials, orphaned jobs, runs whose process is gone."""
