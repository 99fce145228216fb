"""What messages hold beside text: calls of tools, reasoning, parts, weights; whose chat template is used; what of it is
said, and where."""

from __future__ import annotations

import importlib
import json

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from chat_rows import REPLY, TOOLS, USER, WHOLE, call, decode, make_encoder
from transformers import GPT2Config, GPT2ForSequenceClassification

from fastalign.evaluation.evaluate import EvalConfig, evaluate
from fastalign.evaluation.judges import HumanLabels
from fastalign.evaluation.policy import measure
from fastalign.evaluation.ranked_samples import ranked_samples
from fastalign.evaluation.sampling import Sample, prompt_ids
from fastalign.models.sampling import Sampling
from fastalign.trainers.common import arguments
from fastalign.trainers.data.collate import SFTCollator
from fastalign.trainers.data.tokenize import tokenize_lists, tokenize_preferences, tokenize_sft
from fastalign.trainers.policy.rewards import ModelReward
from fastalign.trainers.policy.rollout import Episode, load_prompts
from fastalign.trainers.sft import SFTConfig, SFTTrainer
from fastalign.utils.batch import IGNORE

PLAIN = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% endif %}"
)
"""A template that knows nothing but contents."""


@pytest.fixture
def encoder():
    """A function that makes an encoder with a template."""
    return make_encoder


def trained(encode, row):
    labels = SFTCollator(0)([row])["labels"][0]
    return decode(encode, labels[labels != IGNORE].tolist())


class TestCalls:
    def test_replies_that_differ_in_their_call_are_different(self, encoder):
        encode = encoder()
        row = {"prompt": [USER], "chosen": [call(at="a film")], "rejected": [call(at="fun")], "tools": TOOLS}
        (found,) = tokenize_preferences([row], encode)
        assert decode(encode, found["chosen_ids"]) == 'solook{"at": "a film"}</s>'
        assert decode(encode, found["rejected_ids"]) == 'solook{"at": "fun"}</s>'
        assert decode(encode, found["prompt_ids"]) == "<s>[tool]look[user]is it good</s>[assistant]"
        (listed,) = tokenize_lists([row], encode)
        assert listed["completions_ids"] == [found["chosen_ids"], found["rejected_ids"]]

    def test_arguments_of_other_rows_are_not_there(self, encoder):
        """Tables give every row the keys of all."""
        encode = encoder()
        rows = [{"messages": [USER, call(at="film")]}, {"messages": [USER, call(how="long", often=3)]}]
        first, second = tokenize_sft(rows, encode)
        assert trained(encode, first) == 'solook{"at": "film"}</s>'
        assert trained(encode, second) == 'solook{"how": "long", "often": 3}</s>'

    def test_arguments_may_be_a_text_of_json(self, encoder):
        encode = encoder()
        as_text = call()
        as_text["tool_calls"][0]["function"]["arguments"] = '{"at": "film"}'
        assert encode([USER], [[as_text]]) == encode([USER], [[call(at="film")]])

    def test_results_of_calls_are_context(self, encoder):
        encode = encoder()
        result = {"role": "tool", "content": "a film"}
        (row,) = tokenize_sft([{"prompt": [USER], "completion": [call(at="b"), result, REPLY]}], encode)
        assert trained(encode, row) == 'solook{"at": "b"}</s>it is great</s>'
        assert (
            decode(encode, row["completion_ids"]) == 'solook{"at": "b"}</s>[tool]a film</s>[assistant]it is great</s>'
        )

    @pytest.mark.parametrize(
        ("row", "message"),
        [
            ({"messages": [USER, call(at="a")]}, "leaves out the assistant's tool_calls"),
            ({"messages": [USER, call(at="a"), USER, REPLY]}, "leaves out the assistant's tool_calls"),
            ({"messages": [USER, REPLY], "tools": TOOLS}, "leaves out the tools"),
            ({"messages": [USER, REPLY], "tools": json.dumps(TOOLS)}, "leaves out the tools"),
            ({"messages": [USER, REPLY], "tools": "look"}, "'tools' must hold JSON"),
            ({"messages": [USER, REPLY], "tools": [3]}, "'tools' must hold a list of tools"),
            ({"messages": [USER, {**REPLY, "reasoning_content": "so"}]}, "leaves out the assistant's reasoning"),
            ({"messages": [USER, {**REPLY, "function_call": {"name": "f"}}]}, "function_call"),
            ({"prompt": "so", "completion": "it", "tools": TOOLS}, "tools need a prompt of messages"),
        ],
    )
    def test_what_a_template_does_not_know_is_refused(self, encoder, row, message):
        with pytest.raises(ValueError, match=f"row 0 .*{message}"):
            tokenize_sft([row], encoder(PLAIN))


