"""Tests of the federated algorithms and their maths."""
