"""Exports in every form give the same trees, and what is wrong with one is told with its place."""

import copy
import dataclasses
import gzip
import json
import random
import sys

import pytest

from srlm_jax.data.oasst import messages, read_export, survey
from srlm_jax.data.trees import SeedRules, split_seed
from srlm_jax.errors import MissingExtra
from srlm_jax.storage.jsonl import BadRecord

RULES = SeedRules(lang="en", min_ranked=2, ift_prompts=0, eft_train_prompts=0, eft_eval_prompts=0)


def reply(name, rank, *replies, **change):
    message = {"message_id": name, "text": f"text {name}", "role": "assistant", "lang": "en", "deleted": False}
    return message | ({} if rank is None else {"rank": rank}) | {"replies": list(replies)} | change


def ask(name, *replies, **change):
    message = {"message_id": name, "text": f"question {name}", "role": "prompter", "lang": "en", "deleted": False}
    return message | {"replies": list(replies)} | change


def tree(name, *replies, **change):
    return {"message_tree_id": name, "prompt": ask(name, *replies, **change)}


def ranked_trees(n):
    return [tree(f"t{i}", reply(f"t{i}a", 0), reply(f"t{i}b", 1), reply(f"t{i}c", 2)) for i in range(n)]


def message(name, parent, **change):
    """A flat message with all its columns, as the Parquet files have them."""
    role = "prompter" if parent is None or name.startswith("q") else "assistant"
    row = {"message_id": name, "parent_id": parent, "text": f"text {name}", "role": role, "lang": "en"}
    return row | {"deleted": False, "rank": None, "labels": None, "emojis": {"name": ["+1"], "count": [1]}} | change


def write(path, documents):
    path.write_text("".join(json.dumps(one) + "\n" for one in documents))
    return path


def read_rows(tmp_path, *documents):
    return read_export(write(tmp_path / "x.jsonl", documents))


# --- real exports -----------------------------------------------------------------------------------------------------


def test_flat_messages_of_open_assistant(shared_data):
    """With the 40 deleted rows kept there would be 1,026 pairs over 418 prompts."""
    export = read_export(shared_data("oasst/oasst1_en-validation.jsonl"))
    assert export.counts == {
        "messages": 1_936,  # of 2,022 rows
        "no_parent": 3,
        "deleted": 40,
        "rejected": 43,
        "roots": 188,
        "ranked_prompts": 416,
        "ordered_pairs": 1_022,
        "first_turn_ranked_prompts": 186,
        "first_turn_ordered_pairs": 531,
        "unranked_answer": 55,
    }
    rules = SeedRules(lang="en", min_ranked=2, ift_prompts=186, eft_train_prompts=0, eft_eval_prompts=0)
    result = split_seed(export.trees, rules, 0)
    assert len(result.ift) == 186
    assert (result.counts["deleted_reply"], result.counts["rejected_reply"]) == (10, 15)


def test_nested_trees_of_open_assistant(shared_data):
    assert read_export(shared_data("oasst/en_100_tree.jsonl")).counts == {
        "messages": 1_150,  # of 1,167
        "synthetic": 17,
        "roots": 100,
        "ranked_prompts": 207,
        "ordered_pairs": 732,
        "first_turn_ranked_prompts": 94,
        "first_turn_ordered_pairs": 416,
        "unranked_answer": 46,
    }


def test_flat_and_nested_give_the_same_seed_data(shared_data, tmp_path):
    nested = read_export(shared_data("oasst/en_100_tree.jsonl"))
    flattened = list(messages(nested.trees))
    random.Random(0).shuffle(flattened)
    flat = read_rows(tmp_path, *flattened)
    assert flat.counts == nested.counts
    rules = SeedRules(lang="en", min_ranked=2, ift_prompts=50, eft_train_prompts=30, eft_eval_prompts=14)
    assert split_seed(flat.trees, rules, 0) == split_seed(nested.trees, rules, 0)


def test_parquet_gives_what_json_lines_do(shared_data, tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `data`")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = shared_data("oasst/oasst1_en-validation.jsonl")
    documents = [json.loads(line) for line in source.read_text().splitlines()]
    path = tmp_path / "validation.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(documents), path)
    assert read_export(path) == read_export(source)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BadRecord, match=r"validation\.parquet: damaged Parquet after row 0"):
        read_export(path)


def test_a_wrong_row_of_parquet_is_numbered(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="needs the extra `data`")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([message("q", None), message("a", "q", role=None)])
    parquet.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(BadRecord, match=r"x\.parquet: row 2: field 'role': expected 'prompter' or"):
        read_export(tmp_path / "x.parquet")


