"""Rows out of every kind of file: the same rows give the same tokens, and what cannot be read is refused by line."""

import csv
import gzip
import json
from pathlib import Path

import pytest
from samples import tokenizer, write_jsonl
from trialign.algorithms.config.conditional import RewardedData
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.preference import LabelData, PairData
from trialign.algorithms.config.pretrain import TextData
from trialign.algorithms.config.sft import SFTData
from trialign.algorithms.data.arrow import restorer
from trialign.algorithms.data.conditional import read_rewarded
from trialign.algorithms.data.dialogues import DialogueDataset, joined
from trialign.algorithms.data.documents import TextStream
from trialign.algorithms.data.preferences import LabeledStream, PairStream
from trialign.algorithms.data.prompts import PromptDataset
from trialign.algorithms.data.sources import read_rows

datasets = pytest.importorskip("datasets")
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

END = (1,)  # <eos> of the word tokenizer
AS_JSON = (  # a template that writes all there is, as Hermes' does
    "{% if tools %}<system> {{ tools | tojson }} {% endif %}{% for m in messages %}<{{ m.role }}> {{ m.content }}"
    "{% for c in m.tool_calls or [] %} {{ c | tojson }}{% endfor %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


@pytest.fixture
def characters(tiny, monkeypatch):
    """A tokenizer that loses no character, with the template above."""
    monkeypatch.setattr(tiny, "chat_template", AS_JSON)
    return tiny


def call(name: str, **arguments: object) -> dict:
    function = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [function]}


def tool(name: str, **properties: object) -> dict:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": properties}}}


def asked(*turns: dict) -> list[dict]:
    return [{"role": "user", "content": "go"}, *turns]


SUNNY, TEXT = {"role": "tool", "content": "fine"}, {"type": "string"}
CALLS = [
    {
        "messages": asked(call("weather", city="Rome"), SUNNY, {"role": "assistant", "content": "sunny"}),
        "tools": [tool("weather", city=TEXT)],
    },
    {
        "messages": asked(call("add", a=2, deep={"rows": [{"x": 1}, {"y": {"z": [2]}}]}), SUNNY, call("stop")),
        "tools": [tool("add", a={"type": "integer"}, b={"anyOf": [TEXT, {"enum": ["p", "q"]}]}), tool("stop")],
    },
    {"messages": asked({"role": "assistant", "content": "no tools"}), "tools": None},
]


def every_form(folder: Path, rows: list[dict]) -> dict[str, str]:
    """The rows in every kind of file there is."""
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(folder / "rows.parquet")
    table.save_to_disk(folder / "saved")
    turned = datasets.concatenate_datasets([table.select([i]) for i in reversed(range(len(rows)))])
    turned.select(range(len(rows) - 1, -1, -1)).save_to_disk(folder / "chosen")  # in another order than its tables
    (folder / "parts").mkdir()
    table.select(range(1)).to_parquet(folder / "parts" / "0.parquet")
    table.select(range(1, len(rows))).to_parquet(folder / "parts" / "1.parquet")
    (folder / "lines").mkdir()
    write_jsonl(folder / "lines" / "train.jsonl", rows)
    write_jsonl(folder / "lines" / "test.jsonl", rows[:1])
    (folder / "list.json").write_text(json.dumps(rows, indent=1))
    write_jsonl(folder / "lines.json", rows)
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress(write_jsonl(folder / "a.jsonl", rows).read_bytes()))
    (folder / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + (folder / "a.jsonl").read_bytes().replace(b"\n", b"\r\n"))
    names = ("a.jsonl", "rows.parquet", "saved", "chosen", "parts", "lines:train", "list.json", "lines.json")
    return {name: str(folder / name) for name in (*names, "packed.jsonl.gz", "marked.jsonl")}


