"""From what an asset asks for to the result that Dagster stores."""
