"""What to tell a user whom a cluster does not let in: its token is missing here, or is another one."""

from __future__ import annotations

_WHERE = (
    "put the head node's token (`ray get-auth-token` prints it there) in ~/.ray/auth_token, or RAY_AUTH_TOKEN, or the "
    "file that RAY_AUTH_TOKEN_PATH names"
)


def refused(address: str, error: str = "") -> str:
    """What is wrong and what to do, from Ray's own words on it, where there are any."""
    if "403" in error or "invalid" in error.lower():
        return (
            f"the cluster at {address} does not accept this token, which is another cluster's or was changed: {_WHERE}"
        )
    if error:
        return f"the cluster at {address} lets nobody in without its token. Set RAY_AUTH_MODE=token, and {_WHERE}"
    return (
        f"something listens at {address} but does not let us in. If it is a Ray cluster, it wants its token: set "
        f"RAY_AUTH_MODE=token, and {_WHERE}"
    )
