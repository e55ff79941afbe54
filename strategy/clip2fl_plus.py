"""CLIP2FL-Plus: CLIP2FL with four of this project's extensions, under one name."""

from strategy.clip2flm import CLIP2FLM


class CLIP2FLPlus(CLIP2FLM):
    """CLIP2FL whose steps go further: four extensions together, and their defaults.

    It computes nothing of its own. The schema gives it other defaults (`DefaultOf`):
    clients step with Muon (Jordan et al. 2024) and distil from consistent views of
    their images (Beyer et al. 2022) with more weight on the teacher; the server steps
    with momentum (Hsu et al. 2019), and delivers the average over rounds. Each part can
    be switched off by its key. docs/clip2fl-plus.md gives the equations and what each
    part contributes.
    """
