"""Flower's log, in which a strategy's lines stand among those of its loop."""

from logging import getLogger

log = getLogger("flwr").log
