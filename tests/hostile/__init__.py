"""Hostile configurations, site folders and replies against the real apps."""
