"""What every stage of a run needs: where things are, which models there are, and how to go on where a kill left off."""

import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import jax
from etils import epath
from tqdm import tqdm

from srlm_jax.data import world
from srlm_jax.errors import UserError
from srlm_jax.judge.rubric import Rubric, paper_rubric, read_rubric
from srlm_jax.judge.score import POINTS
from srlm_jax.model import llama, quantized, weights
from srlm_jax.model.llama import Llama
from srlm_jax.model.lora import check_rank
from srlm_jax.parallel import hosts, rules
from srlm_jax.parallel import mesh as meshes
from srlm_jax.parallel.reshard import reshard
from srlm_jax.pipeline.endpoint import EndpointGenerate
from srlm_jax.pipeline.generate import ModelGenerate, open_model, stage_key, watched_ids
from srlm_jax.pipeline.ledger import Ledger
from srlm_jax.pipeline.settings import BadConfig, ModelSettings, Settings, flatten
from srlm_jax.records import Completion, Generate, Request, SamplingParams
from srlm_jax.sampling import engine
from srlm_jax.sampling.engine import Work
from srlm_jax.storage import checkpoint, jsonl, paths, rows
from srlm_jax.text import templates
from srlm_jax.text.chat import FORMATS, PLAIN, ChatFormat, check_format, with_system
from srlm_jax.text.tokenizer import Tokenizer, WordTokenizer, check_vocabulary, load_tokenizer

CHAT_FIELDS = templates.Fields(chat="config.chat", system="config.chat_system")

Item = TypeVar("Item")
Record = TypeVar("Record")


@dataclasses.dataclass
class LiveModel:
    """The model that a run keeps on its devices between stages, none at first."""

    name: str | None
    model: Llama | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """A run: its settings, its folder, and the means that all stages share.

    The model's numbers and its tokenizer are the embedded world's, or those of the folder that config.model.path names.
    The rubric is the file of config.judging.rubric, else the world's in the embedded world and the paper's elsewhere.
    """

    settings: Settings
    workdir: epath.Path
    ledger: Ledger
    tokenizer: Tokenizer
    rubric: Rubric
    chat_note: str | None  # for the user, where the model's own chat template needs a word
    train_mesh: jax.sharding.Mesh
    sample_mesh: jax.sharding.Mesh
    live: LiveModel

    @property
    def embedded(self) -> bool:
        """Whether this is a run in the embedded world, whose oracle knows how good an answer is."""
        return self.settings.model.path is None

    @property
    def chat(self) -> ChatFormat:
        """How instructions and answers become tokens."""
        return with_system(FORMATS[self.settings.chat], self.settings.chat_system or "")

    # The settings that every stage depends on which samples.
    SAMPLING = ("chat", "chat_system", "engine", "endpoint", "shard_prompts")
    # Those that every judgement depends on. The others of config.judging do not change what a model of this run writes.
    JUDGING = tuple(
        f"judging.{name}" for name in ("samples", "temperature", "top_p", "max_new_tokens", "stop", "prefix")
    )

    def config(self, *fields: str) -> dict[str, object]:
        """Full names and values of the named parts of the settings: what a stage depends on.

        Of a server only which model it is asked for, None where no server is asked: the same model may be served
        elsewhere when a run goes on.
        """
        flat, found = flatten(self.settings, "config"), {}
        wanted = [f"config.{field}" for field in (*fields, "seed")]
        for name, value in flat.items():
            group, _, field = name.rpartition(".")
            if not any(name == each or name.startswith(f"{each}.") for each in wanted):
                continue
            if not group.endswith("endpoint"):
                found[name] = value
            elif field == "model":
                found[name] = None if flat[f"{group}.url"] is None else value
        return found

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

    def keep(self, name: str, model: Llama) -> None:
        """Keeps a model on the devices, laid out for training, for the stages that need it next; one at a time."""
        self.live.name, self.live.model = name, model

    def to_train(self, name: str) -> Llama:
        """The model of this run called `name`, laid out for training: the one that is kept, or else from its
        checkpoint, each part straight to its device; then it is kept."""
        if self.live.name != name:
            self.live.name = self.live.model = None  # before another takes its room
            like = rules.placed(self.train_mesh, rules.TRAIN, llama.abstract(self.settings.model.llama))
            self.keep(name, checkpoint.load_model(self.workdir / name / "checkpoint", like))
        return self.live.model

    def give_away(self, name: str) -> Llama:
        """As `to_train`, to one who makes another model of it in its place: it is kept no longer."""
        model = self.to_train(name)
        self.live.name = self.live.model = None
        return model

    def to_sample(self, name: str) -> Llama:
        """The model of this run called `name`, laid out for sampling and in the dtype that it computes in, which the
        weights would be cast to at each step, or rounded as config.engine.weights says: a copy beside the one that is
        kept."""
        config = self.settings.model.llama
        narrow = llama.abstract(dataclasses.replace(config, param_dtype=config.compute_dtype))
        as_sampled = functools.partial(quantized.quantize, weights=self.settings.engine.weights)
        like = rules.placed(self.sample_mesh, rules.SAMPLE, jax.eval_shape(as_sampled, narrow))
        # Rounded first: less has to travel.
        return engine.decoding_model(reshard(as_sampled(self.to_train(name)), like), self.sample_mesh)

    def generate(self, name: str, stage: str) -> Generate:
        """The model of this run called `name` as a source of completions: by the server of config.endpoint, or on this
        job's devices with the random numbers of `stage`."""
        server = self.settings.endpoint
        if server.url is not None:
            server = dataclasses.replace(server, model=server.model.replace("{name}", name))
            return EndpointGenerate(server, "config.endpoint")
        return ModelGenerate(
            model=self.to_sample(name),
            tokenizer=self.tokenizer,
            chat_format=self.chat,
            config=self.settings.engine,
            mesh=self.sample_mesh,
            key=stage_key(self.settings.seed, stage),
            work=Work(),
        )

    def generate_with(self, folder: epath.Path, stage: str) -> Generate:
        """A model from elsewhere that continues texts, with its own tokenizer. It is asked in no chat, so it need not
        know the marks of this run's format."""
        return open_model(
            folder,
            load_tokenizer(folder),
            self.sample_mesh,
            chat_format=PLAIN,
            config=self.settings.engine,
            key=stage_key(self.settings.seed, stage),
        )

    def write(self, path: epath.Path, records: Iterable[object]) -> None:
        """Writes records that every process has made alike: by the one process that writes what is one file."""
        if hosts.is_main():
            jsonl.write(path, records)

    def in_shards(
        self,
        folder: epath.Path,
        items: Sequence[Item],
        cls: type[Record],
        work: Callable[[Sequence[Item], Callable[[int, int], None]], Sequence[Record]],
        *,
        title: str,
        completions: Callable[[Item], int],
        together: bool,
    ) -> list[Record]:
        """Records for all items, one file for every `shard_prompts` of them; files that are there are not redone.

        The files are dealt out to the processes of the job, and each writes its own; but where `together` says that a
        file is the work of all devices, every process works on every file and the first one writes it.

        `work` makes the records of some items and reports its progress. Its batches never reach over a file's end, so
        a run that was killed computes the rest exactly as it would have, and so does another number of processes.
        """
        size = self.settings.shard_prompts
        parts = [items[start : start + size] for start in range(0, len(items), size)]
        done = jsonl.shards_done(folder)
        hosts.barrier(f"{folder}: looked")  # or one that is slow would find what one that is fast has made since
        first, step = (0, 1) if together else (jax.process_index(), jax.process_count())
        mine = range(first, len(parts), step)
        with progress(title, sum(sum(map(completions, parts[index])) for index in mine), "completion") as report:
            for index in mine:
                if index in done:
                    report(sum(map(completions, parts[index])), 0)
                    continue
                records = work(parts[index], report)
                if hosts.is_main() or not together:
                    jsonl.write(jsonl.shard(folder, index), records)
        hosts.barrier(f"{folder}: written")
        return jsonl.read(folder, cls) if parts else []


