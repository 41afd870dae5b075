"""Everything a run depends on, by scale. Every default of the project is here; `configs/iter1.py` to `iter3.py` say
only how far to go.

`tiny` and `smoke` bring their own world; `llama2_7b` and the other Llamas take the folder of their weights as
config.model.path and human data as config.seed_data. The paper's own run is `llama2_70b`.

Numbers marked with a section are those of Self-Rewarding Language Models (arXiv 2401.10020); where the paper is silent
the choice is ours and says why.
"""

import dataclasses
import difflib
from collections.abc import Callable

from ml_collections import ConfigDict, config_dict

from srlm_jax.model import config as presets
from srlm_jax.model.config import LlamaConfig
from srlm_jax.parallel.mesh import PROGRAMS


def sampling(
    *, samples: int, temperature: float, top_p: float, max_new_tokens: int, stop: tuple[str, ...]
) -> ConfigDict:
    return ConfigDict(locals())


def judging(*, max_new_tokens: int) -> ConfigDict:
    """Sections 2.2 and 3.1.3: three judgements of each answer, T 0.7, top-p 0.9."""
    c = sampling(samples=3, temperature=0.7, top_p=0.9, max_new_tokens=max_new_tokens, stop=())
    c.rubric = config_dict.placeholder(str)  # a file in place of the paper's rubric, or of the embedded world's
    c.prefix = ""  # words that each judgement begins with, "Score: " for a base model that needs a form to fill
    c.score = "votes"  # section 2.2; "expected" is the mean under the probabilities of the score's token
    c.min_scored = 0.5  # a run stops where fewer judgements than this share have a score
    c.endpoint = endpoint()  # a server that judges a round's answers in place of the model
    return c


def optimizer(*, learning_rate: float, end_learning_rate: float, warmup_steps: int, weight_decay: float) -> ConfigDict:
    c = ConfigDict(locals())
    c.b1 = 0.9  # the paper names no optimizer: AdamW with the moments of the Llama papers
    c.b2 = 0.95
    c.eps = 1e-8
    c.clip_norm = 1.0
    return c


def training(
    *, steps: int, batch_size: int, log_every: int, checkpoint_every: int, optimizer: ConfigDict
) -> ConfigDict:
    c = ConfigDict(locals())
    c.accumulate = 1
    c.first_loss_tolerance = 0.02  # nats; ten times what bfloat16 changes of a first loss, see train/first_step.py
    return c


def endpoint() -> ConfigDict:
    """An OpenAI-compatible server, none unless its url is given."""
    c = ConfigDict()
    c.url = config_dict.placeholder(str)
    c.model = config_dict.placeholder(str)
    c.key_variable = config_dict.placeholder(str)  # the environment variable that holds its key
    c.parameters = ("n", "temperature", "top_p", "max_tokens")  # which of them it takes
    c.timeout_s = 600.0  # all samples of a prompt come in one answer
    c.patience_s = 900.0  # a server that is started again, with a large model to load, is back by then
    c.concurrency = 32
    c.requests_per_minute = 6_000
    return c


def seed_data(*, ift_prompts: int, eft_train_prompts: int, eft_eval_prompts: int) -> ConfigDict:
    """Where the human data come from: an Open Assistant export, or the user's three sources; `eft` beside either."""
    c = ConfigDict({"rules": {"lang": "en", "min_ranked": 2, **locals()}})
    for source in ("trees", "eft", "ift", "eft_train", "eft_eval"):
        c[source] = config_dict.placeholder(str)
    return c


def model(preset: LlamaConfig) -> ConfigDict:
    """The numbers of a Llama; a folder that is given as `path` has its own."""
    c = ConfigDict(dataclasses.asdict(preset))
    c.path = config_dict.placeholder(str)
    return c


def self_instruction(*, prompts: int, max_candidates: int, batch: int, generator: str | None) -> ConfigDict:
    c = ConfigDict({"prompts": prompts, "max_candidates": max_candidates, "batch": batch})
    c.generator = config_dict.placeholder(str)
    c.generator = generator
    c.endpoint = endpoint()  # a server that writes the prompts
    c.prompts_file = config_dict.placeholder(str)  # a fixed set of prompts instead of new ones
    c.from_seeds = 6  # section 3.1.3: 8 shots, 6 from IFT and 2 from generated prompts
    c.from_generated = 2
    # Self-Instruct's rules (arXiv 2212.10560, section 2.2), which section 2.2 refers to.
    c.filters = ConfigDict(
        {
            "min_words": 4,
            "max_words": 150,
            "banned_words": (
                "image", "images", "graph", "graphs", "picture", "pictures", "file", "files", "map", "maps", "draw",
                "plot", "go to",
            ),
            "banned_starts": ("write a program",),
            "max_rouge_l": 0.7,
        }
    )  # fmt: skip
    return c


