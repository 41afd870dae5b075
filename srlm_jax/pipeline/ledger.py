"""Which stages of a run are done, by what configuration, code and inputs: what makes every stage safe to rerun.

One JSON file a stage in WORKDIR/ledger. A stage is entered before its work, and completed after; a killed run finds
what it left and goes on, a changed configuration is refused.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence

from etils import epath

from srlm_jax.errors import BadInput, UserError
from srlm_jax.parallel import hosts
from srlm_jax.storage import jsonl


class StaleStage(UserError, ValueError):
    """A stage in the workdir was made by another configuration, code version or input than the one asked for."""


class EmptyStage(UserError, ValueError):
    """A stage gave nothing that the next could use."""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a stage has to report: how many of what, by reason, and the hash of the model it made."""

    counts: Mapping[str, int | float]
    model: str | None


@dataclasses.dataclass
class Ledger:
    """The stages of a run in the order in which they were entered.

    workdir: the run's folder.
    code: the version of this package.
    after: called on every process with the name of each stage that has done its work, but not of one found done.
    """

    workdir: epath.Path
    code: str
    after: Callable[[str], None] = lambda stage: None

    def __post_init__(self) -> None:
        self._identity: dict[str, str] = {}

    def _path(self, stage: str) -> epath.Path:
        return self.workdir / "ledger" / f"{stage.replace('/', '.')}.json"

    def entry(self, stage: str) -> dict | None:
        """What is known of a stage, None where it was never entered."""
        path = self._path(stage)
        return jsonl.read_json(path) if path.exists() else None

    def run(
        self,
        stage: str,
        work: Callable[[], Outcome],
        *,
        config: Mapping[str, object],
        inputs: Sequence[str],
        outputs: Sequence[str],
    ) -> None:
        """Does `work` unless the stage is done, and records it.

        Args:
          stage: its name, "m2/pairs".
          work: does the stage, going on where a killed run left it.
          config: every configuration field the stage depends on, by full name.
          inputs: the stages it reads from.
          outputs: files and folders it makes, relative to the workdir: what redoing it removes.

        Raises:
          StaleStage: what is there was begun under another configuration, code version or input.
        """
        identity = {
            "stage": stage,
            "config": json.loads(json.dumps(dict(config))),
            "code": self.code,
            "inputs": {name: self._identity[name] for name in inputs},
            "outputs": list(outputs),
        }
        with hosts.together(f"stage {stage}"):
            known = self._known(stage)
            if known is not None:
                self._compare(known, identity)
            if known is None or known["status"] != "done":
                # Only the first process of a job writes; on all of them the work is entered.
                if hosts.is_main():
                    jsonl.write_json(self._path(stage), {"status": "started", **identity})
                began = time.monotonic()
                outcome = work()
                seconds = round(time.monotonic() - began, 1)
                known = {
                    "status": "done",
                    **identity,
                    "model": outcome.model,
                    "counts": dict(outcome.counts),
                    "seconds": seconds + (known or {}).get("seconds", 0),
                }
                hosts.barrier(f"{stage}: worked")  # done is what every process has done
                if hosts.is_main():
                    jsonl.write_json(self._path(stage), known)
                self.after(stage)
            hosts.barrier(f"{stage}: done")  # the next stage finds all files
        digest = hashlib.sha256(json.dumps([identity, known["model"]], sort_keys=True).encode())
        self._identity[stage] = digest.hexdigest()[:16]

    def _known(self, stage: str) -> dict | None:
        """The entry of a stage that was begun, the same on every process: none writes before all have read."""
        known = self.entry(stage)
        if known is not None and known["status"] == "started" and not self._made(known):
            known = None  # it failed before it made anything, over its input perhaps: free to be begun otherwise
        hosts.barrier(f"{stage}: read")
        if known is not None and known["status"] == "removed":
            if hosts.is_main():
                self._remove(known)  # a redo that was killed
            hosts.barrier(f"{stage}: removed")
            known = None
        return known

    def _made(self, entry: dict) -> bool:
        return any((self.workdir / output).exists() for output in entry["outputs"])

    def _compare(self, known: dict, wanted: dict) -> None:
        stage = wanted["stage"]
        changes = [
            f"{field} was {json.dumps(known['config'].get(field))}, is {json.dumps(wanted['config'].get(field))}"
            for field in sorted(known["config"].keys() | wanted["config"].keys())
            if known["config"].get(field) != wanted["config"].get(field)
        ]
        if known["code"] != wanted["code"]:
            changes.append(f"the version of srlm_jax was {known['code']}, is {wanted['code']}")
        changes += [
            f"its input {name} was made anew"
            for name, identity in wanted["inputs"].items()
            if known["inputs"].get(name) != identity
        ]
        if changes:
            raise StaleStage(
                f"{self.workdir} holds stage {stage} made otherwise: {'; '.join(changes)}. Go back to the former "
                f"value, choose another --config.workdir, or add --redo={stage} to remove this stage and all that "
                "depends on it and make them again"
            )

    def _entries(self) -> dict[str, dict]:
        entries = map(jsonl.read_json, sorted((self.workdir / "ledger").glob("*.json")))
        return {entry["stage"]: entry for entry in entries}

    def made_by(self, field: str) -> list[str]:
        """The stages that were begun or are done and depend on a configuration field or on a part of it."""
        return [
            name
            for name, entry in self._entries().items()
            if any(key == field or key.startswith(f"{field}.") for key in entry["config"])
        ]

    def done(self, stage: str) -> bool:
        """Whether a stage is done, by whatever configuration."""
        entry = self.entry(stage)
        return entry is not None and entry["status"] == "done"

    def dependents(self, stages: str) -> list[str]:
        """The names of stages ("m2/pairs", or several with commas between) and of every stage that depends on one of
        them.

        Raises:
          BadInput: the workdir has no such stage; the message lists those it has.
        """
        entries, named = self._entries(), stages.split(",")
        if unknown := [name for name in named if name not in entries]:
            there = ", ".join(entries) or "none"
            raise BadInput(f"--redo={unknown[0]}: {self.workdir} has no such stage; it has {there}")
        stale = set(named)
        while grown := {name for name, entry in entries.items() if stale & entry["inputs"].keys()} - stale:
            stale |= grown
        return sorted(stale)

    def redo(self, stages: str) -> list[str]:
        """Removes the `dependents` of `stages` with their files; returns their names. All processes of a job call it,
        and the first one removes.

        Raises:
          BadInput: as `dependents` does.
        """
        entries, named, stale = self._entries(), stages.split(","), self.dependents(stages)
        hosts.barrier("redo: every process has read what there is")
        if hosts.is_main():
            # Marked first: killed from here on, no stage is taken for done, or for started, with half of its files. The
            # named stages go last, so that the same command can be given again.
            for name in stale:
                jsonl.write_json(self._path(name), {**entries[name], "status": "removed"})
            for name in sorted(stale, key=lambda name: (name in named, name)):
                self._remove(entries[name])
        hosts.barrier("redo: nothing is left")
        return stale

    def _remove(self, entry: dict) -> None:
        for output in entry["outputs"]:
            path = self.workdir / output
            if path.is_dir():
                path.rmtree()
            elif path.exists():
                path.unlink()
        self._path(entry["stage"]).unlink()