def needs_all(generate: Generate) -> bool:
    """Whether a source of completions is spread over the devices of several processes, which must then ask it
    together and for the same."""
    return isinstance(generate, ModelGenerate) and generate.mesh.is_multi_process


def draw(generate: Generate, requests: Sequence[Request], params: SamplingParams) -> list[tuple]:
    """As `generate`, the requests dealt out to the processes of the job; all of them get all completions."""
    if needs_all(generate) or jax.process_count() == 1:
        return generate(requests, params, lambda finished, tokens: None)
    mine = generate(requests[jax.process_index() :: jax.process_count()], params, lambda finished, tokens: None)
    plain = [[[dataclasses.asdict(c) for c in prompt] for prompt in request] for request in mine]
    shares = [iter(json.loads(share)) for share in hosts.exchange(json.dumps(plain).encode())]
    dealt = [next(shares[index % len(shares)]) for index in range(len(requests))]
    return [tuple(tuple(Completion(**c) for c in prompt) for prompt in request) for request in dealt]


@contextmanager
def naming(field: str) -> Iterator[None]:
    """What cannot be read inside is told with the name of the configuration's field that asks for it.

    Raises BadConfig in place of a UserError or an OSError.
    """
    try:
        yield
    except (UserError, OSError) as error:
        raise BadConfig(f"{field}: {error}") from error


