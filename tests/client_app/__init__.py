"""Tests of what runs where the data is."""
