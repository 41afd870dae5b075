"""A text file that a user wrote by hand: a judge's prompt, the wording of a judgement."""

from etils import epath

from srlm_jax.errors import BadInput
from srlm_jax.storage import paths


def read(path: epath.PathLike) -> str:
    """The text of a file in UTF-8, with "\\n" as line end, without a byte order mark and without one last line end.

    Raises:
      BadInput, naming the file: it is not UTF-8.
      OSError: it cannot be read.
    """
    try:
        text = paths.given(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadInput(f"{path}: not UTF-8 text (byte {error.start}: {error.reason}); save it as UTF-8") from error
    return text.replace("\r\n", "\n").removesuffix("\n")