@contextmanager
def progress(title: str, total: int, unit: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar with time left and tokens per second; yields `report(finished units, tokens)`."""
    tokens = 0
    with tqdm(
        total=total, desc=title, unit=unit, dynamic_ncols=True, file=sys.stderr, disable=not hosts.is_main()
    ) as bar:

        def report(finished: int, new_tokens: int) -> None:
            nonlocal tokens
            tokens += new_tokens
            seconds = bar.format_dict["elapsed"]
            if tokens and seconds:
                bar.set_postfix_str(f"{tokens / seconds:,.0f} tokens/s", refresh=False)
            bar.update(finished)

        yield report


def make_run(settings: Settings, code: str) -> Run:
    """Reads what stands beside the weights in config.model.path, if that is given. Nothing is written: see
    `open_workdir`.

    Raises:
      BadConfig: there is no such model, or it cannot be used; it has fewer token ids than its tokenizer.
      BadInput: the mesh does not fit the devices, or they cannot share a batch.
    """
    path = settings.model.path
    settings = with_numbers(settings)
    if path is not None:
        with naming("config.model.path"):
            tokenizer, rubric = load_tokenizer(path), paper_rubric()
    elif settings.world is None or settings.pretraining is None:
        raise BadConfig(
            "config.model.path is not given: the folder of a Llama's weights, Hugging Face's layout or Meta's or a "
            "checkpoint of this package, with its tokenizer"
        )
    else:
        tokenizer, rubric = WordTokenizer(world.vocabulary()), world.RUBRIC
    with naming("config.model.V" if path is None else "config.model.path"):
        check_vocabulary(tokenizer, settings.model.V)
    if settings.judging.rubric is not None:
        with naming("config.judging.rubric"):
            rubric = read_rubric(settings.judging.rubric)
    if settings.judging.score == "expected" and not watched_ids(tokenizer, POINTS):
        raise BadConfig(
            f"config.judging.score is 'expected', and {tokenizer.name} has no single token for each of "
            f"{', '.join(POINTS)} behind a colon: take 'votes'"
        )
    with naming("config.chat"):
        chat, note = templates.resolve(path, tokenizer, settings.chat, settings.chat_system, CHAT_FIELDS)
        check_format(tokenizer, chat, settings.model.V)
    settings = dataclasses.replace(settings, chat_system=chat.system)
    train_mesh, sample_mesh = meshes.train_mesh(settings.mesh), meshes.sample_mesh(settings.mesh)
    check_adapters(settings)
    check_batches(settings, train_mesh.shape["data"] * train_mesh.shape["fsdp"])
    rules.model_shardings(train_mesh, rules.TRAIN, llama.abstract(settings.model.llama))
    with naming("config.workdir"):
        workdir = paths.given(settings.workdir)
    return Run(
        settings=settings,
        workdir=workdir,
        ledger=Ledger(workdir, code),
        tokenizer=tokenizer,
        rubric=rubric,
        chat_note=note,
        train_mesh=train_mesh,
        sample_mesh=sample_mesh,
        live=LiveModel(None, None),
    )


def open_workdir(workdir: epath.Path) -> None:
    """Makes the folder, if it is not there. Each process of a job writes a file there for a moment and looks for those
    of the others.

    Raises:
      BadConfig: it cannot be written, or is not one folder for all processes.
    """
    try:
        _open(workdir)
    except OSError as error:
        raise BadConfig(f"config.workdir {workdir} cannot be written ({error}); choose another folder") from error


def _open(workdir: epath.Path) -> None:
    workdir.mkdir(parents=True, exist_ok=True)
    probes = [workdir / f".writable-{process}" for process in range(jax.process_count())]
    probes[jax.process_index()].write_text("")
    hosts.barrier("workdir: every process has written")
    missing = [process for process, probe in enumerate(probes) if not probe.exists()]
    hosts.barrier("workdir: every process has looked")
    probes[jax.process_index()].unlink()
    if missing:
        raise BadConfig(
            f"config.workdir {workdir} is not one folder for all processes: process {jax.process_index()} does not see "
            f"what process {missing[0]} writes there; choose one that all hosts share"
        )


def check_batches(settings: Settings, groups: int) -> None:
    """Refuses batches that so many groups of devices cannot share evenly."""
    sizes = {"config.reference_batch": settings.reference_batch}
    for name in ("pretraining", "sft", "dpo"):
        if (part := getattr(settings, name)) is not None:
            sizes[f"config.{name}.train.batch_size"] = part.train.batch_size
    for field, size in sizes.items():
        if size % groups:
            raise BadConfig(
                f"{field} is {size}, which {groups} groups of devices (config.mesh: data x fsdp) cannot share: make it "
                "a multiple of their number, or raise config.mesh.tensor so that there are fewer"
            )


def check_adapters(settings: Settings) -> None:
    """Refuses adapters that do not fit the model."""
    with naming("config.lora"):
        check_rank(settings.lora, settings.model.llama)


def with_numbers(settings: Settings) -> Settings:
    """`settings` with the numbers of the model in config.model.path, where that is given.

    Raises:
      BadConfig: they cannot be read.
    """
    model = settings.model
    if model.path is None:
        return settings
    with naming("config.model.path"):
        found = weights.read_config(
            model.path, param_dtype=model.param_dtype, compute_dtype=model.compute_dtype, remat=model.remat
        )
    numbers = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
    return dataclasses.replace(settings, model=ModelSettings(path=model.path, **numbers))