def learned(source: str, characters) -> list[tuple]:
    """(text, mask) of the dialogues, prompts, pairs and labeled responses in rows of dialogues."""
    whole = joined(DialogueDataset(SFTData(sources=(source,)), characters, (2,)).rows())
    prompts = PromptDataset(PromptData(sources=(source,), prompt_key="asked"), characters)
    pairs = PairData(sources=(source,), chosen_key="messages", rejected_key="other")
    labels = LabelData(sources=(source,), response_key="messages")
    found = [(s.tokens, s.mask) for s in whole]
    found += [(p.tokens, None) for p in sorted(prompts.next(prompts.rows), key=lambda prompt: prompt.source)]
    found += [(s.tokens, s.mask) for pair in PairStream(pairs, characters, (2,)).rows() for s in pair[:2]]
    found += [(row.sample.tokens, row.sample.mask) for row in LabeledStream(labels, characters, (2,)).rows()]
    return [(characters.decode(tokens), mask) for tokens, mask in found]


def test_every_file_format_gives_the_same_tokens(characters, tmp_path):
    rows = [
        row
        | {"other": [*row["messages"][:-1], {"role": "assistant", "content": "no"}], "label": i == 0}
        | {"asked": [*row["messages"], {"role": "user", "content": "so?"}]}
        for i, row in enumerate(CALLS)
    ]
    forms = every_form(tmp_path, rows)
    expected = learned(forms.pop("a.jsonl"), characters)
    assert '{"city": "Rome"}' in expected[0][0] and "null" not in str(expected) and len(expected) == 15
    for name, source in forms.items():
        assert learned(source, characters) == expected, name


def test_nulls_of_json_text_are_kept(characters, tmp_path):
    schema = [tool("add", a={"type": "integer", "default": None})]
    written = {"messages": asked(call("add", a=None, b=[None, {"c": None}])), "tools": schema}
    as_text = [{"messages": CALLS[0]["messages"], "tools": json.dumps(schema)}, {**CALLS[0], "tools": "[]"}]
    sources = [write_jsonl(tmp_path / "a.jsonl", [written]), tmp_path / "b.parquet"]
    datasets.Dataset.from_list(as_text).to_parquet(sources[1])
    line, parquet = (
        characters.decode(next(DialogueDataset(SFTData(sources=(str(source),)), characters, (2,)).rows())[0].tokens)
        for source in sources
    )
    assert '"arguments": {"a": null, "b": [null, {"c": null}]}' in line
    assert all('"default": null' in text for text in (line, parquet)) and '{"city": "Rome"}' in parquet


STRUCT = pa.struct({"x": pa.int64(), "y": pa.struct({"z": pa.string()})})
ODD = {
    "a list of structs": (pa.list_(STRUCT), [{"x": 1}, {"y": {}}, None, {}], [{"x": 1}, {"y": {}}, None, {}]),
    "a large list": (pa.large_list(pa.list_(STRUCT)), [[{"x": 1}], []], [[{"x": 1}], []]),
    "a list of one length": (pa.list_(STRUCT, 2), [{"x": 1}, {}], [{"x": 1}, {}]),
    "a dictionary": (pa.dictionary(pa.int8(), pa.string()), "a", "a"),
    "a map": (pa.map_(pa.string(), STRUCT), [("a", None), ("b", {"x": 1})], {"a": None, "b": {"x": 1}}),
    "JSON": (pa.json_(), '{"a": null, "b": [1]}', {"a": None, "b": [1]}),
}


@pytest.mark.parametrize("case", ODD)
def test_arrow_struct_nulls_are_removed(case, tmp_path):
    kind, value, expected = ODD[case]
    array = pa.array([value, None], pa.string()).cast(kind) if case == "JSON" else pa.array([value, None], kind)
    (given, none), restore = array.to_pylist(), restorer(kind)
    assert (given if restore is None else restore(given)) == expected and none is None
    pq.write_table(pa.table({"column": array}), tmp_path / "a.parquet")
    assert [row for _, row in read_rows(str(tmp_path / "a.parquet"))] == [{"column": expected}, {"column": None}]


