"""The client parts by field. A new one is a file in this package and a line here."""

from client_app.class_gradients import ClassGradients
from client_app.class_statistics import ClassStatisticsPart
from client_app.part import ClientPart
from clip2fl_common.messages import ReplyError

PARTS: dict[str, type[ClientPart]] = {
    ClassGradients.field: ClassGradients,
    ClassStatisticsPart.field: ClassStatisticsPart,
}


def part_for(field: str) -> ClientPart:
    """Return the part that computes a field.

    Raises
    ------
    ReplyError
        If this client has no part for the field.
    """
    if field not in PARTS:
        raise ReplyError(
            f"no client part computes {field}; there are {sorted(PARTS)} "
            "(client_app/registry.py)"
        )
    return PARTS[field]()
