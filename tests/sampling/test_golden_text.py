"""A real trained model, sampled greedily, writes the very text that others' code draws from it."""

import jax

from srlm_jax.model import llama, weights
from srlm_jax.parallel import rules
from srlm_jax.sampling import engine
from srlm_jax.text.tokenizer import SentencePieceTokenizer


def test_two_hundred_greedy_tokens_are_the_published_ones(stories260k, one_device):
    folder = stories260k / "hf"
    config = weights.read_config(folder, param_dtype="float32", compute_dtype="float32", remat="dots")
    mesh = one_device("data", "tensor")
    model = weights.load(folder, config, rules.model_shardings(mesh, rules.SAMPLE, llama.abstract(config)))
    tokenizer = SentencePieceTokenizer(folder / "tokenizer.model")
    (((sample,),),) = engine.sample(
        model,
        [engine.Group(address=(0, 0), prompts=((tokenizer.bos,),), limits=None)],
        engine.Draw(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=200, stops=()),
        key=jax.random.key(0),
        config=engine.EngineConfig(rows=1, steps=16, weights=None, cache=None),
        mesh=mesh,
        report=lambda finished, tokens: None,
        work=engine.Work(),
    )
    assert len(sample.ids) == 200
    # The file ends its last line, the model does not.
    assert tokenizer.decode(sample.ids) + "\n" == (stories260k / "greedy_200.txt").read_text()