def test_folder_splits_and_mixed_formats(tmp_path):
    for name, rows in (("train-0.jsonl", ["a"]), ("train-1.jsonl", ["b"]), ("test-0.jsonl", ["c"])):
        write_jsonl(tmp_path / name, [{"prompt": row} for row in rows])
    assert [(where, row["prompt"]) for where, row in read_rows(f"{tmp_path}:train")] == [
        (f"{tmp_path}/train-0.jsonl:1", "a"),
        (f"{tmp_path}/train-1.jsonl:1", "b"),
    ]
    with pytest.raises(ValueError, match=rf"{tmp_path}: has splits, name one: {tmp_path}:train, {tmp_path}:test"):
        list(read_rows(str(tmp_path)))
    pq.write_table(pa.table({"prompt": ["d"]}), tmp_path / "train-2.parquet")
    with pytest.raises(ValueError, match=r"holds .jsonl and .parquet files"):
        list(read_rows(f"{tmp_path}:train"))


def test_csv_columns_are_typed(tmp_path):
    rows = [
        ["prompt", "response", "label", "reward", "id", "note", "count"],
        ['say "hi",\nplease', "42", "true", "0.5", "007", "", "1"],
        ["Capital?", "7", "False", "nan", "8", "null", "-2"],
        ["Ääh?", "3", "true", "", "9", "x", ""],
    ]
    with open(tmp_path / "a.csv", "w", newline="\r\n", encoding="utf-8-sig") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)
    (first, one), (second, two), (_, three) = read_rows(str(tmp_path / "a.csv"), LabelData().keys)
    assert one == dict(zip(rows[0], ['say "hi",\nplease', "42", True, 0.5, "007", None, 1], strict=True))
    assert two["reward"] != two["reward"] and two["note"] == "null" and three["reward"] is None
    assert (two["label"], two["count"], three["prompt"], three["count"]) == (False, -2, "Ääh?", None)
    assert (first, second) == (f"{tmp_path}/a.csv:2", f"{tmp_path}/a.csv:4")
    data = LabeledStream(LabelData(sources=(str(tmp_path / "a.csv"),), append_eos=True), tokenizer(), END)
    assert [row.desirable for row in data.rows()] == [True, False, True]
    (tmp_path / "a.tsv").write_text("text\tn\nhello you\t1\n")
    assert TextStream(TextData(sources=(str(tmp_path / "a.tsv"),)), tokenizer()).documents == 1


HI, YO = {"role": "user", "content": "hello"}, {"role": "assistant", "content": "you"}
BE = {"role": "system", "content": "be kind"}
CHAT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "you"}]
KINDS = {
    "ShareGPT with a system column": ({"conversations": CHAT, "system": "be kind"}, [BE, HI, YO]),
    "ShareGPT as JSON": ({"conversations": json.dumps(CHAT)}, [HI, YO]),
    "its messages under another": ({"messages": CHAT}, [HI, YO]),
    "Alpaca": ({"instruction": "say", "input": "hello", "output": "you"}, [{**HI, "content": "say\nhello"}, YO]),
    "Alpaca with all": (
        {"instruction": "hello", "output": "you", "system": "be kind", "history": [["hello", "you"]]},
        [BE, HI, YO, HI, YO],
    ),
}


@pytest.mark.parametrize("case", KINDS)
def test_sharegpt_and_alpaca_equal_messages(case, tmp_path):
    row, chat = KINDS[case]
    words = tokenizer()
    source = str(write_jsonl(tmp_path / "a.jsonl", [{**row, "label": True, "chosen": "a", "rejected": "b"}] * 2))
    sources = source, str(write_jsonl(tmp_path / "b.jsonl", [{"messages": chat}] * 2))
    configs = (SFTData(sources=(path,), append_eos=True) for path in sources)
    actual, expected = (joined(DialogueDataset(config, words, END).rows()) for config in configs)
    assert [(s.tokens, s.mask) for s in actual] == [(s.tokens, s.mask) for s in expected]
    if "messages" in row:  # it has no prompt
        return
    (prompt,) = PromptDataset(PromptData(sources=(source,)), words).next(1)
    before_path = str(write_jsonl(tmp_path / "c.jsonl", [{"prompt": chat[:-1]}]))
    (before,) = PromptDataset(PromptData(sources=(before_path,)), words).next(1)
    assert prompt.tokens == before.tokens and row.keys() <= prompt.fields.keys()
    (rewarded, _) = read_rewarded(source, RewardedData(sources=(source,)), False)
    assert rewarded.dialogue.messages == chat and rewarded.dialogue.learned == [len(chat) - 1]


