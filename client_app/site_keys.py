"""A site's keys for secure sums, from the files that its policy names."""

from pathlib import Path

from client_app.site_policy import SitePolicy
from clip2fl_common.secure.identities import Identity, PinnedKeys, read_private_key


def site_keys(policy: SitePolicy) -> tuple[Identity, PinnedKeys] | None:
    """Return a site's identity and the keys that it trusts; None if it has none.

    Parameters
    ----------
    policy : SitePolicy
        The site's rules.

    Raises
    ------
    SecureError
        If a file cannot be used. The message has the files' paths.
    """
    if policy.identity_key is None or policy.trusted_sites is None:
        return None
    trust = PinnedKeys.read(Path(policy.trusted_sites))
    return trust.identity(read_private_key(Path(policy.identity_key))), trust
