"""The federated algorithms, one per file, and the maths they rest on."""
