"""Rows that are longer than there is room for: what each mode does with them, that it is told, and to whom."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from fastalign.trainers.data.collate import ListCollator, PreferenceCollator, SFTCollator
from fastalign.trainers.data.encode import Encoder
from fastalign.trainers.data.problems import tally
from fastalign.trainers.data.tokenize import tokenize_lists, tokenize_preferences, tokenize_sft
from fastalign.trainers.dpo import DPOConfig, DPOTrainer
from fastalign.trainers.grpo import GRPOConfig, GRPOTrainer
from fastalign.trainers.policy.rollout import load_prompts
from fastalign.trainers.ppo import PPOConfig
from fastalign.trainers.reward import RewardConfig, RewardTrainer
from fastalign.trainers.sft import SFTConfig, SFTTrainer
from fastalign.utils.batch import IGNORE

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
LONG_PROMPT = {"prompt": "the movie is good and the movie is bad and long" * 2, "completion": " fun"}
LONG_REPLY = {"prompt": "the movie is good", "completion": " great fun and a dull film , awful and long" * 3}
SHORT = {"prompt": "the", "completion": " film"}
ROWS = [SHORT, LONG_PROMPT, LONG_REPLY]
MODES = ["left", "right", "drop", "raise", "keep_start", "keep_end"]


@pytest.fixture
def chatty(tiny_tokenizer):
    """A copy of the tokenizer with a chat template."""
    tokenizer = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def in_form(form, row):
    """The row as text, or as a conversation."""
    if form == "text":
        return row
    turns = ({"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]})
    return {"messages": list(turns)}


class TestModes:
    @pytest.mark.parametrize("form", ["text", "messages"])
    @pytest.mark.parametrize("mode", MODES)
    def test_prompts_stay_and_ends_of_cut_replies_are_no_ends(self, chatty, form, mode):
        """In no mode does a reply push its prompt out, and what is dropped, cut or refused is counted."""
        rows, length = [in_form(form, row) for row in ROWS], 20 if form == "text" else 26
        if mode == "raise":
            with pytest.raises(ValueError, match=r"row \d .*tokens are more than max_length 2\d: raise it, or set"):
                tokenize_sft(rows, Encoder(chatty, length, truncation_mode=mode))
            return
        with tally("dataset") as counts:
            found = tokenize_sft(rows, Encoder(chatty, length, truncation_mode=mode))
        whole = tokenize_sft(rows, Encoder(chatty, 500))
        for row in found:
            original = whole[[w["completion_ids"][0] for w in whole].index(row["completion_ids"][0])]
            assert len(row["prompt_ids"]) >= min(length // 4, len(original["prompt_ids"]))
            assert len(row["prompt_ids"]) + len(row["completion_ids"]) <= length
            cut = len(row["completion_ids"]) < len(original["completion_ids"])
            assert (row["completion_ids"][-1] != chatty.eos_token_id) == cut
            labels = SFTCollator(chatty.pad_token_id)([row])["labels"][0]
            assert (labels[labels != IGNORE][-1] == chatty.eos_token_id) != cut
        assert counts.rows == len(found)
        assert counts.rows + counts.dropped == len(ROWS)
        prompts = [len(w["prompt_ids"]) for w in whole]
        if mode == "drop":
            assert (counts.dropped, counts.prompts_cut, counts.replies_cut) == (2, 0, 0)
        elif mode in ("right", "keep_start"):
            kept = [row["prompt_ids"] for row in found]
            assert all(ids in [w["prompt_ids"] for w in whole] for ids in kept)
            assert counts.prompts_cut == 0
            assert counts.dropped == sum(n >= length for n in prompts)
        else:
            assert counts.dropped == 0
            assert counts.prompts_cut >= 1
            assert counts.replies_cut == 1

    def test_modes_that_there_are(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="truncation_mode must be one of left, right, drop, raise; got 'middle'"):
            Encoder(tiny_tokenizer, 20, truncation_mode="middle")
        with pytest.raises(ValueError, match="truncation_mode must be one of left, drop, raise; got 'right'"):
            PPOConfig(output_dir="x", truncation_mode="right")
        assert DPOConfig(output_dir="x", truncation_mode="keep_start", use_cpu=True).truncation_mode == "right"

    @pytest.mark.parametrize("mode", ["drop", "raise"])
    def test_max_prompt_length_counts_too(self, tiny_tokenizer, mode):
        encode = Encoder(tiny_tokenizer, 500, max_prompt_length=4, truncation_mode=mode)
        if mode == "raise":
            with pytest.raises(ValueError, match=r"row 1 .*are more than max_prompt_length 4"):
                tokenize_sft(ROWS, encode)
        else:
            assert len(tokenize_sft(ROWS, encode)) == 1

    def test_nothing_left_is_an_error(self, tiny_tokenizer):
        with pytest.raises(ValueError, match="a row that fits max_length; none of its 2 does"):
            tokenize_sft(ROWS[1:], Encoder(tiny_tokenizer, 8, truncation_mode="drop"))

    def test_a_conversation_without_a_reply_in_reach_is_dropped(self, chatty):
        late = [{"role": "user", "content": "the movie is good and " * 5}, {"role": "assistant", "content": "fun"}]
        rows = [{"messages": late}, in_form("messages", SHORT)]
        with tally("dataset") as counts:
            assert len(tokenize_sft(rows, Encoder(chatty, 20, truncation_mode="right"))) == 1
        assert counts.dropped == 1

    @pytest.mark.parametrize("mode", ["left", "right"])
    def test_pairs_and_lists_keep_one_prompt_and_no_false_end(self, tiny_tokenizer, mode):
        row = {"prompt": LONG_REPLY["prompt"], "chosen": LONG_REPLY["completion"], "rejected": " bad"}
        listed = {"prompt": row["prompt"], "completions": [row["chosen"], row["rejected"]]}
        encode = Encoder(tiny_tokenizer, 16, truncation_mode=mode)
        for tokenize, collate, source in (
            (tokenize_preferences, PreferenceCollator, row),
            (tokenize_lists, ListCollator, listed),
        ):
            with tally("dataset") as counts:
                batch = collate(tiny_tokenizer.pad_token_id)(list(tokenize([source], encode)))
            ends = [labels[labels != IGNORE][-1] == tiny_tokenizer.eos_token_id for labels in batch["labels"]]
            assert ends == [False, True]
            assert counts.replies_cut == 1


class TestPolicyPrompts:
    PROMPTS = ({"prompt": LONG_PROMPT["prompt"]}, {"prompt": "the"})

    @pytest.mark.parametrize("chat", [False, True])
    def test_reward_and_policy_see_the_same(self, chatty, chat):
        rows = [{"prompt": [{"role": "user", "content": r["prompt"]}]} if chat else r for r in self.PROMPTS]
        counts: dict[str, int] = {}
        length = 20 if chat else 8
        long, short = load_prompts(rows, chatty, length, counts=counts)
        assert len(long.ids) == length
        assert long.text == chatty.decode(long.ids[0 if chat else 1 :])
        assert short.text == chatty.decode(short.ids[0 if chat else 1 :])
        assert (counts["data/dataset/prompts_cut"], counts["data/dataset/rows"]) == (1, 2)

    def test_a_templates_own_beginning_stays(self, chatty):
        chatty.chat_template = "<s>" + TEMPLATE
        row = {"prompt": [{"role": "user", "content": LONG_PROMPT["prompt"]}]}
        (whole,) = load_prompts([row], chatty, 500)
        limit = len(whole.ids) - 6
        (prompt,) = load_prompts([row], chatty, limit)
        assert prompt.ids[0] == chatty.bos_token_id
        assert 0 < len(prompt.ids) <= limit
        assert prompt.text.startswith("<s><user>")
        with pytest.raises(ValueError, match=r"row 0 .*is too long"):  # there is no room for any of the message
            load_prompts([row], chatty, 8)

    def test_drop_and_raise(self, tiny_tokenizer, capsys):
        rows = list(self.PROMPTS)
        kept = load_prompts(rows, tiny_tokenizer, 8, truncation_mode="drop", key="eval_dataset")
        assert [p.text for p in kept] == ["the"]
        assert "eval_dataset: of 2 rows 1 dropped" in capsys.readouterr().err
        with pytest.raises(ValueError, match=r"row 0 .*are more than max_prompt_length 8"):
            load_prompts(rows, tiny_tokenizer, 8, truncation_mode="raise")
        with pytest.raises(ValueError, match="a prompt within max_prompt_length; all 1 are longer"):
            load_prompts(rows[:1], tiny_tokenizer, 8, truncation_mode="drop")

    def test_the_reward_function_is_given_what_the_policy_saw(self, make, tiny_tokenizer):
        seen = []

        def reward(prompts, completions):
            seen.extend(prompts)
            return [0.0] * len(prompts)

        options = {"reward": reward, "max_prompt_length": 2, "total_episodes": 4, "num_generations": 4}
        trainer = make(GRPOTrainer, GRPOConfig, **options)
        trainer.train()
        assert trainer.data_counts["data/dataset/prompts_cut"] > 0
        assert set(seen) <= {tiny_tokenizer.decode(p.ids[1:]) for p in trainer.prompts}


class TestCounts:
    PAIRS = tuple({"prompt": r["prompt"], "chosen": r["completion"], "rejected": " bad"} for r in ROWS)

    @pytest.mark.parametrize(
        ("trainer", "config", "rows"),
        [(SFTTrainer, SFTConfig, ROWS), (DPOTrainer, DPOConfig, PAIRS), (RewardTrainer, RewardConfig, PAIRS)],
    )
    def test_trainers_tell_and_keep_them(self, tiny_model, tiny_tokenizer, tmp_path, capsys, trainer, config, rows):
        args = config(output_dir=str(tmp_path), use_cpu=True, max_length=20, truncation_mode="drop", skip_bad_rows=True)
        model = tiny_model()
        if trainer is RewardTrainer:
            from fastalign.trainers.reward import load_reward_model

            model.save_pretrained(tmp_path / "m")
            tiny_tokenizer.save_pretrained(tmp_path / "m")
            model, tiny_tokenizer = load_reward_model(str(tmp_path / "m"), args)
        faulty = dict.fromkeys(rows[0], "")
        sets = {"one": rows[:2], "two": [*rows, faulty]}
        built = trainer(model, args, [*rows, faulty], sets, tiny_tokenizer)
        counts = built.data_counts
        assert {k: v for k, v in counts.items() if k.startswith("data/dataset/")} == {
            "data/dataset/rows": 1,
            "data/dataset/skipped": 1,
            "data/dataset/dropped": 2,
            "data/dataset/prompts_cut": 0,
            "data/dataset/replies_cut": 0,
        }
        assert (counts["data/eval_dataset_one/dropped"], counts["data/eval_dataset_two/skipped"]) == (1, 1)
        said = capsys.readouterr().err
        assert "dataset: of 3 rows 2 dropped, being too long" in said
        assert "eval_dataset_two: 1 faulty row was left out: " in said
        metrics = built.evaluate()
        assert {"eval_one_loss", "eval_two_loss"} <= set(metrics)

    def test_the_command_writes_them(self, tiny_model, tiny_tokenizer, tmp_path):
        from fastalign.cli import commands as cli

        tiny_model().save_pretrained(tmp_path / "m")
        tiny_tokenizer.save_pretrained(tmp_path / "m")
        rows = tmp_path / "rows.jsonl"
        renamed = [{"question": r["prompt"], "answer": r["completion"]} for r in ROWS]
        rows.write_text("".join(json.dumps(r) + "\n" for r in renamed) + "no JSON\n")
        line = f"sft --model {tmp_path / 'm'} --dataset {rows} --output_dir {tmp_path / 'run'} --use_cpu --max_steps 1"
        line += " --columns question=prompt,answer=completion --skip_bad_rows --truncation_mode drop --max_length 20"
        assert cli.main([*line.split(), "--eval_dataset", json.dumps({"a": str(rows), "b": str(rows)})]) == 0
        metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
        assert (metrics["data/dataset/dropped"], metrics["data/dataset/skipped"]) == (2, 1)
        assert {"eval_a_loss", "eval_b_loss", "data/eval_dataset_b/rows"} <= set(metrics)


def test_policies_are_evaluated_on_each_set(make):
    sets = {"short": [{"prompt": "the"}, {"prompt": "a"}], "long": [{"prompt": "the movie is good"}]}
    trainer = make(eval_rows=sets, total_episodes=4, reward=lambda prompts: [float(len(p)) for p in prompts])
    found = trainer.evaluate()
    assert found["eval/short/score"] == 2.0
    assert found["eval/long/score"] == 17.0
    assert found["eval/score"] == pytest.approx((3 + 1 + 17) / 3)