class TestContents:
    def test_reasoning_is_trained_on(self, encoder):
        encode = encoder()
        (row,) = tokenize_sft([{"messages": [USER, {**REPLY, "reasoning_content": "a film"}]}], encode)
        assert trained(encode, row) == "(a film)it is great</s>"

    @pytest.mark.parametrize("template", [PLAIN, WHOLE, PLAIN.replace("m.content", "m.content[0].text")])
    def test_parts_are_texts(self, encoder, template):
        """For templates that write texts, and for those that write parts."""
        encode = encoder(template)
        asked = {"role": "user", "content": [{"type": "text", "text": "is it good"}]}
        said = {"role": "assistant", "content": [{"type": "text", "text": text} for text in ("it is ", "great")]}
        rows = [tokenize_sft([{"messages": messages}], encode)[0] for messages in ([asked, said], [USER, REPLY])]
        assert rows[0] == rows[1]
        assert trained(encode, rows[0]) == "it is great</s>"
        assert decode(encode, rows[0]["prompt_ids"]) == "<s>[user]is it good</s>[assistant]"

    def test_other_parts_are_refused(self, encoder):
        image = {"role": "user", "content": [{"type": "image", "url": "a.png"}]}
        with pytest.raises(ValueError, match=r"row 0 .*part of type 'image'"):
            tokenize_sft([{"messages": [image, {"role": "assistant", "content": []}]}], encoder())

    def test_weights(self, encoder):
        encode = encoder()
        messages = [USER, {**REPLY, "weight": 0}, USER, {"role": "assistant", "content": "so", "weight": 1}]
        (row,) = tokenize_sft([{"messages": messages}], encode)
        assert trained(encode, row) == "so</s>"
        assert decode(encode, row["prompt_ids"]).endswith("it is great</s>[user]is it good</s>[assistant]")
        for reply, message in (
            ({**REPLY, "weight": -0.5}, "weights of 0 or more"),
            ({**REPLY, "weight": 0}, "with a weight that is not 0"),
            ({**REPLY, "train": False}, "must call a message's weight weight"),
        ):
            with pytest.raises(ValueError, match=f"row 0 .*{message}"):
                tokenize_sft([{"messages": [USER, reply]}], encode)
        pair = {"prompt": [USER], "chosen": [{**REPLY, "weight": 0}], "rejected": [call(at="a")]}
        with pytest.raises(ValueError, match=r"row 0 .*weight of 0"):
            tokenize_preferences([pair], encode)

    def test_a_message_that_the_template_drops_is_refused(self, encoder):
        deaf = PLAIN.replace("for m in messages", "for m in messages if m.role != 'system'")
        with pytest.raises(ValueError, match=r"row 0 .*leaves out what the system says"):
            tokenize_sft([{"messages": [{"role": "system", "content": "be fun"}, USER, REPLY]}], encoder(deaf))


