"""What every stage of a run needs: where things are, which models there are, and how to go on where a kill left off."""

import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import jax
from etils import epath
from tqdm import tqdm

from srlm_jax.judge.rubric import Rubric
from srlm_jax.model import llama
from srlm_jax.model.llama import Llama
from srlm_jax.parallel import mesh as meshes
from srlm_jax.parallel import rules
from srlm_jax.pipeline.generate import ModelGenerate, stage_key
from srlm_jax.pipeline.ledger import Ledger
from srlm_jax.pipeline.settings import BadConfig, Settings, flatten
from srlm_jax.sampling.engine import Work
from srlm_jax.storage import checkpoint, jsonl, rows
from srlm_jax.text.chat import ChatFormat
from srlm_jax.text.tokenizer import Tokenizer, check_vocabulary

Item = TypeVar("Item")
Record = TypeVar("Record")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run: its settings, its folder, and the means that all stages share."""

    settings: Settings
    workdir: epath.Path
    ledger: Ledger
    tokenizer: Tokenizer
    chat: ChatFormat
    rubric: Rubric
    train_mesh: jax.sharding.Mesh
    sample_mesh: jax.sharding.Mesh

    def config(self, *fields: str) -> dict[str, object]:
        """Full names and values of the named parts of the settings: what a stage depends on."""
        flat = flatten(self.settings, "config")
        wanted = [f"config.{field}" for field in (*fields, "seed")]
        return {n: v for n, v in flat.items() if any(n == field or n.startswith(f"{field}.") for field in wanted)}

    def contents(self, **sources: str | None) -> dict[str, object]:
        """A hash of what each source holds that is given, by the name of its field with two underscores for each dot:
        in a stage's config it tells the ledger of a file that has changed under its old name.

        Raises:
          BadConfig: there is nothing to read; the message names the field.
        """
        found = {}
        for name, source in sources.items():
            if source is not None:
                field = f"config.{name.replace('__', '.')}"
                with naming(field):
                    found[f"{field} (content)"] = rows.digest(source)
        return found

    def load(self, folder: epath.Path, mesh: jax.sharding.Mesh, table: dict[str, rules.MeshAxes]) -> Llama:
        """A model from its checkpoint, straight into its place on the mesh."""
        shapes = llama.abstract(self.settings.model)
        places = rules.model_shardings(mesh, table, shapes)
        like = jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, places)
        return checkpoint.load_model(folder, like)

    def load_to_train(self, name: str) -> Llama:
        """The model of this run called `name`, laid out for training."""
        return self.load(self.workdir / name / "checkpoint", self.train_mesh, rules.TRAIN)

    def load_to_sample(self, name: str) -> Llama:
        """The model of this run called `name`, laid out for sampling."""
        return self.load(self.workdir / name / "checkpoint", self.sample_mesh, rules.SAMPLE)

    def generate(self, model: Llama, stage: str) -> ModelGenerate:
        """A model as a source of completions, with the random numbers of `stage`."""
        return ModelGenerate(
            model=model,
            tokenizer=self.tokenizer,
            chat_format=self.chat,
            config=self.settings.engine,
            mesh=self.sample_mesh,
            key=stage_key(self.settings.seed, stage),
            work=Work(),
        )

    def in_shards(
        self,
        folder: epath.Path,
        items: Sequence[Item],
        cls: type[Record],
        work: Callable[[Sequence[Item], Callable[[int, int], None]], Sequence[Record]],
        *,
        title: str,
        completions: Callable[[Item], int],
    ) -> list[Record]:
        """Records for all items, one file for every `shard_prompts` of them; files that are there are not redone.

        `work` makes the records of some items and reports its progress. Its batches never reach over a file's end, so
        a run that was killed computes the rest exactly as it would have.
        """
        size = self.settings.shard_prompts
        starts = range(0, len(items), size)
        done = jsonl.shards_done(folder) if folder.exists() else frozenset()
        with progress(title, sum(map(completions, items)), "completion") as report:
            for index, start in enumerate(starts):
                part = items[start : start + size]
                if index in done:
                    report(sum(map(completions, part)), 0)
                    continue
                jsonl.write(jsonl.shard(folder, index), work(part, report))
        return jsonl.read(folder, cls) if len(starts) else []


@contextmanager
def naming(field: str) -> Iterator[None]:
    """What cannot be read inside is told with the name of the configuration's field that asks for it.

    Raises BadConfig in place of an OSError or a ValueError.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        raise BadConfig(f"{field}: {error}") from error


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with time left and tokens per second; yields `report(finished units, tokens)`."""
    tokens = 0
    with tqdm(total=total, desc=title, unit=unit, dynamic_ncols=True, file=sys.stderr) as bar:

        def report(finished: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            seconds = bar.format_dict["elapsed"]
            if tokens and seconds:
                bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update(finished)

        yield report


def make_run(settings: Settings, code: str, tokenizer: Tokenizer, chat: ChatFormat, rubric: Rubric) -> Run:
    """Opens, or makes, the workdir.

    Raises:
      PermissionError, with the field to change: the workdir cannot be written.
      BadConfig: the model has fewer token ids than the tokenizer.
      ValueError: the mesh does not fit the devices.
    """
    try:
        check_vocabulary(tokenizer, settings.model.V)
    except ValueError as error:
        raise BadConfig(f"config.model.V: {error}") from error
    workdir = epath.Path(settings.workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise PermissionError(f"config.workdir {workdir} cannot be written ({error}); choose another folder") from error
    return Run(
        settings=settings,
        workdir=workdir,
        ledger=Ledger(workdir, code),
        tokenizer=tokenizer,
        chat=chat,
        rubric=rubric,
        train_mesh=meshes.train_mesh(settings.mesh),
        sample_mesh=meshes.sample_mesh(settings.mesh),
    )
