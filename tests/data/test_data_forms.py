"""Every form of data: folders, splits, hubs, conversations and their masks, shared beginnings, packing."""

from __future__ import annotations

from types import MappingProxyType

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
datasets = pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from transformers import LlamaConfig, LlamaForCausalLM  # noqa: E402

import fastalign as fa  # noqa: E402
from fastalign.models.logits import model_logits  # noqa: E402
from fastalign.trainers.data import files  # noqa: E402
from fastalign.trainers.data.collate import PackedCollator, SFTCollator  # noqa: E402
from fastalign.trainers.data.encode import Encoder  # noqa: E402
from fastalign.trainers.data.files import read_rows  # noqa: E402
from fastalign.trainers.data.pack import best_fit, pack  # noqa: E402
from fastalign.trainers.data.tokenize import tokenize_lists, tokenize_preferences, tokenize_sft  # noqa: E402
from fastalign.trainers.sft import SFTConfig, SFTTrainer  # noqa: E402
from fastalign.utils.batch import IGNORE  # noqa: E402

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ END }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER, REPLY = {"role": "user", "content": "is the film good"}, {"role": "assistant", "content": "the film is great"}
BAD = {"role": "assistant", "content": "awful and long"}


def with_template(tokenizer, end: str):
    """A copy whose chat template ends every turn so."""
    copy = type(tokenizer).from_pretrained(tokenizer.name_or_path) if tokenizer.name_or_path else None
    if copy is None:
        copy = type(tokenizer)(
            tokenizer_object=tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
        )
    copy.chat_template = TEMPLATE.replace("{{ END }}", end)
    return copy


@pytest.fixture
def chat(tiny_tokenizer):
    """An encoder whose template ends turns with the end-of-sequence token and a line break, as ChatML does."""
    return Encoder(with_template(tiny_tokenizer, "</s>\n"), 200)


def decode(encode, ids):
    return encode.tokenizer.decode(ids)


