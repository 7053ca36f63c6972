"""What the example's workloads share. No Dagster and nothing else of the repository: it also runs on the cluster."""