class TestTemplates:
    RAISING = "{{ raise_exception('no second turn') if messages | length > 2 }}" + PLAIN

    def test_one_that_raises_names_the_row(self, encoder):
        encode, long = encoder(self.RAISING), [USER, REPLY, USER]
        message = r"row 1 \(from 0\): the chat template refuses the conversation: no second turn"
        with pytest.raises(ValueError, match=message):
            tokenize_sft([{"messages": [USER, REPLY]}, {"messages": [*long, REPLY]}], encode)
        worse = [{"role": "assistant", "content": "so"}]
        rows = [{"prompt": p, "chosen": [REPLY], "rejected": worse} for p in ([USER], long)]
        for tokenize in (tokenize_preferences, tokenize_lists):
            with pytest.raises(ValueError, match=message):
                tokenize(rows, encode)
        with pytest.raises(ValueError, match=message):
            load_prompts([{"prompt": [USER]}, {"prompt": long}], encode.tokenizer, 64)
        with pytest.raises(ValueError, match=message):
            prompt_ids(encode.tokenizer, [[USER], long])

    def test_options_of_the_run_and_of_the_row(self, encoder):
        assert decode(encoder(), encoder().prompt([USER])) == "<s>[user]is it good</s>[assistant]"
        asked = encoder(polite=True)
        assert decode(asked, asked.prompt([USER])) == "<s>[polite][user]is it good</s>[assistant]"
        rows = [{"messages": [USER, REPLY], "chat_template_kwargs": {"polite": value}} for value in (False, True)]
        beginnings = [decode(asked, row["prompt_ids"]) for row in tokenize_sft(rows, asked)]
        assert ["[polite]" in text for text in beginnings] == [False, True]
        with pytest.raises(ValueError, match="reads no 'polight'"):
            encoder(polight=True).prompt([USER])
        config = arguments.parse(
            SFTConfig, ["--output_dir", "x", "--chat_template_kwargs", '{"polite": true}'], command="sft"
        )
        assert config.chat_template_kwargs == {"polite": True}

    def test_prompts_of_the_policy(self, encoder):
        encode = encoder()
        rows = [{"prompt": [USER], "tools": TOOLS}, {"prompt": [USER], "tools": None}]
        with_tools, without = load_prompts(rows, encode.tokenizer, 64, template_options={"polite": True})
        assert with_tools.text == "[tool]look[polite][user]is it good</s>[assistant]"
        assert without.text == "[polite][user]is it good</s>[assistant]"

    def test_long_prompts_lose_their_oldest_turns(self, encoder):
        """And stay conversations: for the policy and, by its own template, for the reward."""
        tokenizer = encoder().tokenizer
        system, last = {"role": "system", "content": "be fun"}, {"role": "user", "content": "and the film so long"}
        row = {"prompt": [system, USER, REPLY, last], "tools": TOOLS}
        (whole,) = load_prompts([row], tokenizer, 500)
        assert whole.messages == row["prompt"]
        (prompt,) = load_prompts([row], tokenizer, len(whole.ids) - 1)
        assert prompt.text == "[tool]look[system]be fun</s>[user]and the film so long</s>[assistant]"
        assert list(prompt.messages) == [system, last]
        limit = len(prompt.ids) - 4
        (prompt,) = load_prompts([row], tokenizer, limit)
        assert len(prompt.ids) <= limit
        left = prompt.messages[-1]["content"]
        assert last["content"].endswith(left)
        assert 0 < len(left) < len(last["content"])
        assert prompt.text == f"[tool]look[system]be fun</s>[user]{left}</s>[assistant]"
        with pytest.raises(ValueError, match=r"row 0 .*system, tools\) is too long"):
            load_prompts([row], tokenizer, 5)

    def test_template_of_a_file_or_of_another_tokenizer(self, encoder, tiny_model, tmp_path):
        (tmp_path / "chat.jinja").write_text(WHOLE)
        encoder(WHOLE).tokenizer.save_pretrained(tmp_path / "other")
        rows = [{"messages": [USER, REPLY]}]
        for path in (tmp_path / "chat.jinja", tmp_path / "other"):
            args = SFTConfig(
                output_dir=str(tmp_path / "run"),
                chat_template_path=str(path),
                chat_template_kwargs={"polite": True},
                use_cpu=True,
                report_to=[],
            )
            trainer = SFTTrainer(tiny_model(), args, rows, processing_class=encoder(None).tokenizer)
            ids = trainer.train_dataset[0]["prompt_ids"]
            assert trainer.processing_class.decode(ids) == "<s>[polite][user]is it good</s>[assistant]"
            trainer.save_model()
            assert "polite" in (tmp_path / "run" / "chat_template.jinja").read_text()
        (tmp_path / "none").mkdir()
        encoder(None).tokenizer.save_pretrained(tmp_path / "none")
        for path, message in ((tmp_path / "absent.jinja", "existing file"), (tmp_path / "none", "has none")):
            args = SFTConfig(output_dir="x", chat_template_path=str(path), use_cpu=True, report_to=[])
            with pytest.raises(ValueError, match=f"chat_template_path .*{message}"):
                SFTTrainer(tiny_model(), args, rows, processing_class=encoder(None).tokenizer)


