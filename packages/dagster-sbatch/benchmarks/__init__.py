"""Measurements behind the numbers in the documentation: ratios within one run, never limits for a test."""
