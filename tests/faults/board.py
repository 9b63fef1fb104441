"""Puts the points into this process as it is imported, before anything that has some: import it first."""

from tests.faults.failpoints import Board, install

BOARD = Board()
install(BOARD)
