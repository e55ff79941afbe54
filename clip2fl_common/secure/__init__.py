"""Secure sums: the server learns the sum of the clients' vectors, and no vector.

The protocol is that of Bonawitz et al. (2017) without its recovery of lost secrets
(docs/secure-aggregation.md). All cryptography is that of the `cryptography` package.
Nothing here knows messages, files or Flower.
"""
