"""The step size, which changes over the rounds, for clients and server."""


def step_size(start: float, final: float, server_round: int, rounds: int) -> float:
    """Return a round's step size, on a geometric schedule over the rounds.

    Parameters
    ----------
    start : float
        Step size of round 1.
    final : float
        Step size of the last round; 0 keeps the first step size in all rounds.
    server_round, rounds : int
        Round, from 1, and number of rounds.

    Returns
    -------
    float
    """
    if final == 0 or rounds == 1:
        return start
    return float(start * (final / start) ** ((server_round - 1) / (rounds - 1)))
