"""What the length limits cut: a warning where it is much."""

import sys

from srlm_jax.parallel import hosts

MOST_CUT = 0.05  # the share above which there is a warning


def warn_if_cut(stage: str, what: str, cut: int, total: int, field: str) -> None:
    """Prints a line on stderr where more than MOST_CUT of `total` texts were cut, and which field to raise."""
    if cut > MOST_CUT * total and hosts.is_main():
        print(
            f"warning: {stage}: the length limit cut {cut} of {total} {what} ({cut / total:.0%}); raise {field}",
            file=sys.stderr,
            flush=True,
        )
