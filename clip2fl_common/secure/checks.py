"""What a party checks before it goes on with a round; each error names the culprit."""

from collections.abc import Iterable, Mapping, Sequence

from clip2fl_common.secure.identities import Trust, has_signed
from clip2fl_common.secure.statements import (
    RoundName,
    SecureError,
    SignedKey,
    key_statement,
)
from clip2fl_common.shown import quoted


def check_directory(
    round_name: RoundName,
    directory: Sequence[SignedKey],
    trust: Trust,
    own: SignedKey,
    least: int,
) -> None:
    """Check all parties' keys before anything is masked with them.

    Parameters
    ----------
    round_name : RoundName
        The round.
    directory : sequence of SignedKey
        The keys that the server sent.
    trust : Trust
        The party's own list of identity keys.
    own : SignedKey
        The key that this party sent; its signature is not looked at.
    least : int
        Fewest parties.

    Raises
    ------
    SecureError
        If a name occurs twice or is not trusted, if a signature is not that of its
        name for this round, if one's own key is missing or another one, or if there
        are too few parties.
    """
    keys: dict[str, bytes] = {}
    for entry in directory:
        if entry.name in keys:
            raise SecureError(f"{quoted(entry.name)} is in the round's keys twice")
        known = trust.key_of(entry.name)
        if known is None:
            raise SecureError(
                f"{quoted(entry.name)} takes part in the round, and is not in this "
                "site's list of trusted sites"
            )
        statement = key_statement(round_name, entry.name, entry.public)
        if not has_signed(known, entry.signature, statement):
            raise SecureError(
                f"the key of {quoted(entry.name)} is not signed by "
                f"{quoted(entry.name)} for this round"
            )
        keys[entry.name] = entry.public
    if own.name not in keys:
        raise SecureError(f"the round's keys lack that of {own.name}, this site")
    if keys[own.name] != own.public:
        raise SecureError(f"the round's keys have another key of {own.name}, this site")
    if len(set(keys.values())) < len(keys):
        raise SecureError("two sites have the same key in the round")
    if len(keys) < least:
        raise SecureError(f"{len(keys)} sites take part, and {least} are needed")


def check_members(
    members: Sequence[str], parties: Iterable[str], own: str, least: int
) -> None:
    """Check the set of parties that are to be summed before it is signed.

    Parameters
    ----------
    members : sequence of str
        The set that the server announced.
    parties : iterable of str
        Names of all parties of the round.
    own : str
        This party's name.
    least : int
        Fewest members.

    Raises
    ------
    SecureError
        If a member is no party or occurs twice, if this party is none, or if the
        members are too few: below ``least``, or half of the parties or fewer.
    """
    all_parties = set(parties)
    strangers = sorted(set(members) - all_parties)
    if strangers:
        raise SecureError(
            f"{quoted(strangers[0])} is to be summed, and is no party of the round"
        )
    if len(set(members)) < len(members):
        raise SecureError("a site is in the set to be summed twice")
    if own not in members:
        raise SecureError(f"this site ({own}) is not in the set to be summed")
    if len(members) < least or 2 * len(members) <= len(all_parties):
        raise SecureError(
            f"{len(members)} of {len(all_parties)} sites are to be summed, and at "
            f"least {least} and more than half are needed"
        )


def check_signatures(
    statement: bytes,
    members: Sequence[str],
    signatures: Mapping[str, bytes],
    trust: Trust,
) -> None:
    """Check that every member has signed one and the same set.

    Parameters
    ----------
    statement : bytes
        The `member_statement` that this party signed.
    members : sequence of str
        Names of the members.
    signatures : mapping of str to bytes
        Their signatures, by name.
    trust : Trust
        The party's own list of identity keys.

    Raises
    ------
    SecureError
        If a signature is missing, or is not that of the member for this statement.
    """
    for name in sorted(members):
        known = trust.key_of(name)
        signature = signatures.get(name)
        if signature is None:
            raise SecureError(f"{quoted(name)} has not signed the set to be summed")
        if known is None or not has_signed(known, signature, statement):
            raise SecureError(
                f"{quoted(name)} has not signed the same set to be summed, model, "
                "settings and keys as this site"
            )
