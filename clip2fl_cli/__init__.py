"""The clip2fl command: comparisons, reports, predictions and exported models."""
