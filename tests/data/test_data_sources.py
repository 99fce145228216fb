"""What a source may be, read whole or refused: folders, several files, packed ones, CSV cells, Python's objects."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import re

import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
datasets = pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from fastalign.trainers.common.arguments import parse  # noqa: E402
from fastalign.trainers.data.encode import Encoder  # noqa: E402
from fastalign.trainers.data.files import check_sources, read_rows  # noqa: E402
from fastalign.trainers.data.problems import Reading, tally  # noqa: E402
from fastalign.trainers.data.tokenize import tokenize_lists, tokenize_preferences, tokenize_sft  # noqa: E402
from fastalign.trainers.grpo import GRPOConfig  # noqa: E402
from fastalign.trainers.sft import SFTConfig  # noqa: E402

ROWS = [{"prompt": f"p{i}", "completion": f" c{i}"} for i in range(4)]


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder for data, away from the cache; `folder(name, content)` writes a file into it."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def write(name="", content=""):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name:
            path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


def parquet(folder, name, rows):
    pq.write_table(pa.Table.from_pylist(rows), folder(name))


class TestFolders:
    def test_files_of_different_kinds_are_all_read(self, folder):
        folder("a.jsonl", lines(ROWS[:1]))
        parquet(folder, "b.parquet", ROWS[1:2])
        folder("more/c.csv", "prompt,completion\np2, c2\n")
        folder("d.jsonl.gz", gzip.compress(lines(ROWS[3:]).encode()))
        assert sorted(read_rows(folder())["prompt"]) == ["p0", "p1", "p2", "p3"]

    @pytest.mark.parametrize("test", ["helpful_test.jsonl", "helpful-test.parquet", "test/helpful.jsonl"])
    def test_a_file_without_a_split_beside_one_with_is_refused_by_name(self, folder, test):
        folder("helpful.jsonl", lines(ROWS[:2]))
        parquet(folder, test, ROWS[2:]) if test.endswith("parquet") else folder(test, lines(ROWS[2:]))
        with pytest.raises(ValueError, match=r"no file without a split .*; helpful.jsonl name none, or several"):
            read_rows(folder())

    def test_splits_by_names_of_files_and_folders(self, folder):
        folder("train/one.jsonl", lines(ROWS[:1]))
        parquet(folder, "train/two.parquet", ROWS[1:2])
        folder("helpful_dev.jsonl", lines(ROWS[2:3]))
        folder("prefs_x-00000-of-00001.jsonl", lines(ROWS[3:]))
        folder("README.md", "words")
        assert read_rows(folder())["prompt"] == ["p0", "p1"]
        assert read_rows(folder() + ":validation")["prompt"] == ["p2"]
        assert read_rows(folder() + ":prefs_x")["prompt"] == ["p3"]

    def test_a_word_inside_another_is_no_split(self, folder):
        folder("contest.jsonl", lines(ROWS[:1]))
        folder("latest.jsonl", lines(ROWS[1:2]))
        assert read_rows(folder())["prompt"] == ["p0", "p1"]

    def test_different_columns_are_refused_with_the_files_name(self, folder):
        folder("a.jsonl", lines(ROWS[:1]))
        folder("b.jsonl", lines([{"prompt": "q", "reply": "r"}]))
        with pytest.raises(ValueError, match=r"b.jsonl' lacks completion and has reply besides \(beside .*a.jsonl"):
            read_rows(folder())

    def test_cells_of_different_kinds_are_refused_with_the_files_name(self, folder):
        folder("a.jsonl", lines(ROWS[:1]))
        folder("b.jsonl", lines([{"prompt": ["q"], "completion": "r"}]))
        with pytest.raises(ValueError, match=r"b.jsonl' differs from .*a.jsonl"):
            read_rows(folder())

    def test_files_that_are_not_read_are_told(self, folder, capsys):
        folder("a.jsonl", lines(ROWS))
        folder("b.xlsx", "")
        read_rows(folder())
        assert "not read, being of no known kind: b.xlsx" in capsys.readouterr().err


class TestSeveral:
    def test_patterns_commas_and_lists(self, folder):
        first, second = folder("a.jsonl", lines(ROWS[:2])), folder("b.csv", "prompt,completion\np2, c2\np3, c3\n")
        for source in (
            f"{folder()}/*.*",
            f"{first},{second}",
            f"{first}, {second}",
            [first, second],
            f"{folder()}/[ab].*",
        ):
            assert read_rows(source)["prompt"] == ["p0", "p1", "p2", "p3"], source
        with pytest.raises(ValueError, match="none match"):
            read_rows(f"{folder()}/*.parquet")
        with pytest.raises(ValueError, match=r"there is no '.*absent.jsonl'"):
            read_rows(f"{first},{folder()}/absent.jsonl")

    def test_an_existing_path_is_no_pattern(self, folder):
        assert read_rows(folder("a[1],b.jsonl", lines(ROWS)))["prompt"] == ["p0", "p1", "p2", "p3"]

    @pytest.mark.parametrize("name", ["r.jsonl", "r.json", "r.csv", "r.tsv"])
    @pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
    def test_packed_texts(self, folder, name, packed):
        pack = {"gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
        pack["zst"] = lambda data: pa.compress(data, codec="zstd", asbytes=True)
        separator = "\t" if name.endswith("tsv") else ","
        text = "".join(separator.join(row.values()) + "\n" for row in [{"a": "prompt", "b": "completion"}, *ROWS])
        text = {"r.jsonl": lines(ROWS), "r.json": json.dumps(ROWS)}.get(name, text)
        path = folder(f"{name}.{packed}", pack[packed](text.encode()))
        assert list(read_rows(path)) == ROWS

    @pytest.mark.parametrize("packed", ["gz", "bz2", "xz", "zst"])
    def test_damaged_packing_is_one_error_with_the_name(self, folder, packed):
        with pytest.raises(ValueError, match=rf"r.jsonl.{packed}' could not be read"):
            read_rows(folder(f"r.jsonl.{packed}", b"no such packing"))

    def test_packing_of_tables_is_refused(self, folder):
        with pytest.raises(ValueError, match="ending in"):
            read_rows(folder("r.parquet.gz", b""))


class TestCSV:
    @pytest.mark.parametrize("word", ["NA", "null", "None", "nan", "NULL", "n/a", "-inf", "<NA>", "007", "1e5", "12"])
    def test_cells_are_the_texts_that_they_are(self, folder, word, tiny_tokenizer):
        path = folder("r.csv", f"prompt,chosen,rejected\n{word},{word},no\n{word},yes,{word}\n")
        assert read_rows(path)[0] == {"prompt": word, "chosen": word, "rejected": "no"}
        rows = tokenize_preferences(path, Encoder(tiny_tokenizer, 64))
        assert tiny_tokenizer.decode(rows[0]["chosen_ids"]) == word + "</s>"
        assert tiny_tokenizer.decode(rows[0]["prompt_ids"]) == "<s>" + word

    def test_other_columns_that_hold_nothing_else_are_numbers(self, folder):
        path = folder("r.csv", "prompt,n,x,code,flag,mixed\na,1,0.5,007,true,1\nb,-2,-3,08,False,one\nc,,1e-3,09,,2\n")
        rows = read_rows(path)
        assert rows["n"] == [1, -2, None]
        assert rows["x"] == [0.5, -3.0, 1e-3]
        assert rows["code"] == ["007", "08", "09"]
        assert rows["flag"] == [True, False, None]
        assert rows["mixed"] == ["1", "one", "2"]

    def test_reference_columns_and_margins_of_csv_are_numbers(self, folder, tiny_tokenizer):
        path = folder("r.csv", "prompt,chosen,rejected,ref_chosen_logps,ref_rejected_logps\n1,2,3,-1,-2.5\n")
        row = tokenize_preferences(path, Encoder(tiny_tokenizer, 64))[0]
        assert (row["ref_chosen_logps"], row["ref_rejected_logps"]) == (-1.0, -2.5)

    def test_quotes_line_breaks_and_byte_order_mark(self, folder):
        path = folder("r.csv", '\ufeffprompt,completion\n"a\n""b"", c",d\r\n\ne,f\n')
        assert list(read_rows(path)) == [{"prompt": 'a\n"b", c', "completion": "d"}, {"prompt": "e", "completion": "f"}]

    def test_rows_of_another_width_are_refused_not_shifted(self, folder):
        with pytest.raises(ValueError, match=r"r.csv' .*row 1 \(from 0\) has 3 cells where the header has 2"):
            read_rows(folder("r.csv", "prompt,completion\na,b\nc,d,e\n"))
        with pytest.raises(ValueError, match=r"row 0 \(from 0\) has 1 cells"):
            read_rows(folder("s.csv", "prompt,completion\na\n"))


class TestJSON:
    def test_texts_that_look_like_dates_stay_texts(self, folder):
        rows = [{"prompt": "2020-01-01", "completion": "2020-01-02T03:04:05"}, ROWS[0] | {"prompt": "2021-05-06"}]
        assert list(read_rows(folder("r.jsonl", lines(rows[:1])))) == rows[:1]
        assert list(read_rows(folder("s.jsonl", lines(rows)))) == rows

    @pytest.mark.parametrize("text", ["007", "1.0", "true", "null", '{"a": 1}', "[1, 2]", '"quoted"', "plain"])
    def test_texts_beside_other_kinds_stay_texts(self, folder, text):
        """datasets stores mixed cells as JSON and would take these for it."""
        content = [text, [{"type": "text", "text": text}]]
        rows = [
            {"messages": [{"role": "assistant", "content": c}], "extra": c, "x": 0.1234567890123456} for c in content
        ]
        for source in (folder("r.jsonl", lines(rows)), rows):
            assert list(read_rows(source)) == rows
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]
        pair = {"chosen": turns, "rejected": turns}  # which is converted: the other column goes along
        read = read_rows(folder("s.jsonl", lines([{**pair, "extra": text}, {**pair, "extra": [1]}])))
        assert read[0]["chosen"] == turns[1:]
        assert read["extra"] == [text, [1]]

    def test_keys_that_only_later_rows_have(self, folder):
        rows = [{"prompt": "a"}, {"prompt": "b", "completion": "c"}]
        for source in (folder("r.jsonl", lines(rows)), rows):
            assert read_rows(source)["completion"] == [None, "c"]

    def test_first_ten_faulty_lines_at_once(self, folder):
        text = "".join(f"{json.dumps(ROWS[0])}\n{{'no': {i}}}\n" for i in range(12))
        with pytest.raises(ValueError, match=r"r.jsonl' could not .*: 10 rows or more .* row 1 .* row 19 ") as info:
            read_rows(folder("r.jsonl", text))
        assert str(info.value).count("JSON parse error") == 10

    def test_faulty_lines_are_left_out_and_counted_if_asked(self, folder, capsys):
        text = '{"prompt": "a", "completion": "b"}\n{"prompt": \n[1]\n{"prompt": "\\ud800", "completion": "b"}\n'
        text += '{"prompt": "c", "completion": "d", "n": 1' + "0" * 30 + "}\n" + '{"prompt": "e", "completion": "f"}'
        with tally("dataset") as counts:
            rows = read_rows(folder("r.jsonl", text), Reading(skip_bad_rows=True))
        assert rows["prompt"] == ["a", "e"]
        assert counts.skipped == 4
        said = capsys.readouterr().err
        assert "4 faulty rows were left out" in said
        for fault in ("JSON parse error in row 1 ", "row 2 .*: must be an object; got a list", "no Unicode", "64 bits"):
            assert re.search(fault, said), fault

    def test_another_encoding_is_named(self, folder):
        with pytest.raises(ValueError, match=r"r.jsonl' could not be read: row 1 .* is not text in UTF-8"):
            read_rows(folder("r.jsonl", '{"prompt": "a"}\n{"prompt": "café"}'.encode("latin-1")))
        with pytest.raises(ValueError, match=r"r.csv' could not be read: it is not text in UTF-8"):
            read_rows(folder("r.csv", "prompt\ncafé".encode("latin-1")))
        assert len(read_rows(f"{folder()}/r.jsonl", Reading(skip_bad_rows=True))) == 1


class TestObjects:
    def test_data_frames_and_dicts_of_splits(self):
        frame = pytest.importorskip("pandas", reason="needs pandas").DataFrame(ROWS, index=[5, 6, 7, 8])
        assert list(read_rows(frame)) == ROWS
        rows = datasets.Dataset.from_list(ROWS)
        assert list(read_rows(datasets.DatasetDict(test=rows.select([0]), train=rows))) == ROWS
        assert list(read_rows(datasets.DatasetDict(only=rows))) == ROWS
        with pytest.raises(ValueError, match="has the splits a, b; got 'train'"):
            read_rows(datasets.DatasetDict(a=rows, b=rows))

    def test_a_format_that_gives_tensors_is_set_aside(self, tiny_tokenizer):
        rows = [{"prompt": "a", "completions": ["b", "c"], "rewards": [0.0, 1.0]}]
        for kind in ("torch", "numpy"):
            given = datasets.Dataset.from_list(rows).with_format(kind)
            assert list(tokenize_lists(given, Encoder(tiny_tokenizer, 64))) == list(
                tokenize_lists(rows, Encoder(tiny_tokenizer, 64))
            )

    def test_paths(self, folder, tmp_path):
        folder("r.jsonl", lines(ROWS))
        assert list(read_rows(tmp_path / "data" / "r.jsonl")) == ROWS
        assert list(read_rows([tmp_path / "data" / "r.jsonl"] * 2)) == ROWS * 2

    @pytest.mark.parametrize("source", [7, (row for row in ROWS), {"train": ROWS}, [1, 2]])
    def test_other_objects_are_refused_by_kind(self, source):
        with pytest.raises(TypeError, match=rf"dataset must be a datasets.Dataset.*; got {type(source).__name__}"):
            read_rows(source)

    def test_a_stream_is_refused_with_what_to_do(self):
        with pytest.raises(TypeError, match=r"got IterableDataset; rows that come one by one .*: make a Dataset"):
            read_rows(datasets.Dataset.from_list(ROWS).to_iterable_dataset())


def test_sources_in_a_file_of_keys(folder, tmp_path):
    """Lists and names in YAML, or JSON on the command line."""
    text = "dataset: [a.jsonl, b.jsonl]\neval_dataset: {one: c.jsonl, two: d.jsonl}\ncolumns: {question: prompt}\n"
    (tmp_path / "keys.yaml").write_text(text)
    sets = '{"one": "c.jsonl", "two": "d.jsonl"}'
    for argv in (
        ["--config", str(tmp_path / "keys.yaml")],
        ["--dataset", "a.jsonl,b.jsonl", "--eval_dataset", sets, "--columns", "question=prompt"],
    ):
        for kind in (SFTConfig, GRPOConfig):
            args = parse(kind, [*argv, "--output_dir", str(tmp_path / "run"), "--use_cpu"], command="sft")
            assert args.dataset in (["a.jsonl", "b.jsonl"], "a.jsonl,b.jsonl")
            assert args.eval_dataset == {"one": "c.jsonl", "two": "d.jsonl"}
            assert args.reading == Reading({"question": "prompt"})
            with pytest.raises(ValueError, match=r"there is no 'a.jsonl'"):
                check_sources(args, ("dataset",))
            with pytest.raises(ValueError, match=r"eval_dataset: .*there is no 'c.jsonl'"):
                check_sources(args, ("eval_dataset",))
    with pytest.raises(ValueError, match="columns must be theirs=ours, several with commas between; got 'question'"):
        SFTConfig(output_dir=str(tmp_path / "run"), use_cpu=True, columns="question")


class TestColumns:
    ROWS = ({"question": "a", "answer": " b", "extra": 1},)

    @pytest.mark.parametrize("swapped", [False, True])
    def test_names_of_columns(self, tiny_tokenizer, swapped):
        columns = {"question": "prompt", "answer": "completion"}
        columns = {v: k for k, v in columns.items()} if swapped else columns
        rows = read_rows(list(self.ROWS), Reading(columns))
        assert rows[0] == {"prompt": "a", "completion": " b", "extra": 1}
        assert len(tokenize_sft(rows, Encoder(tiny_tokenizer, 64))) == 1
        assert read_rows(rows, Reading(columns))[0] == rows[0]  # of several sources some are named so already

    def test_a_column_that_takes_anothers_place(self):
        rows = [{"prompt": "old", "question": "new", "completion": "c"}]
        assert read_rows(rows, Reading({"question": "prompt"}))[0] == {"prompt": "new", "completion": "c"}

    def test_a_name_that_is_not_there(self):
        with pytest.raises(ValueError, match="columns names 'q', which is not there; there are question"):
            read_rows(list(self.ROWS), Reading({"q": "prompt"}))

    def test_mapped_csv_cells_stay_texts(self, folder):
        path = folder("r.csv", "question,answer\n12,NA\n")
        assert read_rows(path, Reading({"question": "prompt", "answer": "completion"}))[0] == {
            "prompt": "12",
            "completion": "NA",
        }


class TestFaultyRows:
    ROWS = tuple({"prompt": "a", "completion": "b" if i % 2 else ""} for i in range(24))

    def test_ten_at_once(self, tiny_tokenizer):
        with pytest.raises(ValueError, match=r"10 rows or more cannot be .*row 0 .* row 18 .*skip_bad_rows") as info:
            tokenize_sft(list(self.ROWS), Encoder(tiny_tokenizer, 64))
        assert str(info.value).count("'completion' must not be empty") == 10

    def test_left_out_and_counted(self, tiny_tokenizer, capsys):
        with tally("dataset") as counts:
            rows = tokenize_sft(list(self.ROWS), Encoder(tiny_tokenizer, 64, skip_bad_rows=True))
        assert (len(rows), counts.rows, counts.skipped) == (12, 12, 12)
        assert (
            "dataset: 12 faulty rows were left out, the first 10 of them: column 'completion'"
            in capsys.readouterr().err
        )

    def test_kept_values_stand_beside_their_rows(self, tiny_tokenizer):
        rows = [{"prompt": "a", "chosen": "b" if i else "", "rejected": "c"} for i in range(3)]
        rows = [{**row, "ref_chosen_logps": -float(i), "ref_rejected_logps": 0.0} for i, row in enumerate(rows)]
        kept = tokenize_preferences(rows, Encoder(tiny_tokenizer, 64, skip_bad_rows=True))
        assert kept["ref_chosen_logps"] == [-1.0, -2.0]

    def test_all_faulty_is_an_error_even_so(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="a row that can be used; all 2 are faulty"):
            tokenize_sft([{"prompt": "a", "completion": ""}] * 2, Encoder(tiny_tokenizer, 64, skip_bad_rows=True))
