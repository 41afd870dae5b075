"""The least that work asks for, against numbers counted one token at a time."""

import dataclasses

import pytest

from srlm_jax.bench import cost
from srlm_jax.bench.workload import CPU, SHAPES, Pair, Tree, answering, judging
from srlm_jax.data.batches import Row

SMALL = dataclasses.replace(
    CPU, prompts=3, instruction=5, response_mean=4, judgement_mean=3, before=7, behind=2, rows=4
)


def test_weights_of_a_small_model_by_hand(tiny_config):
    # D 16, L 2, N 4, K 2, H 8, F 24, V 40: q and o 16x32 each, k and v 16x16 each, three of 16x24.
    assert cost.block_weights(tiny_config) == 2 * (2 * 512 + 2 * 256 + 3 * 384)
    assert cost.head_weights(tiny_config) == 640
    assert cost.weight_bytes(tiny_config, "float32") == 4 * (5376 + 640)
    assert cost.kv_token_bytes(tiny_config, "bfloat16") == 2 * 2 * 2 * 8 * 2


def test_llama_2_7b_has_the_numbers_that_are_published():
    config = SHAPES["7b"]()
    assert cost.block_weights(config) + cost.head_weights(config) == 6_607_077_376
    assert cost.kv_token_bytes(config, "bfloat16") == 512 * 1024


def test_a_token_reads_itself_and_all_before_it(tiny_config):
    one = 4 * 2 * 4 * 8  # four operations a layer, a query head and a number of a head
    assert cost.attention_flops(tiny_config, 0, 3) == one * (1 + 2 + 3)
    assert cost.attention_flops(tiny_config, 10, 2) == one * (11 + 12)


def counted(config, tree, rows):
    """Reading and writing token by token: every beginning of a prompt is one token to read, however many share it."""
    beginnings = {prompt[:end] for prompt, _ in tree.rows for end in range(1, len(prompt))}
    attention = 4 * config.L * config.N * config.H
    blocks, head = cost.block_weights(config), cost.head_weights(config)
    reading = sum(2 * blocks + attention * len(beginning) for beginning in beginnings)
    writing = sum(
        2 * (blocks + head) + attention * (len(prompt) + step) for prompt, limit in tree.rows for step in range(limit)
    )
    # A row reads what it has written; what rows share is read once for the longest of them.
    kept = sum(step + 1 for _, limit in tree.rows for step in range(limit))
    steps = max(-(-tree.tokens // rows), max(limit for _, limit in tree.rows))
    common = {prompt[:1] for prompt, _ in tree.rows}
    for beginning in beginnings:
        below = [limit for prompt, limit in tree.rows if prompt[: len(beginning)] == beginning]
        whole = len(below) == len(tree.rows) and len(common) == 1 and len(tree.prompts) > 1
        kept += steps if whole else max(below)
    return len(beginnings), reading, writing, steps, kept


@pytest.mark.parametrize("make", [answering, judging])
def test_reading_and_writing_are_those_counted_token_by_token(tiny_config, make):
    tree = make(SMALL, 10_000)  # so many ids that no two prompts begin alike by chance
    tokens, reading, writing, steps, kept = counted(tiny_config, tree, SMALL.rows)
    read, written = cost.reading(tiny_config, tree, "float32"), cost.writing(tiny_config, tree, 4, "float32")
    weights, kv = cost.weight_bytes(tiny_config, "float32"), cost.kv_token_bytes(tiny_config, "float32")
    assert (read.tokens, read.flops, read.memory_bytes) == (tokens, reading, weights + tokens * kv)
    assert (written.tokens, written.flops) == (tree.tokens, writing)
    assert written.memory_bytes == steps * weights + kept * kv


def test_training_is_three_forward_passes_and_the_optimizers_traffic(tiny_config):
    documents = cost.of_rows([Row((5, 6, 7, 2), 2), Row((5, 8, 2), 1)])
    once = cost.forward(tiny_config, documents, "float32")
    assert once.flops == 2 * (5 * 5376 + 4 * 640) + 4 * 2 * 4 * 8 * (6 + 3)
    train = cost.training(tiny_config, documents, 2, "float32")
    assert (train.tokens, train.flops) == (5, 3 * once.flops)
    assert train.memory_bytes == 2 * (2 * once.memory_bytes + 7 * 4 * tiny_config.parameters)


def test_a_pair_is_two_documents_that_share_a_prompt_and_whose_last_tokens_are_only_targets():
    found = cost.of_pairs([Pair((5, 6, 7), (8, 2), (9, 9, 2))])
    assert found == cost.Documents(tokens=4 + 5, spans=((0, 2), (2, 2), (2, 3)), predicted=5)


def test_time_is_that_of_the_scarcer_resource():
    need = cost.Need(tokens=1, flops=100.0, memory_bytes=30.0)
    assert need.seconds(10.0, 10.0) == 10.0
    assert need.seconds(100.0, 10.0) == 3.0


def test_where_nothing_is_shared_everything_is_read(tiny_config):
    tree = judging(SMALL, 10_000)
    alone = tree.unshared()
    assert isinstance(alone, Tree) and alone.tokens == tree.tokens
    assert cost.reading(tiny_config, alone, "float32").tokens == sum(len(prompt) - 1 for prompt, _ in tree.rows)
