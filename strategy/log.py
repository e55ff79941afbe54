"""Flower's log. Strategies write to it, so that their lines join Flower's own."""

from logging import getLogger

log = getLogger("flwr").log