def test_parquet_without_its_package_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "x").write_bytes(b"PAR1")
    with pytest.raises(MissingExtra, match=r"x is Parquet, which needs pyarrow: .*srlm_jax\[data\]"):
        read_export(tmp_path / "x")


# --- flat messages ----------------------------------------------------------------------------------------------------


def test_messages_are_linked_in_any_order(tmp_path):
    shuffled = [message("b", "q", rank=1), message("q2", "a"), message("a", "q", rank=0), message("q", None)]
    (linked,) = read_rows(tmp_path, *shuffled).trees
    assert linked["message_tree_id"] == "q"
    first, second = linked["prompt"]["replies"]
    assert [(r["message_id"], r["rank"]) for r in (first, second)] == [("b", 1), ("a", 0)]
    assert [r["message_id"] for r in second["replies"]] == ["q2"]
    assert "labels" not in first


def test_what_hangs_below_a_missing_or_deleted_message_counts_for_nothing(tmp_path):
    export = read_rows(
        tmp_path,
        message("q", None),
        message("a", "q", rank=0, deleted=True),
        message("q2", "a"),
        message("b", "q2", rank=0),
        message("c", "q2", rank=1),
        message("d", "q", rank=1),
        message("e", "nowhere", rank=0),
        message("q3", "e"),
    )
    assert export.counts == {
        "messages": 2, "roots": 1, "deleted": 1, "below_withdrawn": 3, "no_parent": 1, "below_no_parent": 1,
    }  # fmt: skip


def test_keys_that_are_unset_may_be_absent_or_null(tmp_path):
    absent = [
        {"message_id": "q", "text": "?", "role": "prompter"},
        {"message_id": "a", "parent_id": "q", "text": "!", "role": "assistant", "rank": 0},
    ]
    null = [dict.fromkeys(message("", None)) | row for row in absent]
    assert read_rows(tmp_path, *absent).counts == read_rows(tmp_path, *null).counts == {"messages": 2, "roots": 1}


def test_a_circle_names_a_message_on_it(tmp_path):
    circle = [message("q", None), message("x", "q2"), message("q2", "a"), message("a", "q2")]
    with pytest.raises(BadRecord, match=r"x\.jsonl:3: message 'q2' is its own ancestor: .*'a'"):
        read_rows(tmp_path, *circle)
    with pytest.raises(BadRecord, match=r"x\.jsonl:1: message 'q1' is its own ancestor"):
        read_rows(tmp_path, message("q1", "q1"))


@pytest.mark.parametrize("names", [("q", "a", "a", "b"), ("a", "b", "q", "q")])
def test_of_messages_with_one_id_the_first_counts(tmp_path, names):
    rows = [message(name, None if name == "q" else "q", text=str(i)) for i, name in enumerate(names)]
    export = read_rows(tmp_path, *rows)
    trees = {"repeated_tree": 1} if names.count("q") == 2 else {}
    assert export.counts == {"messages": 3, "roots": 1, "unranked_answer": 2, "repeated": 1} | trees
    texts = {m["message_id"]: m["text"] for m in messages(export.trees)}
    assert texts == {name: str(names.index(name)) for name in names}


def without(name):
    row = message("a", "q")
    del row[name]
    return row


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        (without("message_id"), "field 'message_id': missing"),
        (without("text"), "field 'text': missing"),
        (without("role"), "field 'role': missing"),
        (message("a", ["q"]), r"field 'parent_id': expected str, found \['q'\]"),
        (message(" ", "q"), "field 'message_id': missing"),
        (message("a", "q", rank="best"), "field 'rank': expected int, found 'best'"),
        (message("a", "q", rank=0.5), "field 'rank': expected int, found 0.5"),
        (message("a", "q", synthetic="?"), "field 'synthetic': expected bool, found '?'"),
        (message("a", "q", replies="[]"), r"field 'replies': expected list, found '\[\]'"),
        (message("a", "q", replies=["b"]), r"field 'replies\[0\]': expected an object, found 'b'"),
        (message("a", "q", replies=[message("b", "a")]), r"field 'replies\[0\].role': expected 'prompter', .* found"),
        (message("a", "q", rank=-1), "field 'rank': expected 0 or more, found -1"),
        (message("a", "q", deleted="no"), "field 'deleted': expected bool"),
        (message("a", "q", role="system"), "field 'role': expected 'prompter' or 'assistant', found 'system'"),
        (message("a", "q", role="prompter"), "field 'role': expected 'assistant', .* found 'prompter'"),
        (message("a", None, role="assistant"), "field 'role': expected 'prompter', .* found 'assistant'"),
        (message("a", "q", text="\ud83d"), "field 'text': not text that UTF-8 can hold"),
        (["a"], r"expected an object, found \['a'\]"),
    ],
)
def test_a_wrong_message_is_named(tmp_path, row, problem):
    with pytest.raises(BadRecord, match=rf"x\.jsonl:2: {problem}"):
        read_rows(tmp_path, message("q", None), row)


