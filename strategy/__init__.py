"""The federated algorithms, one per file, and the maths that they use."""