def validation() -> ConfigDict:
    """Where no oracle is: prompts that every model answers, and a server that judges the answers."""
    c = ConfigDict()
    c.prompts_file = config_dict.placeholder(str)
    c.endpoint = endpoint()
    return c


def engine(*, rows: int, steps: int) -> ConfigDict:
    """How samples are drawn on the devices. Nothing is rounded to 8 bits unless it is asked for: the paper does not."""
    c = ConfigDict(locals())
    c.weights = config_dict.placeholder(str)  # "int8": the projections' weights
    c.cache = config_dict.placeholder(str)  # "int8": keys and values
    return c


def lora() -> ConfigDict:
    """Low-rank adapters in SFT and DPO, none unless their rank is given: the paper trains all weights."""
    c = ConfigDict()
    c.rank = config_dict.placeholder(int)
    c.alpha = 16.0  # with rank 16 that of the Alignment Handbook's recipes for Zephyr 7B; see docs/lora.md
    return c


def start_alone(c: ConfigDict) -> None:
    """One process is the whole job; more are joined by flags: see launch/. What one has compiled the next one finds."""
    c.coordinator = config_dict.placeholder(str)
    c.processes = config_dict.placeholder(int)
    c.process = config_dict.placeholder(int)
    c.compile_cache = config_dict.placeholder(str)
    c.compile_cache = PROGRAMS
    c.start_timeout_s = 300  # hosts of a pod may be minutes apart: each installs the package before it starts


# --- the embedded world -----------------------------------------------------------------------------------------------


def tiny() -> ConfigDict:
    """The embedded word-list world: a model of 0.8 million parameters, minutes on two CPU cores."""
    c = ConfigDict()
    c.seed = 0
    start_alone(c)
    c.context_length = 320
    c.max_prompt_tokens = 28
    c.shard_prompts = 256
    c.logprob_chunk = 512
    c.length_multiple = 16
    c.packed = True
    c.reference_batch = 64
    c.model = model(presets.tiny())
    c.chat = "plain"
    c.chat_system = config_dict.placeholder(str)
    c.endpoint = endpoint()  # a server that samples from the models of this run
    c.lora = lora()
    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": 1})
    c.engine = engine(rows=192, steps=8)

    # Flaws leave room to improve: about half of the annotators' answers are perfect.
    c.world = ConfigDict(
        {
            "documents": 30_000,
            "trees": 1_900,
            "replies": (2, 5),
            "held_out": 1_024,
            "corpus_flaw": 0.25,
            "corpus_wrong_verdict": 0.05,
            "reply_flaw": 0.4,
            "rank_noise": 0.4,
        }
    )
    # Without sources, the embedded world's trees. Section 3.1.1 has 3,200 IFT examples.
    c.seed_data = seed_data(ift_prompts=1_000, eft_train_prompts=570, eft_eval_prompts=190)

    c.pretraining = ConfigDict()
    c.pretraining.sequence_length = 208
    c.pretraining.dropout = 0.0
    c.pretraining.train = training(
        steps=1_300,
        batch_size=12,
        log_every=20,
        checkpoint_every=100,
        optimizer=optimizer(learning_rate=8e-3, end_learning_rate=4e-4, warmup_steps=50, weight_decay=0.1),
    )

    c.sft = ConfigDict()
    c.sft.dropout = 0.0  # section 3.1.3 has 0.1, see `llama`
    c.sft.train = training(
        steps=150,
        batch_size=32,  # section 3.1.3 has 16; a model this small is served better by more
        log_every=10,
        checkpoint_every=50,
        # Section 3.1.3 has 5.5e-6 falling to 1.1e-6 for 70 billion parameters; the fall to a fifth is kept.
        optimizer=optimizer(learning_rate=3e-4, end_learning_rate=6e-5, warmup_steps=10, weight_decay=0.0),
    )

    # The paper does not say how "agrees" treats ties and partial lists (section 3.1.1).
    c.eft = ConfigDict(
        {
            "min_scored": 2,  # one score agrees with any ranking
            "max_tied_share": 0.4,  # six scores seldom order five answers strictly; see `llama` below
            "draws_per_prompt": 3,
            "most_common_share": 0.4,
        }
    )

    c.self_instruction = self_instruction(
        prompts=600,
        max_candidates=12_000,
        batch=192,
        generator="current",  # the paper's is a fixed Llama 2-Chat 70B; appendix A.5 uses the current model
    )
    c.self_instruction.sampling = sampling(
        samples=1, temperature=0.6, top_p=0.9, max_new_tokens=32, stop=("\n10.",)  # section 3.1.3
    )  # fmt: skip

    # Sections 2.2 and 3.1.3: four responses, three judgements of each, T 0.7, top-p 0.9.
    c.responses = sampling(samples=4, temperature=0.7, top_p=0.9, max_new_tokens=16, stop=())
    c.judging = judging(max_new_tokens=64)

    c.dpo = ConfigDict()
    c.dpo.beta = 0.1  # section 3.1.3
    c.dpo.train = training(
        steps=150,
        batch_size=32,
        log_every=10,
        checkpoint_every=50,
        # Section 3.1.3 has 1e-6 falling to 1e-7.
        optimizer=optimizer(learning_rate=1e-5, end_learning_rate=1e-6, warmup_steps=10, weight_decay=0.0),
    )
    c.validation = validation()
    return c


