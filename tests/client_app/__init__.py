"""Tests of the client's code."""