class TestRewardModel:
    OTHER = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )

    @pytest.fixture
    def reward(self, encoder, tmp_path):
        """A function that makes the reward of a model whose tokenizer has that template, and notes what it reads."""

        def make(template):
            tokenizer = encoder(template).tokenizer
            config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=1, n_positions=64, num_labels=1)
            config.pad_token_id = tokenizer.pad_token_id
            torch.manual_seed(0)
            GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "reward")
            tokenizer.save_pretrained(tmp_path / "reward")
            return ModelReward(str(tmp_path / "reward"), device=torch.device("cpu"), dtype=torch.float32, batch_size=1)

        return make

    @torch.no_grad()
    def score_of(self, model, ids):
        return float(model.score(model.transformer(torch.tensor([ids])).last_hidden_state)[0, -1, 0])

    def test_it_reads_its_own_template(self, encoder, reward):
        """Not the policy's, whatever that writes."""
        model = reward(self.OTHER)
        ids = model.tokenizer("<user>is it good<end><assistant>it is great<end>")["input_ids"]
        expected = self.score_of(model.model, ids)
        for template in (PLAIN, "<policy>" + PLAIN, self.OTHER):
            policy = encoder(template).tokenizer
            (prompt,) = load_prompts([{"prompt": [USER]}], policy, 64)
            assert float(model([Episode(prompt, [], "it is great", True)])) == pytest.approx(expected, rel=1e-5)

    def test_a_response_that_did_not_end_gets_no_end(self, encoder, reward):
        model = reward(self.OTHER)
        ids = model.tokenizer("<user>is it good<end><assistant>it is")["input_ids"]
        expected = self.score_of(model.model, ids)
        (prompt,) = load_prompts([{"prompt": [USER]}], encoder(PLAIN).tokenizer, 64)
        assert float(model([Episode(prompt, [], "it is", False)])) == pytest.approx(expected, rel=1e-5)

    def test_one_without_a_template_is_refused(self, encoder, reward):
        (prompt,) = load_prompts([{"prompt": [USER]}], encoder(PLAIN).tokenizer, 64)
        with pytest.raises(ValueError, match="reward_model must have a chat template"):
            reward(None)([Episode(prompt, [], "it is", False)])


class TestEvaluation:
    @pytest.fixture
    def place(self, encoder, tiny_model, tmp_path):
        tiny_model().save_pretrained(tmp_path / "one")
        encoder(PLAIN).tokenizer.save_pretrained(tmp_path / "one")
        return tmp_path

    def run(self, place, rows, **keys):
        (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        dataset = str(place / "rows.jsonl")
        config = EvalConfig(
            models=[str(place / "one")], dataset=dataset, max_new_tokens=3, samples_per_prompt=1, **keys
        )
        return evaluate(config)[str(place / "one")]

    def test_what_is_compared_with_is_what_the_reply_says(self, place, monkeypatch):
        (place / "judge_of_chats.py").write_text(
            "SHOWN = []\n\n\ndef score(prompts, completions):\n    SHOWN.append(completions)\n"
            "    return [0.0 for _ in completions]\n"
        )
        monkeypatch.syspath_prepend(str(place))
        keys = {"against": "completion", "judge": "judge_of_chats:score"}
        for column in ("completion", "chosen"):
            self.run(place, [{"prompt": [USER], column: [REPLY]}], **keys)
        shown = importlib.import_module("judge_of_chats").SHOWN
        assert [list(texts) for texts in shown[1::2]] == [["it is great"]] * 2  # first the model's, then the row's
        for reply in ([REPLY, USER], [{**REPLY, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}]):
            with pytest.raises(ValueError, match=r"row 0 .*messages"):
                self.run(place, [{"prompt": [USER], "completion": reply}], **keys)

    def test_conversations_are_written_out_for_judges(self, tiny_model, encoder):
        encode, seen = encoder(PLAIN), []

        def score(texts):
            seen.extend(texts)
            return [float(len(t)) for t in texts]

        how = {"per_prompt": 1, "how": Sampling(3, 8), "seed": 0}
        found = measure(tiny_model(), tiny_model(), encode.tokenizer, [[USER]], {"length": score}, **how)
        assert seen == [f"user: is it good\nassistant: {found.samples[0][0].text}"]
        drawn = [[Sample([], [], text, True) for text in ("a", "b")]]
        ranked_samples([[USER]], drawn, score)
        assert seen[1:] == ["user: is it good\nassistant: a", "user: is it good\nassistant: b"]

    def test_labels_are_found_whatever_keys_other_rows_have(self, tmp_path):
        row = {"prompt": [USER], "first": "a", "second": "b", "preference": "first"}
        (tmp_path / "labels.jsonl").write_text(json.dumps(row) + "\n")
        labels = HumanLabels(str(tmp_path / "labels.jsonl"))
        assert labels([[{**USER, "tool_calls": None}]], ["a"], ["b"]).tolist() == [1.0]