def test_sharegpt_preferences_and_tool_calls(tmp_path):
    words = tokenizer()
    pair = {"conversations": CHAT[:1], "chosen": CHAT[1] | {"value": "a"}, "rejected": CHAT[1] | {"value": "b"}}
    plain = {"prompt": "hello", "chosen": "a", "rejected": "b"}
    paths = [str(write_jsonl(tmp_path / f"{i}.jsonl", [row])) for i, row in enumerate((pair, plain))]
    configs = (PairData(sources=(path,), append_eos=True) for path in paths)
    actual, expected = (PairStream(config, words, END).next(1)[0] for config in configs)
    assert actual.chosen.tokens == expected.chosen.tokens and actual.rejected.tokens == expected.rejected.tokens
    calls = [CHAT[0], {"from": "function_call", "value": '{"name": "add", "arguments": {"a": null}}'}]
    row = {"conversations": [*calls, {"from": "observation", "value": "5"}, CHAT[1]]}
    ((_, read),) = read_rows(str(write_jsonl(tmp_path / "b.jsonl", [row])), SFTData().keys)
    assert read["messages"][1:3] == [call("add", a=None), {"role": "tool", "content": "5"}]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": ["gpt"], "value": "a"}]}, r"from=\['gpt'\]: must be one of system, human"),
        ({"conversations": "[hi"}, "'conversations' must be a list of messages, or one as JSON"),
        ({"conversations": {}}, "'conversations' must be a list of {from, value} messages"),
        ({"conversations": [{"from": "function_call", "value": "add"}]}, "a function_call that is not valid JSON"),
        ({"instruction": "a", "history": [["b", "c", "d"], ["e"]]}, "'history' a list of .* pairs"),
    ],
)
def test_malformed_sharegpt_and_alpaca_rows_are_refused(row, message, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hi", "response": "ho"}, row])
    with pytest.raises(ValueError, match=f"a.jsonl:2: .*{message}"):
        list(read_rows(str(path), SFTData().keys))


DEEP, NINES = "[" * 100_000 + "]" * 100_000, "9" * 5000
REFUSED = {
    "deep.jsonl": ('{"a": 1}\n{"n": ' + DEEP + "}\n", ":2: nested more than 100 lists or objects deep"),
    "huge.jsonl": ('{"n": ' + NINES + "}\n", ":1: .*a whole number of more than 4300 digits"),
    "open.json": ('[{"a": 1},\n', r":2 \(line 2\): not valid JSON"),
    "no_comma.json": ('[{"a": 1} {"a": 2}]', ":1: not valid JSON: no , or ] after the row, at line 1"),
    "after.json": ('[{"a": 1}]\n]', ": not valid JSON: text after the list, at line 1"),
    "lists.jsonl": ('["hi"]\n', ":1: must be an object such as {...}, not list"),
    "words.json": ("{oops}", ":1: .*a .json file must hold a list of objects, or an object a line"),
    "half.jsonl": ('{"a": "\\ud83d"}\n', ":1: 'a' holds .*half of a surrogate pair"),
    "twice.csv": ("a,a\n1,2\n", ":1: the column names must differ and not be empty"),
    "ragged.csv": ("a,b\n1,2\n3\n", ":3: 1 cells for 2 columns"),
    "quotes.csv": ('a,b\n1,"2\n', ":2: not valid CSV: unexpected end of data"),
    "rows.xlsx": ("", r"rows.xlsx: must be .jsonl, .json, .csv, .tsv, .parquet, .txt, .md"),
    "rows.parquet": ("no", "rows.parquet: not a parquet file"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_unreadable_files_are_refused(name, tmp_path):
    text, message = REFUSED[name]
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        list(read_rows(str(tmp_path / name)))
    assert str(tmp_path / name) in str(error.value)