def test_all_wrong_rows_are_counted(tmp_path):
    wrong = [message("a", "q", rank="best"), message("b", "q"), message("c", "q", text=3)]
    with pytest.raises(BadRecord, match=r"x\.jsonl:2: field 'rank': .*; 2 of 4 rows are wrong, this is the first"):
        read_rows(tmp_path, message("q", None), *wrong)
    roles = [message("q", None), message("a", "q", role="prompter"), message("b", "q", role="prompter")]
    with pytest.raises(BadRecord, match=r"x\.jsonl:2: field 'role': .*; 2 of 3 messages are wrong, this is the first"):
        read_rows(tmp_path, *roles)


def test_columns_that_are_no_export_are_named(tmp_path):
    problem = r"x\.jsonl:1: neither a message tree .* nor a message .*, but instruction, output; give an Open Assistant"
    with pytest.raises(BadRecord, match=problem):
        read_rows(tmp_path, {"instruction": "q", "output": "r"})


def test_withdrawn_messages_stay_in_their_tree_with_their_mark(tmp_path):
    export = read_rows(
        tmp_path,
        message("q", None, synthetic=True),  # a model's prompt, answered and ranked by humans
        message("a", "q", rank=0, synthetic=True),
        message("b", "q", rank=1, review_result=False),
        message("q2", "b"),
        message("c", "q", rank=2, review_result=True, synthetic=False),
        message("d", "q", rank=3, review_result=None, synthetic=None),
        message("e", "q", rank=4, deleted=True, synthetic=True),
    )
    assert export.counts == {
        "messages": 3, "roots": 1, "synthetic": 1, "rejected": 1, "deleted": 1, "below_withdrawn": 1,
        "ranked_prompts": 1, "ordered_pairs": 1, "first_turn_ranked_prompts": 1, "first_turn_ordered_pairs": 1,
    }  # fmt: skip
    rules = dataclasses.replace(RULES, eft_eval_prompts=1)
    split = split_seed(export.trees, rules, 0)
    assert sorted(split.eft_eval[0].responses) == ["text c", "text d"]
    assert {name: count for name, count in split.counts.items() if name.endswith("_reply")} == {
        "deleted_reply": 1, "rejected_reply": 1, "synthetic_reply": 1,
    }  # fmt: skip


# --- numbers and marks as pandas and CSV write them -------------------------------------------------------------------


def test_numbers_of_pandas_and_texts_of_csv_are_read(tmp_path):
    """Ranks as 0.0 and NaN, ids as numbers, marks as text."""
    plain = read_rows(
        tmp_path,
        message("1", None),
        message("2", "1", rank=0),
        message("3", "1", rank=1, deleted=True),
        message("4", "1"),
    )
    nan = float("nan")
    floats = [
        message("1", None) | {"message_id": 1, "parent_id": nan, "rank": nan},
        message("2", "1") | {"message_id": 2.0, "parent_id": 1.0, "rank": 0.0},
        message("3", "1") | {"message_id": 3.0, "parent_id": 1, "rank": 1.0, "deleted": 1.0},
        message("4", "1") | {"message_id": 4, "parent_id": 1.0, "rank": nan, "deleted": nan},
    ]
    plain.trees[0]["prompt"]["replies"][2]["deleted"] = None
    assert read_rows(tmp_path, *floats) == plain
    plain.trees[0]["prompt"]["replies"][2]["deleted"] = False
    path = tmp_path / "x.csv"
    path.write_text(
        "message_id,parent_id,text,role,lang,deleted,rank\n"
        "1,,text 1,prompter,en,False,\n"
        "2,1,text 2,assistant,en,False,0.0\n"
        "3,1,text 3,assistant,en,True,1.0\n"
        "4,1,text 4,assistant,en,False,\n"
    )
    assert read_export(path) == plain


