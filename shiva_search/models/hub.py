"""Whether the hub can be asked. In: the network as it is. Out: None, or why not, within seconds.

A download that finds no network is tried again for most of a minute by the hub's own library, and then reads as a file
that is missing there.
"""

from __future__ import annotations

#: The hub answers within a fraction of a second, or not at all.
_PATIENCE_S = 5.0


def why_unreachable() -> str | None:
    """Why the hub cannot be asked; None where it answers, whatever its answer is."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_S)
    except Exception as error:  # of the HTTP library below, which is another one from release to release
        return f"{constants.ENDPOINT} does not answer: {str(error) or type(error).__name__}"
    return None
