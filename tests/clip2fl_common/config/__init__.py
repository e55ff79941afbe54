"""Tests of the run configuration."""