def test_pandas_writes_what_is_read(tmp_path):
    pandas = pytest.importorskip("pandas")
    pytest.importorskip("pyarrow", reason="needs the extra `data`")
    rows = [message("q", None), message("a", "q", rank=0), message("b", "q", rank=1)]
    expected = read_rows(tmp_path, *rows)
    frame = pandas.DataFrame(rows).drop(columns=["labels", "emojis"])
    frame.to_parquet(tmp_path / "x.parquet")
    frame.to_csv(tmp_path / "x.csv")
    frame.to_json(tmp_path / "x.json", orient="records")
    for name in ("x.parquet", "x.csv", "x.json"):
        assert read_export(tmp_path / name) == expected, name


def test_a_blank_text_is_dropped_by_the_split(tmp_path):
    export = read_rows(tmp_path, message("q", None), *(message(n, "q", rank=i) for i, n in enumerate("abc")))
    export.trees[0]["prompt"]["replies"][1]["text"] = ""
    null = read_rows(
        tmp_path,
        message("q", None),
        message("a", "q", rank=0),
        message("b", "q", rank=1, text=None),
        message("c", "q", rank=2),
    )
    assert null == export
    assert split_seed(null.trees, dataclasses.replace(RULES, eft_eval_prompts=1), 0).counts["empty_reply"] == 1


# --- nested trees -----------------------------------------------------------------------------------------------------


def test_trees_are_told_by_their_content_plain_or_packed(tmp_path):
    trees = ranked_trees(3)
    plain = write(tmp_path / "plain.gz", trees)
    assert read_export(plain).trees == trees
    packed = tmp_path / "packed.jsonl"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_export(packed).trees == trees


def test_every_turn_is_surveyed(tmp_path):
    later = ask("q", reply("c", 0), reply("d", 2), reply("e", 2), reply("f", None))
    trees = [tree("t", reply("a", 0, later), reply("b", 1))]
    assert (
        survey(trees)
        == read_rows(tmp_path, *trees).counts
        == {
            "messages": 8,
            "roots": 1,
            "ranked_prompts": 2,
            "ordered_pairs": 3,  # d and e are level
            "first_turn_ranked_prompts": 1,
            "first_turn_ordered_pairs": 1,
            "unranked_answer": 1,
        }
    )


def test_trees_that_are_repeated_count_once(tmp_path):
    """551 rows, of them 31 trees that came before."""
    trees = ranked_trees(520)
    later = [*trees[:30], tree("t30", reply("t30a", 0), reply("new", 3))]
    export = read_rows(tmp_path, *trees, *later)
    assert len(export.trees) == 520
    assert (export.counts["repeated_tree"], export.counts["repeated"]) == (31, 30 * 4 + 2)
    assert export.trees[:30] == trees[:30]
    assert [r["message_id"] for r in export.trees[30]["prompt"]["replies"]] == ["t30a", "t30b", "t30c", "new"]


def test_two_trees_of_one_id_count_once(tmp_path):
    other = tree("t0", reply("x", 0)) | {"prompt": ask("another", reply("x", 0))}
    export = read_rows(tmp_path, *ranked_trees(1), other)
    assert export.trees == ranked_trees(1)
    assert (export.counts["repeated_tree"], export.counts["repeated"]) == (1, 2)


def test_a_message_of_another_tree_is_left_out(tmp_path):
    export = read_rows(tmp_path, tree("s", reply("a", 0)), tree("t", reply("b", 0, ask("q", reply("a", 0)))))
    assert export.counts["repeated"] == 1 and "repeated_tree" not in export.counts
    assert [m["message_id"] for m in messages(export.trees)] == ["s", "a", "t", "b", "q"]


def test_root_messages_that_carry_their_tree_are_trees(tmp_path):
    """Rows that look flat, with a tree each in `replies`."""
    trees = ranked_trees(3)
    trees[1]["prompt"]["replies"][0]["replies"] = [ask("later", reply("deep", 0))]
    roots = [one["prompt"] | {"parent_id": None} for one in trees]
    export = read_rows(tmp_path, *roots)
    assert export == read_export(write(tmp_path / "nested", trees))
    assert export.counts["messages"] == 3 * 4 + 2
    named = read_rows(tmp_path, *(root | {"message_tree_id": root["message_id"], "parent_id": ""} for root in roots))
    assert named == export
    every = [m | {"replies": []} for m in messages(trees)]  # each message as a row, and below its root as well
    assert read_rows(tmp_path, *roots, *every).trees == export.trees


