"""Other libraries, each in a process and a virtual environment of its own.

A peer is a script in `srlm_jax/bench/peers` that knows nothing of this package: it reads a JSON document a line on its
standard input and answers each with one on its output, so that it lives on between two measurements.
"""

import contextlib
import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from srlm_jax.errors import BadInput

# What each peer's environment is made of. torch by its number alone: where pip finds the wheel that suits the machine.
REQUIREMENTS: dict[str, tuple[str, ...]] = {
    "transformers": ("torch==2.13.0", "transformers==5.24.0", "safetensors>=0.8", "numpy>=2.0"),
    "trl": ("torch==2.13.0", "transformers==5.24.0", "trl==1.16.0", "safetensors>=0.8", "numpy>=2.0"),
    "tunix": ("google-tunix==0.1.7", "safetensors>=0.7", "numpy>=2.0"),
}
NEEDS_PYTHON: dict[str, tuple[int, int]] = {"tunix": (3, 12)}  # of its jax 0.12

_SCRIPTS = Path(__file__).parent / "peers"
_HOME = Path(".peers")

# Of our process, and what another's libraries would misread.
_OURS_ALONE = ("PYTHONPATH", "PYTHONHOME", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "XLA_PYTHON_CLIENT_MEM_FRACTION")


def python_of(name: str, given: str | None) -> Path:
    """The interpreter of a peer: as given, or that of the environment that `make` makes.

    Raises:
      ValueError: it is not there.
    """
    path = Path(given) if given is not None else _HOME / name / "bin" / "python"
    if not path.exists():
        wrong = f"--peer_python={given} is not there" if given else f"{path} is not there"
        raise BadInput(f"{wrong}: make it by python -m srlm_jax.bench peers --make={name}, or name another")
    return path


def make(name: str, base: str) -> Path:
    """A virtual environment for a peer in `.peers/NAME`, made by the interpreter `base` and filled by pip.

    Raises:
      ValueError: there is no such peer, the interpreter is too old, or it cannot be installed.
    """
    if name not in REQUIREMENTS:
        raise BadInput(f"--make={name}: the peers are {', '.join(REQUIREMENTS)}")
    least = NEEDS_PYTHON.get(name, (0, 0))
    version = tuple(json.loads(_output([base, "-c", "import sys; print(list(sys.version_info[:2]))"], name)))
    if version < least:
        raise BadInput(
            f"{name} needs Python {least[0]}.{least[1]} or later, and {base} is {version[0]}.{version[1]}: "
            "name another by --base_python"
        )
    folder = _HOME / name
    _output([base, "-m", "venv", os.fspath(folder)], name)
    _output([os.fspath(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]], name)
    return folder


def _output(line: list[str], name: str) -> str:
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BadInput(f"{name}: {line[0]} cannot be run: {error.strerror}") from error
    if done.returncode != 0:
        raise BadInput(f"{name} cannot be installed: {_last_line(done.stderr) or f'exit {done.returncode}'}")
    return done.stdout


def _last_line(text: str) -> str:
    """What went wrong: the last exception's first line, behind which JAX puts some of its own; else the last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]*(Error|Exception|Interrupt)\b", line)]
    return (errors or lines or [""])[-1]


class Peer:
    """A running peer: `ask` puts a question and waits for the answer. See `started`."""

    def __init__(self, name: str, child: subprocess.Popen, complaints: BinaryIO):
        self.name = name
        self.versions: dict[str, str] = {}
        self._child = child
        self._complaints = complaints

    def ask(self, **question: object) -> dict[str, object]:
        """The answer to a question.

        Raises:
          ValueError: the process ended instead; the message has its last words.
        """
        try:
            self._child.stdin.write(json.dumps(question) + "\n")
            self._child.stdin.flush()
            line = self._child.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            code = self._child.wait()
            if code == -signal.SIGKILL:
                raise BadInput(
                    f"{self.name} was killed, as where memory runs out: ask for less at once (--batch, --dtype)"
                )
            self._complaints.seek(0)
            said = _last_line(self._complaints.read().decode(errors="replace"))
            raise BadInput(f"{self.name} ended ({said or f'exit {code}'})")
        return json.loads(line)


@contextlib.contextmanager
def started(script: str, python: Path, job: Mapping[str, object]) -> Iterator[Peer]:
    """`peers/SCRIPT.py` by this interpreter, given `job` as its first document; it ends with the context.

    Raises:
      ValueError: it ended before it answered.
    """
    environment = {name: value for name, value in os.environ.items() if name not in _OURS_ALONE}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
    # OpenMP's threads wait for one another in a loop that takes a core each. Where others use the cores too, they then
    # wait for a thread that has none: on two busy cores small products took fifteen times as long.
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    line = [os.fspath(python), os.fspath(_SCRIPTS / f"{script}.py")]
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile() as complaints,
        subprocess.Popen(line, env=environment, stdin=pipe, stdout=pipe, stderr=complaints, text=True) as child,
    ):
        try:
            peer = Peer(script, child, complaints)
            peer.versions = peer.ask(**job)["versions"]
            yield peer
        finally:
            _end(child)


def _end(child: subprocess.Popen) -> None:
    """Without more questions a peer ends by itself; one that does not is stopped."""
    try:
        child.stdin.close()
        child.wait(timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        child.kill()


def our_versions() -> dict[str, str]:
    """Of the packages that our own numbers depend on."""
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python} | {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax")}