class TestSources:
    ROWS = ({"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"})

    def test_folders_that_datasets_saved(self, tmp_path):
        rows = datasets.Dataset.from_list(list(self.ROWS))
        rows.save_to_disk(tmp_path / "one")
        datasets.DatasetDict(train=rows, test=rows.select([1])).save_to_disk(tmp_path / "two")
        assert read_rows(str(tmp_path / "one"))["completion"] == ["b", "d"]
        assert read_rows(str(tmp_path / "two"))["completion"] == ["b", "d"]
        assert read_rows(str(tmp_path / "two") + ":test")["completion"] == ["d"]
        with pytest.raises(ValueError, match="splits train, test; got 'dev'"):
            read_rows(str(tmp_path / "two") + ":dev")

    def test_folder_of_files_and_tabs(self, tmp_path, monkeypatch):
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
        folder = tmp_path / "data"
        folder.mkdir()
        (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
        (folder / "test.jsonl").write_text('{"prompt": "c", "completion": "d"}\n')
        assert read_rows(str(folder))["completion"] == ["b"]
        assert read_rows(f"{folder}:test")["completion"] == ["d"]
        (tmp_path / "rows.tsv").write_text("prompt\tcompletion\na, b\tc\n")
        assert read_rows(str(tmp_path / "rows.tsv"))[0] == {"prompt": "a, b", "completion": "c"}
        (tmp_path / "none").mkdir()
        with pytest.raises(ValueError, match="folder must hold files"):
            read_rows(str(tmp_path / "none"))

    def test_a_name_that_is_no_path_is_asked_of_the_hub(self, monkeypatch):
        asked = []
        rows = datasets.Dataset.from_list(list(self.ROWS))

        def load_dataset(name):
            asked.append(name)
            return datasets.DatasetDict(train=rows, test=rows.select([1]))

        monkeypatch.setattr(files, "load_dataset", load_dataset)
        assert read_rows("some/name")["completion"] == ["b", "d"]
        assert read_rows("some/name:test")["completion"] == ["d"]
        assert read_rows("some/name-v0.2:test")["completion"] == ["d"]  # no file's ending
        assert asked == ["some/name", "some/name", "some/name-v0.2"]

    def test_unreachable_hub_is_one_plain_error(self, monkeypatch):
        def load_dataset(name):
            raise ConnectionError("no route\nto anything")

        monkeypatch.setattr(files, "load_dataset", load_dataset)
        with pytest.raises(ValueError, match=r"no file or folder 'some/name', and no hub gave one: no route$"):
            read_rows("some/name")


class TestConversations:
    def test_only_the_assistants_turns_are_trained_on(self, chat):
        other = {"role": "user", "content": "and the plot"}
        rows = tokenize_sft([{"messages": [{"role": "system", "content": "be fun"}, USER, REPLY, other, BAD]}], chat)
        batch = SFTCollator(0)(list(rows))
        trained = batch["labels"][0][batch["labels"][0] != IGNORE].tolist()
        assert decode(chat, trained) == "the film is great</s>awful and long</s>"
        whole = batch["input_ids"][0].tolist()
        assert decode(chat, whole) == (
            "<s><system>be fun</s>\n<user>is the film good</s>\n<assistant>the film is great</s>\n"
            "<user>and the plot</s>\n<assistant>awful and long</s>"
        )

    def test_what_is_trained_follows_what_generation_sees(self, chat):
        prompt_ids, (ids,) = chat([USER], [[REPLY]])
        assert decode(chat, prompt_ids) == "<s><user>is the film good</s>\n<assistant>"
        assert decode(chat, ids) == "the film is great</s>"
        assert chat([USER], ["the film is great"]) == (prompt_ids, [ids])
        as_messages = tokenize_sft([{"messages": [USER, REPLY]}], chat)[0]
        as_columns = tokenize_sft([{"prompt": [USER], "completion": [REPLY]}], chat)[0]
        assert as_messages["prompt_ids"] == as_columns["prompt_ids"] == prompt_ids
        assert as_messages["completion_ids"] == as_columns["completion_ids"] == ids

    @pytest.mark.parametrize(("end", "closing"), [("", "</s>"), ("<end>", "<end>"), ("</s>", "</s>")])
    def test_end_of_sequence_is_added_where_the_template_marks_no_end(self, tiny_tokenizer, end, closing):
        encode = Encoder(with_template(tiny_tokenizer, end), 200)
        assert decode(encode, encode([USER], [[REPLY]])[1][0]) == "the film is great" + closing
        assert decode(encode, encode.conversation([USER, REPLY])[1]) == "the film is great" + closing

    def test_template_that_writes_the_beginning_token_gets_no_second_one(self, tiny_tokenizer):
        tokenizer = with_template(tiny_tokenizer, "")
        tokenizer.chat_template = "<s>" + tokenizer.chat_template
        prompt_ids, _ = Encoder(tokenizer, 200)([USER], [[REPLY]])
        assert prompt_ids.count(tokenizer.bos_token_id) == 1

    def test_long_conversations_lose_their_beginning(self, tiny_tokenizer):
        encode = Encoder(with_template(tiny_tokenizer, "</s>\n"), 12)
        prompt_ids, ids, own, *_ = encode.conversation([USER, REPLY])
        assert len(prompt_ids) + len(ids) <= 12
        assert len(own) == len(ids)
        assert decode(encode, ids).startswith("the film is")

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"messages": [USER]}, "row 0 .*at least one turn of the assistant"),
            ({"messages": [USER, {"role": "assistant", "content": " "}]}, "row 0 .*empty reply"),
            ({"messages": [{"role": "user"}, REPLY]}, "row 0 .*role and a content"),
            ({"prompt": "a", "completion": [REPLY]}, "row 0 .*needs a prompt of messages"),
        ],
    )
    def test_bad_conversations_are_refused_with_their_row(self, chat, row, message):
        with pytest.raises(ValueError, match=message):
            tokenize_sft([row], chat)

    def test_template_mistakes_are_refused(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="tokenizer with a chat template"):
            tokenize_sft([{"messages": [USER, REPLY]}], Encoder(tiny_tokenizer, 99))
        tokenizer = with_template(tiny_tokenizer, "")
        tokenizer.chat_template = "{{ messages | length }}" + tokenizer.chat_template
        with pytest.raises(ValueError, match="same way with and without the reply"):
            tokenize_sft([{"messages": [USER, REPLY]}], Encoder(tokenizer, 99))