def smoke() -> ConfigDict:
    """Every stage of the tiny scale with less of everything: to see within two minutes that all of them run."""
    c = tiny()
    c.shard_prompts = 24
    c.model.update({"D": 64, "L": 2, "F": 192})
    c.engine.rows = 96
    c.world.update({"documents": 3_000, "trees": 200, "replies": (2, 3), "held_out": 48})
    c.seed_data.rules.update({"ift_prompts": 100, "eft_train_prompts": 60, "eft_eval_prompts": 24})
    c.pretraining.train.update({"steps": 80, "batch_size": 8, "checkpoint_every": 50})
    c.pretraining.train.optimizer.update({"learning_rate": 6e-3, "end_learning_rate": 6e-4, "warmup_steps": 20})
    c.sft.train.update({"steps": 20, "batch_size": 16, "checkpoint_every": 10})
    c.self_instruction.update({"prompts": 48, "max_candidates": 960, "batch": 96})
    c.dpo.train.update({"steps": 20, "batch_size": 8, "checkpoint_every": 10})
    c.judging.min_scored = 0.02  # and few scores
    return c


# --- Llama 2 and its kin ----------------------------------------------------------------------------------------------


def llama(preset: LlamaConfig, *, chat: str, tensor: int, generator: str | None) -> ConfigDict:
    """The paper's run (section 3.1), with a model of any size.

    The paper has one size, 70 billion parameters. The others keep its numbers, for it gives no rule by which to change
    them.
    """
    c = ConfigDict()
    c.seed = 0
    start_alone(c)
    # Llama 2 reads 4,096 tokens. Half of them hold the judge's rubric (389), a prompt of Self-Instruct's 150 words, an
    # answer and a verdict; human examples that are longer are left out and counted.
    c.context_length = 2_048
    c.max_prompt_tokens = 192  # about 150 words
    # A file's prompts are sampled to their end before the next ones begin, so that the last rows of each are alone: of
    # 4,096 answers by 64 rows that is two or three hundredths of the time.
    c.shard_prompts = 1_024
    c.logprob_chunk = 256
    c.length_multiple = 128
    c.packed = True  # the same examples in a batch, in two fifths of the positions
    c.reference_batch = 32  # log-probabilities take no gradient, so more rows at a time than a training step has
    c.model = model(preset)
    c.chat = chat  # the paper does not say how Llama 2 is asked; later work of its authors wraps prompts in [INST]
    c.chat_system = config_dict.placeholder(str)  # "" for none; unless given, what the model's own template has
    c.lora = lora()
    c.mesh = ConfigDict({"data": 1, "fsdp": -1, "tensor": tensor})
    # 64 rows of 1,024 new tokens are 34 GB of keys and values in a 7B, and 21 GB in a 70B, whose heads share them; a
    # pod has room for as many again on each copy of the weights.
    c.engine = engine(rows=64, steps=16)
    c.endpoint = endpoint()  # a server that samples from the models of this run
    c.world = None
    c.pretraining = None

    # Section 3.1.1: 3,200 IFT examples in English, first turn, rank 0; EFT 1,630 and 541 examples, which at 2.85 ranked
    # answers a prompt are about 570 prompts and 190.
    c.seed_data = seed_data(ift_prompts=3_200, eft_train_prompts=570, eft_eval_prompts=190)

    c.sft = ConfigDict()
    # Section 3.1.3 has 0.1, for 70 billion parameters, and does not say of what. Llama was pretrained without dropout.
    # Here it is that of the attention probabilities, the only one that the Llama of transformers and of torchtune has.
    # Loss of 12 human answers under SmolLM2-135M, 4 seeds, without dropout 2.56 nats a token; with 0.1 of the attention
    # probabilities 2.67 to 2.69, of the embeddings 2.81 to 2.99, of both residual branches 5.40 to 7.35.
    c.sft.dropout = 0.0
    c.sft.train = training(
        steps=600,  # not in the paper: three epochs of IFT, two of IFT + EFT
        batch_size=16,  # section 3.1.3
        log_every=10,
        checkpoint_every=200,  # section 3.1.3
        # Section 3.1.3: 5.5e-6, cosine, to 1.1e-6. Warm-up and weight decay are not in the paper: a thirtieth of the
        # steps, and the weight decay of Llama 2's own fine-tuning (arXiv 2307.09288, section 3.1).
        optimizer=optimizer(learning_rate=5.5e-6, end_learning_rate=1.1e-6, warmup_steps=20, weight_decay=0.1),
    )

    # Section 3.1.1 keeps judgements that agree with the human ranking, and does not say how ties and judgements without
    # a score count, nor how many judgements there are of an answer: here as many as votes (section 2.2).
    c.eft = ConfigDict(
        {
            "min_scored": 2,  # one score agrees with any ranking
            # Of the scored pairs that humans ordered. Six scores seldom order three answers strictly: one of their
            # three pairs may be tied, two of four answers' six, none of two answers. No pair may be ordered wrongly,
            # and one must be ordered. Three draws for each of the 285 prompts of Open Assistant 1's English validation
            # split and of 100 of its trees, simulated: a judge that always says 4 has none of 855 accepted (99 while
            # one pair could be tied in any list), one that draws scores uniformly 211 (226), one that is off by a
            # standard deviation of one point 748 (741).
            "max_tied_share": 0.4,
            "draws_per_prompt": 3,
            "most_common_share": 0.4,  # section 3.1.1 thins the most common score, 4, and does not say how far
        }
    )

    c.self_instruction = self_instruction(
        # Not in the paper, which has 3,964 pairs in the first round and 6,942 in the second: enough for both.
        prompts=8_000,
        max_candidates=64_000,
        batch=256,
        generator=generator,  # section 3.1.3: a fixed Llama 2-Chat 70B, whose folder is yours to give
    )
    # Section 3.1.3: T 0.6, top-p 0.9. A prompt of 150 words has room in 256 tokens; the tenth task begins a new list.
    c.self_instruction.sampling = sampling(samples=1, temperature=0.6, top_p=0.9, max_new_tokens=256, stop=("\n10.",))

    # Section 3.1.3: four responses, T 0.7, top-p 0.9. Sections 2.2 and 3.1.3: three judgements, drawn as the responses
    # are. The lengths are not in the paper: an answer of 750 words; a verdict of at most 100 (figure 2), and its score.
    c.responses = sampling(samples=4, temperature=0.7, top_p=0.9, max_new_tokens=1_024, stop=())
    c.judging = judging(max_new_tokens=256)

    c.dpo = ConfigDict()
    c.dpo.beta = 0.1  # section 3.1.3
    # Section 3.1.3 has a dropout of 0.1 here too. There is none: a policy with dropout is compared with a reference
    # without, and the first loss is no longer ln 2. TRL and the code of the DPO paper switch it off.
    c.dpo.train = training(
        steps=400,  # not in the paper: 1.6 epochs of its first round's pairs, 0.9 of its second's
        batch_size=16,  # section 3.1.3
        log_every=10,
        checkpoint_every=200,  # section 3.1.3
        # Section 3.1.3: 1e-6 falling to 1e-7; the curve is not named, and a cosine here as in SFT. No weight decay:
        # beta is what holds the model near the one it starts from.
        optimizer=optimizer(learning_rate=1e-6, end_learning_rate=1e-7, warmup_steps=20, weight_decay=0.0),
    )
    c.validation = validation()
    return c


