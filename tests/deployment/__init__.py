"""Federations of real processes, each machine a network namespace."""
