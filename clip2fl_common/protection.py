"""Which reply fields have clipping and noise, and by which keys.

A site's rules, its own account of epsilon and the server's account read this. A new
field with protection gets two keys in the schema and a line in `PROTECTED_FIELDS`; its
client part must follow the keys.
"""

from dataclasses import dataclass

from clip2fl_common.config import Privacy
from clip2fl_common.messages.names import GRADIENTS, MOMENTS

PROTECTED_FIELDS = {GRADIENTS: "gradient", MOMENTS: "moment"}
"""By field, the NAME in its keys (see `Protection`)."""


@dataclass(frozen=True)
class Protection:
    """The clipping and noise of a field in one run.

    Attributes
    ----------
    name : str
        NAME in its keys, ``privacy.NAME-clip-norm`` and
        ``privacy.NAME-noise-multiplier``.
    norm : float
        Norm to which an image's part is shortened; 0 for none.
    noise : float
        Deviation of the noise in units of what one image can change; 0 for none.
    """

    name: str
    norm: float
    noise: float


def protection(field: str, privacy: Privacy) -> Protection | None:
    """Return the clipping and noise of a field, or None if it has no keys for them.

    Parameters
    ----------
    field : str
        Name of a reply field.
    privacy : Privacy
        The run's settings of privacy.
    """
    if field not in PROTECTED_FIELDS:
        return None
    name = PROTECTED_FIELDS[field]
    return Protection(
        name,
        norm=getattr(privacy, f"{name}_clip_norm"),
        noise=getattr(privacy, f"{name}_noise_multiplier"),
    )