def trial() -> ConfigDict:
    """Every stage with a small real model on two CPU cores: an instruction-tuned Llama of some hundred million
    parameters and an Open Assistant export of 180 trees or more. It shows what a round does to a model before anything
    is rented. Its numbers are too small to improve one.
    """
    c = llama(presets.smollm2_135m(), chat="chatml", tensor=1, generator="current")
    c.model.update({"compute_dtype": "float32", "remat": "dots"})  # CPUs take gradients slowly in bfloat16
    c.context_length = 1_024  # the judge's rubric (389), a prompt and an answer
    c.max_prompt_tokens = 64
    c.shard_prompts = 32
    c.length_multiple = 64
    c.reference_batch = 8
    c.engine.rows = 32
    c.seed_data.rules.update({"ift_prompts": 80, "eft_train_prompts": 48, "eft_eval_prompts": 40})
    c.sft.train.update({"steps": 20, "batch_size": 8, "log_every": 2, "checkpoint_every": 10})
    c.sft.train.optimizer.update({"learning_rate": 1e-5, "end_learning_rate": 2e-6, "warmup_steps": 2})
    c.self_instruction.update({"prompts": 48, "max_candidates": 960, "batch": 48})
    c.self_instruction.sampling.max_new_tokens = 96
    c.responses.max_new_tokens = 192
    # A small model does not know how to judge: a verdict is "Score: " and a digit, its value the expected one, and the
    # human ranks teach it. The expected score is the same in each vote, so there is one.
    c.seed_data.eft = "ranks"
    c.judging.update({"prefix": "Score: ", "score": "expected", "samples": 1, "max_new_tokens": 8, "stop": ("\n",)})
    c.dpo.train.update({"steps": 10, "batch_size": 8, "log_every": 1, "checkpoint_every": 5})
    c.dpo.train.optimizer.update({"learning_rate": 2e-6, "end_learning_rate": 2e-7, "warmup_steps": 2})
    return c


