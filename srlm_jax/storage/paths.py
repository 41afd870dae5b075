"""Paths that a user gives, local ones or those of a bucket ("gs://bucket/folder"), and files that are not there yet."""

import os

from etils import epath

from srlm_jax.errors import BadInput, MissingExtra

_POINTER = b"version https://git-lfs"


def given(path: epath.PathLike) -> epath.Path:
    """A path that a user gave; one in a bucket is looked for.

    Raises:
      BadInput: it is an address of a kind that cannot be read, such as "https://...", or its bucket cannot be reached.
      MissingExtra: the package for its kind of bucket is missing.
    """
    text = os.fspath(path)
    scheme, separator, _ = text.partition("://")
    if not separator:
        return epath.Path(text)
    try:
        found = epath.Path(text)
    except KeyError as error:  # of a table of known schemes
        raise BadInput(
            f"{text} is an address and no path: {scheme}:// is not read or written; download what is there, and give "
            "its local path"
        ) from error
    try:
        found.exists()
    except ImportError as error:
        raise MissingExtra(f"{text} cannot be reached without another package: {error}") from error
    except OSError:
        raise
    except Exception as error:  # the libraries of the buckets raise what they like
        raise BadInput(f"{text} cannot be reached ({type(error).__name__}: {error!s:.200})") from error
    return found


def pointer_error(path: epath.Path) -> str | None:
    """The message for a file that is only Git's pointer to a large file, which it has not fetched; None for others."""
    if not path.is_file():
        return None
    with path.open("rb") as file:
        if file.read(len(_POINTER)) != _POINTER:
            return None
    return f"{path} is a Git LFS pointer and not the file itself: fetch it with `git lfs pull`"