class TestPairs:
    def test_every_form_of_a_conversational_pair_is_the_same(self, chat):
        forms = [
            {"prompt": [USER], "chosen": [REPLY], "rejected": [BAD]},
            {"chosen": [USER, REPLY], "rejected": [USER, BAD]},
            {"prompt": "is the film good", "chosen": [USER, REPLY], "rejected": [USER, BAD]},
        ]
        rows = [tokenize_preferences([form], chat)[0] for form in forms]
        assert rows[0] == rows[1] == rows[2]
        assert decode(chat, rows[0]["prompt_ids"]) == "<s><user>is the film good</s>\n<assistant>"
        assert decode(chat, rows[0]["rejected_ids"]) == "awful and long</s>"

    def test_shared_beginning_is_the_prompt(self, tiny_tokenizer):
        encode = Encoder(tiny_tokenizer, 64)
        row = tokenize_preferences([{"chosen": "a film\nis great", "rejected": "a film\nis grim"}], encode)[0]
        assert decode(encode, row["prompt_ids"]) == "<s>a film\nis"
        assert decode(encode, row["chosen_ids"]) == " great</s>"
        assert decode(encode, row["rejected_ids"]) == " grim</s>"

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"chosen": [USER, REPLY], "rejected": [REPLY]}, "begin with the same messages"),
            ({"chosen": [USER, REPLY, USER], "rejected": [USER, BAD]}, "end with a reply of the assistant"),
            ({"prompt": "a", "chosen": "b"}, "needs the columns"),
        ],
    )
    def test_bad_pairs_are_refused(self, chat, row, message):
        with pytest.raises(ValueError, match=message):
            tokenize_preferences([row], chat)

    def test_lists_of_replies(self, chat):
        row = tokenize_lists([{"prompt": [USER], "completions": [[BAD], [REPLY]], "rewards": [0.0, 1.0]}], chat)[0]
        assert [decode(chat, ids) for ids in row["completions_ids"]] == ["the film is great</s>", "awful and long</s>"]
        assert (row["rewards"], row["ranks"]) == ([1.0, 0.0], [-1.0, 0.0])


class TestPacking:
    ROWS = tuple(
        {"prompt": "the movie", "completion": t} for t in (" is good", " is bad , awful and long", " and", " is fun")
    )

    def test_best_fit_uses_every_row_once_and_no_bin_overflows(self):
        lengths = [5, 3, 9, 4, 1, 1, 7, 10]
        bins = best_fit(lengths, 10)
        assert sorted(i for items in bins for i in items) == list(range(8))
        assert all(sum(lengths[i] for i in items) <= 10 for items in bins)
        assert len(bins) == 4

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_packed_tokens_have_the_log_probabilities_of_sequences_alone(self, tiny_tokenizer, tiny_model, kind):
        torch.manual_seed(0)
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
        llama = LlamaConfig(vocab_size=len(tiny_tokenizer), num_key_value_heads=1, **size)
        model = {"gpt2": tiny_model, "llama": lambda: LlamaForCausalLM(llama)}[kind]().eval()
        rows = tokenize_sft(list(self.ROWS), Encoder(tiny_tokenizer, 24))
        packed = pack(rows, 24)
        assert len(packed) < len(rows)
        sums = []
        for batch in (SFTCollator(0)(list(rows)), PackedCollator(0)(list(packed))):
            with torch.no_grad():
                logps = fa.token_logps(model_logits(model, batch), batch["labels"])
            sums.append(sorted(logps[batch["labels"] != IGNORE].tolist()))
        assert sums[1] == pytest.approx(sums[0], abs=1e-5)

    OPTIONS = MappingProxyType({"use_cpu": True, "max_steps": 1, "report_to": "none", "packing": True})

    def test_packed_rows_may_be_longer_than_the_models_positions(self, tiny_tokenizer, tiny_model, tmp_path):
        """600 tokens on 256 positions: no sequence has more, and nor must what fills a shorter row beside it."""
        rows = [{"text": "a" * (n - 2)} for n in (200, 200, 200, 50)]
        args = SFTConfig(output_dir=str(tmp_path), max_length=600, per_device_train_batch_size=2, **self.OPTIONS)
        trainer = SFTTrainer(tiny_model(), args, rows, rows[:1], tiny_tokenizer)
        assert sorted(trainer.train_dataset["length"]) == [50, 600]
        loss = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < loss

    def test_a_sequence_longer_than_the_models_positions_is_refused(self, tiny_tokenizer, tiny_model, tmp_path):
        args = SFTConfig(output_dir=str(tmp_path), max_length=600, **self.OPTIONS)
        rows = [{"text": "a" * 298}, {"text": "a"}]
        with pytest.raises(ValueError, match=r"at most 256, .* dataset has; got 600 and a sequence of 300 token"):
            SFTTrainer(tiny_model(), args, rows, None, tiny_tokenizer)

    def test_borders_are_not_trained_over(self, tiny_tokenizer):
        rows = tokenize_sft(list(self.ROWS), Encoder(tiny_tokenizer, 64))
        packed = pack(rows, 64)
        trained = [label for row in packed for label in row["labels"] if label != IGNORE]
        assert sorted(trained) == sorted(i for row in rows for i in row["completion_ids"])
        for row in packed:
            starts = [i for i, p in enumerate(row["position_ids"]) if p == 0]
            assert all(row["labels"][i - 1] == IGNORE for i in starts if i)