def set_in(path, value):
    def change(document):
        for key in path[:-1]:
            document = document[key]
        if value is None:
            del document[path[-1]]
        else:
            document[path[-1]] = value

    return change


REPLY = r"field 'prompt.replies\[1\]"


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_in(["message_tree_id"], None), "field 'message_tree_id': missing"),
        (set_in(["message_tree_id"], ["t"]), r"field 'message_tree_id': expected str, found \['t'\]"),
        (set_in(["prompt"], None), "field 'prompt': expected an object, found None"),
        (set_in(["prompt"], "hello"), "field 'prompt': expected an object, found 'hello'"),
        (set_in(["prompt", "text"], None), "field 'prompt.text': missing"),
        (set_in(["prompt", "role"], "assistant"), "field 'prompt.role': expected 'prompter', .* found 'assistant'"),
        (set_in(["prompt", "deleted"], "no"), "field 'prompt.deleted': expected bool"),
        (set_in(["prompt", "replies"], {}), "field 'prompt.replies': expected list"),
        (set_in(["prompt", "replies", 1], "x"), f"{REPLY}': expected an object"),
        (set_in(["prompt", "replies", 1, "rank"], "x"), rf"{REPLY}.rank': expected int, found 'x'"),
        (set_in(["prompt", "replies", 1, "rank"], True), rf"{REPLY}.rank': expected int"),
        (set_in(["prompt", "replies", 1, "rank"], -1), rf"{REPLY}.rank': expected 0 or more"),
        (set_in(["prompt", "replies", 1, "message_id"], None), rf"{REPLY}.message_id': missing"),
        (set_in(["prompt", "replies", 1, "role"], "prompter"), rf"{REPLY}.role': .*'assistant'"),
        (set_in(["prompt", "replies", 1, "replies"], [{}]), rf"{REPLY}.replies\[0\].message_id': missing"),
    ],
)
def test_a_wrong_tree_is_named(tmp_path, change, problem):
    good, bad = ranked_trees(2)
    change(bad)
    with pytest.raises(BadRecord, match=rf"x\.jsonl:2: {problem}"):
        read_rows(tmp_path, good, bad)


def test_keys_of_a_tree_that_are_unset_may_be_absent_or_null(tmp_path):
    (one,) = ranked_trees(1)
    for node in (one["prompt"], *one["prompt"]["replies"]):
        del node["deleted"]
    one["prompt"]["replies"][0]["replies"] = None
    one["prompt"]["replies"][1]["rank"] = None
    one["prompt"]["replies"][2]["lang"] = None
    rules = SeedRules(lang="en", min_ranked=2, ift_prompts=0, eft_train_prompts=0, eft_eval_prompts=1)
    (ranked,) = split_seed(copy.deepcopy(read_rows(tmp_path, one).trees), rules, 0).eft_eval
    assert sorted(ranked.responses) == ["text t0a", "text t0c"]


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "problem"),
    [
        (lambda whole: whole[:-20], r"x:2: not valid JSON"),
        (lambda whole: whole + b"{not json}\n", r"x:3: not valid JSON"),
        (lambda whole: whole.replace(b"question t1", b"question \xff"), r"x:2: not UTF-8 text"),
        (lambda whole: b"[" + whole, r"x:1 \(item 1\): expected a comma"),
        (lambda whole: b"", r"x: holds no row"),
        (lambda whole: gzip.compress(whole)[:-30], r"x: not a whole gzip file"),
        (lambda whole: gzip.compress(whole)[:10] + b"\0" * 40, r"x: not a whole gzip file"),
        (lambda whole: b'{"instruction": "x"}\n', r"x:1: neither a message tree"),
    ],
)
def test_damage_is_one_error_with_its_place(tmp_path, damage, problem):
    whole = write(tmp_path / "whole", ranked_trees(2)).read_bytes()
    (tmp_path / "x").write_bytes(damage(whole))
    with pytest.raises(BadRecord, match=problem) as raised:
        read_export(tmp_path / "x")
    assert "stage" not in str(raised.value)  # the advice for files of a run does not help here


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_whatever_happens_to_a_file_the_error_names_it(tmp_path, packed):
    rng, path = random.Random(0), write(tmp_path / "x", ranked_trees(3))
    whole = gzip.compress(path.read_bytes()) if packed else path.read_bytes()
    noticed = 0
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.choice([1, 1, 3])):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged[: rng.choice([None, None, rng.randrange(len(damaged))])])
        try:
            read_export(path)
        except BadRecord as error:
            assert str(path) in str(error)
            noticed += 1
    assert noticed > 100