# --- by name ----------------------------------------------------------------------------------------------------------

# `tensor` splits a model's matrices where a copy of its weights for sampling would not fit one device.
SCALES: dict[str, Callable[[], ConfigDict]] = {
    "tiny": tiny,
    "smoke": smoke,
    "trial": trial,
    "llama2_7b": lambda: llama(presets.llama2_7b(), chat="llama2", tensor=1, generator=None),
    "llama2_13b": lambda: llama(presets.llama2_13b(), chat="llama2", tensor=2, generator=None),
    "llama2_70b": lambda: llama(presets.llama2_70b(), chat="llama2", tensor=8, generator=None),
    # These write their prompts themselves (appendix A.5) unless told otherwise.
    "tinyllama_1b": lambda: llama(presets.tinyllama_1b(), chat="llama2", tensor=1, generator="current"),
    "smollm2_135m": lambda: llama(presets.smollm2_135m(), chat="chatml", tensor=1, generator="current"),
    "smollm2_360m": lambda: llama(presets.smollm2_360m(), chat="chatml", tensor=1, generator="current"),
    "smollm2_1_7b": lambda: llama(presets.smollm2_1_7b(), chat="chatml", tensor=1, generator="current"),
    "llama3_1_8b": lambda: llama(presets.llama3_1_8b(), chat="llama3", tensor=1, generator="current"),
    "llama3_2_1b": lambda: llama(presets.llama3_2_1b(), chat="llama3", tensor=1, generator="current"),
    "llama3_2_3b": lambda: llama(presets.llama3_2_3b(), chat="llama3", tensor=1, generator="current"),
}


def get_config(scale: str | None, models: int) -> ConfigDict:
    """A scale's configuration, up to the model M`models`; no scale means "tiny"."""
    scale = scale or "tiny"
    if scale not in SCALES:
        near = difflib.get_close_matches(scale, SCALES, 1)
        meant = f"did you mean {near[0]!r}? There are" if near else "choose one of"
        raise ValueError(f"unknown scale {scale!r} after the config's colon: {meant} {', '.join(SCALES)}")
    c = SCALES[scale]()
    c.models = models
    c.workdir = f"runs/{scale}"
    return c
