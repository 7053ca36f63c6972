"""What runs: the code location. Copy the template, then edit here."""

import warnings

import dagster as dg

# Dagster announces its own beta and preview parameters in every process; users can do nothing about these.
for _category in (dg.BetaWarning, dg.PreviewWarning):
    warnings.filterwarnings("ignore", category=_category)
