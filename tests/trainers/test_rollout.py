"""Rollouts: responses that depend on the seed alone, log-probabilities and values at the right tokens, rewards."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("accelerate", reason="needs accelerate (the extra `train`)")

from transformers import GPT2Config, GPT2ForSequenceClassification

from fastalign.evaluation.sampling import sample
from fastalign.models.actor_critic import ActorCritic, policy_logits, with_values
from fastalign.models.logits import logits_of
from fastalign.models.sampling import Draw, Sampling, up_to_end
from fastalign.trainers.policy.rewards import FunctionReward, ModelReward, load_function
from fastalign.trainers.policy.rollout import Episode, Prompt, fill_in, generate, load_prompts, prompt_order

TEXTS = ["the movie", "a", "a great film and great fun", "a dull film ,"]


@pytest.fixture
def prompts(tiny_tokenizer):
    return load_prompts([{"prompt": text} for text in TEXTS], tiny_tokenizer, 64)


@pytest.fixture
def sharp(tiny_model):
    """A model whose distributions differ from token to token."""
    model = tiny_model().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


def keys(prompts):
    return [(0, i) for i in range(len(prompts))]


def ids(episodes):
    return [e.ids for e in episodes]


class TestSampling:
    def test_draws_follow_the_distribution(self):
        """Frequencies within 5 standard errors of the probabilities; a token of probability 0 never comes."""
        generator = torch.Generator().manual_seed(0)
        scores = torch.tensor([1.0, -torch.inf, 0.0, 2.0, -3.0, -torch.inf])
        uniforms = torch.rand(40_000, 1, generator=generator, dtype=torch.float64)
        drawn = Draw(uniforms, 3)(torch.zeros(40_000, 3), scores.repeat(40_000, 1)).argmax(-1)
        p = scores.softmax(-1)
        share = torch.bincount(drawn, minlength=6) / 40_000
        assert ((share - p).abs() <= 5 * (p * (1 - p) / 40_000).sqrt()).all()

    def test_extreme_uniform_numbers_draw_possible_tokens(self):
        scores = torch.tensor([[-torch.inf, 0.0, 1.0, -torch.inf]]).repeat(2, 1)
        draw = Draw(torch.tensor([[0.0], [1.0]], dtype=torch.float64), 0)
        assert draw(torch.zeros(2, 0), scores).argmax(-1).tolist() == [1, 2]

    @pytest.mark.parametrize("checks", [True, False])
    def test_a_response_beyond_the_positions_is_refused(self, tiny_model, tiny_tokenizer, checks):
        """On a device, too, that cannot say so without being lost to the process, as a GPU."""
        model = tiny_model()
        limit = model.config.max_position_embeddings
        if not checks:
            rows = model.transformer.wpe.weight
            model.transformer.wpe.forward = lambda ids: rows[ids.clamp(max=limit - 1)]
        long = [Prompt([5] * (limit - 2), "", {})]
        with pytest.raises(
            ValueError, match=rf"the model's {limit} positions; got a prompt of {limit - 2} tokens and up"
        ):
            generate(model, tiny_tokenizer, long, [(0, 0)], Sampling(20))

    def test_responses_do_not_depend_on_batch_padding_or_global_seed(self, sharp, tiny_tokenizer, prompts):
        together = generate(sharp, tiny_tokenizer, prompts, keys(prompts), Sampling(8, batch_size=4))
        torch.manual_seed(123)
        for size in (1, 3):
            again = generate(sharp, tiny_tokenizer, prompts, keys(prompts), Sampling(8, batch_size=size))
            assert ids(again) == ids(together)
        backwards = generate(sharp, tiny_tokenizer, prompts[::-1], keys(prompts)[::-1], Sampling(8))
        assert ids(backwards[::-1]) == ids(together)
        assert ids(generate(sharp, tiny_tokenizer, prompts, keys(prompts), Sampling(8), seed=1)) != ids(together)
        other = generate(sharp, tiny_tokenizer, prompts, [(1, i) for i in range(4)], Sampling(8))
        assert ids(other) != ids(together)

    def test_the_models_own_generation_settings_are_set_aside(self, sharp, tiny_tokenizer, prompts):
        before = generate(sharp, tiny_tokenizer, prompts, keys(prompts), Sampling(8))
        sharp.generation_config.update(repetition_penalty=5.0, do_sample=True, temperature=0.1, min_new_tokens=7)
        settings = sharp.generation_config
        assert ids(generate(sharp, tiny_tokenizer, prompts, keys(prompts), Sampling(8))) == ids(before)
        assert sharp.generation_config is settings

    @pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}])
    def test_options_are_honoured(self, sharp, tiny_tokenizer, prompts, options):
        """Each of them, at its limit, is the likeliest token; found here one prompt at a time, without cache."""
        episodes = generate(sharp, tiny_tokenizer, prompts, keys(prompts), Sampling(5, **options))
        for e in episodes:
            so_far = list(e.prompt.ids)
            for token in e.ids:
                with torch.no_grad():
                    assert token == int(sharp(torch.tensor([so_far])).logits[0, -1].argmax())
                so_far.append(token)

    def test_a_response_ends_with_its_first_end_of_sequence_token(self, tiny_tokenizer):
        eos, word = tiny_tokenizer.eos_token_id, tiny_tokenizer(" good", add_special_tokens=False)["input_ids"]
        assert tiny_tokenizer.pad_token_id == eos
        assert up_to_end([*word, eos, eos, eos], [eos]) == ([*word, eos], True)
        assert up_to_end([*word, *word], [eos]) == ([*word, *word], False)
        assert up_to_end([*word, 7, *word, eos], [7, eos]) == ([*word, 7], True)

    @pytest.mark.parametrize("adapted", [False, True])
    def test_ends_of_turns_end_responses_in_every_sampler(self, sharp, tiny_tokenizer, prompts, adapted):
        """A generation config with several end tokens, as Gemma's: `ppo` and `grpo` stop where `sample` does."""
        free = generate(sharp, tiny_tokenizer, prompts, keys(prompts), Sampling(8))
        stops = sorted({e.ids[2] for e in free})
        plain = [next((k for k, i in enumerate(e.ids) if i in stops), None) for e in free]
        sharp.generation_config.eos_token_id = [tiny_tokenizer.eos_token_id, *stops]
        model = sharp
        if adapted:
            peft = pytest.importorskip("peft", reason="needs peft (the extra `train`)")
            model = peft.get_peft_model(sharp, peft.LoraConfig(r=2, target_modules="all-linear"))
        found = generate(model, tiny_tokenizer, prompts, keys(prompts), Sampling(8))
        assert ids(found) == [e.ids[: end + 1] for e, end in zip(free, plain, strict=True)]
        assert all(e.ended for e in found)
        drawn = sample(model, tiny_tokenizer, ["the movie"] * 3, per_prompt=2, how=Sampling(8, temperature=2.0))
        for one in (s for each in drawn for s in each):
            assert one.finished == (one.ids[-1] in (tiny_tokenizer.eos_token_id, *stops))
            assert not set(one.ids[:-1]) & set(stops)


def logits_from(model, values=False):
    """A padded batch to what stands for the policy's logits."""
    args = SimpleNamespace(fused_head=True, chunk_bytes=None)
    return lambda batch: policy_logits(model, batch, values, args)


class TestScoring:
    @pytest.fixture
    def episodes(self, sharp, tiny_tokenizer, prompts):
        return generate(sharp, tiny_tokenizer, prompts, keys(prompts), Sampling(7))

    def logits(self, model, e: Episode, temperature: float = 1.0) -> torch.Tensor:
        """[n, V], of the response's tokens, from one unpadded row."""
        with torch.no_grad():
            return model(torch.tensor([e.prompt.ids + e.ids])).logits[0, len(e.prompt.ids) - 1 : -1] / temperature

    @pytest.mark.parametrize("exact", [False, True])
    def test_log_probabilities_entropy_and_kl(self, sharp, tiny_model, tiny_tokenizer, episodes, exact):
        other = tiny_model().eval()
        fill_in(
            episodes,
            logits_from(ActorCritic(sharp)),
            functools.partial(logits_of, other),
            fill=1,
            device=torch.device("cpu"),
            temperature=0.7,
            exact_kl=exact,
            batch_size=3,
        )
        assert len({len(e.prompt.ids) for e in episodes}) > 1
        for e in episodes:
            p, q = (self.logits(m, e, 0.7).log_softmax(-1) for m in (sharp, other))
            at = torch.tensor(e.ids)[:, None]
            torch.testing.assert_close(e.logps, p.gather(1, at)[:, 0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(e.entropy, -(p.exp() * p).sum(-1), rtol=1e-4, atol=1e-4)
            assert (e.kl is not None) is exact
            assert (e.ref_logps is None) is exact
            if not exact:
                torch.testing.assert_close(e.ref_logps, q.gather(1, at)[:, 0], rtol=1e-4, atol=1e-4)
            if exact:
                torch.testing.assert_close(e.kl, (p.exp() * (p - q)).sum(-1), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("source", ["separate", "shared"])
    def test_values_are_those_of_the_states_before_the_tokens(self, sharp, episodes, source):
        model = with_values(sharp, source, torch.float32).eval()
        policy = logits_from(model, values=True)
        fill_in(episodes, policy, None, fill=1, device=torch.device("cpu"))
        assert all((e.values == 0).all() and len(e.values) == len(e.ids) for e in episodes)
        with torch.no_grad():
            model.value_head.weight.copy_(torch.linspace(-1, 1, 16)[None])
        fill_in(episodes, policy, None, fill=1, device=torch.device("cpu"), batch_size=2)
        for e in episodes:
            with torch.no_grad():
                hidden = sharp.transformer(torch.tensor([e.prompt.ids + e.ids])).last_hidden_state[0]
            expected = (hidden @ torch.linspace(-1, 1, 16))[len(e.prompt.ids) - 1 : -1]
            torch.testing.assert_close(e.values, expected, rtol=1e-4, atol=1e-4)


class TestPrompts:
    def test_long_prompts_lose_their_beginning(self, tiny_tokenizer):
        (long,) = load_prompts([{"prompt": TEXTS[2]}], tiny_tokenizer, 5)
        whole = tiny_tokenizer(TEXTS[2])["input_ids"]
        assert long.ids == [whole[0], *whole[-4:]]
        # The reward is shown what the policy saw, no more.
        assert long.text == tiny_tokenizer.decode(long.ids[1:])
        assert TEXTS[2].endswith(long.text)
        assert long.text != TEXTS[2]

    def test_chat_messages_go_through_the_template(self, tiny_tokenizer):
        import copy

        chatty = copy.deepcopy(tiny_tokenizer)
        chatty.chat_template = (
            "{% for m in messages %}[{{ m['content'] }}]{% endfor %}{% if add_generation_prompt %}>{% endif %}"
        )
        (prompt,) = load_prompts([{"prompt": [{"role": "user", "content": "a film"}]}], chatty, 64)
        assert prompt.text == "[a film]>"
        assert prompt.ids == chatty("[a film]>", add_special_tokens=False)["input_ids"]

    def test_order_visits_every_prompt_once_an_epoch(self):
        whole = prompt_order(7, 0, 21, seed=3)
        assert all(sorted(whole[i : i + 7]) == list(range(7)) for i in (0, 7, 14))
        assert [*prompt_order(7, 0, 4, 3), *prompt_order(7, 4, 9, 3), *prompt_order(7, 13, 8, 3)] == whole
        assert prompt_order(7, 0, 21, seed=4) != whole


def made(prompt: str, text: str, ended: bool = True, **columns) -> Episode:
    return Episode(Prompt([0], prompt, columns), [1], text, ended)


class TestRewards:
    EPISODES = (
        made("the", " movie", answer=3),
        made("a great", " film and fun", answer=5),
        made("a", " dull", False, answer=1),
    )

    def test_function_gets_what_it_names(self):
        reward = FunctionReward(lambda completions, answer, unused=2: [len(c) - a for c, a in zip(completions, answer)])  # noqa: B905
        assert reward.columns == ["answer"]
        assert reward(self.EPISODES).tolist() == [3.0, 8.0, 4.0]
        assert FunctionReward(lambda prompts: [len(p) for p in prompts])(self.EPISODES).tolist() == [3.0, 7.0, 1.0]

    @pytest.mark.parametrize(
        ("function", "message"),
        [
            (lambda prompts: [1.0], "must return 3 numbers; got 1"),
            (lambda prompts: 1.0, "must return 3 numbers; got 1.0"),
            (lambda prompts: None, "must return 3 numbers; got None"),
            (lambda prompts: [[0.0], [0.0, 1.0], []], "number 0 of 3 .* is \\[0.0\\]"),
            (lambda prompts: ["1", "2", "3"], "number 0 of 3 .* is '1'"),
            (lambda prompts: [0, 1, float("nan")], "number 2 of 3 .* is nan, for the prompt 'a' and .* ' dull'"),
            (lambda prompts: [0, float("-inf"), 0], "number 1 of 3 .* is -inf, for the prompt 'a great'"),
        ],
    )
    def test_what_a_function_returns_is_checked(self, function, message):
        with pytest.raises(ValueError, match=message):
            FunctionReward(function)(self.EPISODES)

    def test_the_number_that_is_none_is_named_wherever_it_is(self):
        """Of twenty, number 11: not the first eight, among which it is not."""
        with pytest.raises(
            ValueError, match=r"number 11 of 20 .* is nan, for the prompt 'p11' and the completion 'c11'"
        ):
            FunctionReward(lambda prompts: [float("nan") if i == 11 else 0.5 for i in range(len(prompts))])(
                [made(f"p{i}", f"c{i}") for i in range(20)]
            )

    def test_a_parameter_with_a_default_gets_its_column_where_there_is_one(self):
        def score(completions, answer=None, scale=1):
            return [len(c) * scale - (a or 0) for c, a in zip(completions, answer or [0] * 3, strict=True)]

        reward = FunctionReward(score)
        assert (reward.columns, reward.optional) == ([], ["answer", "scale"])
        assert reward(self.EPISODES).tolist() == [3.0, 8.0, 4.0]
        assert reward([made("a", "abc")] * 3).tolist() == [3.0] * 3

    def test_a_function_with_keywords_gets_every_column(self):
        """TRL's style: prompts, completions, their ids and all columns."""
        seen = {}

        def score(completions, **kwargs):
            seen.update(kwargs)
            return [0.0] * len(completions)

        reward = FunctionReward(score)
        assert reward.optional is None
        reward(self.EPISODES)
        assert seen == {"prompts": ["the", "a great", "a"], "completion_ids": [[1]] * 3, "answer": [3, 5, 1]}

    def test_columns_reach_the_function_through_the_prompts(self, tiny_tokenizer):
        rows = [{"prompt": "the", "answer": 7, "other": "x"}]
        assert load_prompts(rows, tiny_tokenizer, 9)[0].columns == {}
        assert load_prompts(rows, tiny_tokenizer, 9, optional=["answer", "absent"])[0].columns == {"answer": 7}
        assert load_prompts(rows, tiny_tokenizer, 9, optional=None)[0].columns == {"answer": 7, "other": "x"}
        with pytest.raises(ValueError, match="lacks absent"):
            load_prompts(rows, tiny_tokenizer, 9, ["absent"], optional=None)

    def test_none_says_that_the_reward_does_not_apply(self):
        scores = FunctionReward(lambda prompts: [1.0, None, 2.0])(self.EPISODES).tolist()
        assert scores[::2] == [1.0, 2.0]
        assert math.isnan(scores[1])
        both = FunctionReward(lambda prompts: [1.0, None, None], lambda completions: [1, 2, None])(
            self.EPISODES
        ).tolist()
        assert both[:2] == [2.0, 2.0]
        assert math.isnan(both[2])

    def test_what_fails_inside_is_told_with_its_place(self, tmp_path):
        path = tmp_path / "broken.py"
        path.write_text("import json\n\n\ndef score(completions):\n    return [json.loads(c) for c in completions]\n")
        reward = FunctionReward(load_function(f"{path}:score"))
        with pytest.raises(
            ValueError, match=r"reward_fn score failed in .*broken.py, line 5 .*json.loads.*: JSONDecodeEr"
        ):
            reward(self.EPISODES)

    def test_what_cannot_be_called_by_names_is_refused(self):
        async def later(completions):
            return []

        for function, message in {
            (lambda *lists: []): "must name its parameters",
            later: "asynchronous",
            7: "must be a function; got int",
        }.items():
            with pytest.raises(TypeError, match=message):
                FunctionReward(function)

    def test_two_nameless_parameters_are_prompts_and_completions(self):
        reward = FunctionReward(lambda p, c: [len(a) - len(b) for a, b in zip(p, c, strict=True)])
        assert reward(self.EPISODES).tolist() == [-3.0, -6.0, -4.0]

    def test_functions_are_found_in_modules_and_files(self, tmp_path):
        path = tmp_path / "rewards.py"
        path.write_text("def length(completions):\n    return [len(c) for c in completions]\n")
        assert load_function(f"{path}:length")(["ab"]) == [2]
        assert load_function("math:sqrt")(4) == 2
        for spec, message in {
            "math": "must be module:function",
            "math:absent": "no function 'absent'",
            "no_such_module_here:f": "cannot be imported",
            f"{tmp_path}/absent.py:f": "cannot be imported",
        }.items():
            with pytest.raises(ValueError, match=message):
                load_function(spec)

    @pytest.fixture
    def reward_model(self, tiny_tokenizer, tmp_path):
        torch.manual_seed(0)
        config = GPT2Config(
            vocab_size=len(tiny_tokenizer), n_embd=16, n_layer=1, n_head=1, n_positions=64, num_labels=1
        )
        config.pad_token_id = tiny_tokenizer.pad_token_id
        model = GPT2ForSequenceClassification(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(5)
        model.save_pretrained(tmp_path / "reward")
        tiny_tokenizer.save_pretrained(tmp_path / "reward")
        return str(tmp_path / "reward")

    def test_model_scores_the_last_real_token(self, reward_model, tiny_tokenizer):
        """Alone, together, in any batch: the score at the end, which is the end-of-sequence token of those that ended,
        although that token is also the padding."""
        expected = []
        for e in self.EPISODES:
            row = tiny_tokenizer(e.prompt.text + e.text)["input_ids"] + [tiny_tokenizer.eos_token_id] * e.ended
            reward = ModelReward(reward_model, device=torch.device("cpu"), dtype=torch.float32)
            with torch.no_grad():
                hidden = reward.model.transformer(torch.tensor([row])).last_hidden_state
                expected.append(float(reward.model.score(hidden)[0, -1, 0]))
        for size in (1, 2, 3):
            reward = ModelReward(reward_model, device=torch.device("cpu"), dtype=torch.float32, batch_size=size)
            assert reward(self.EPISODES).tolist() == pytest.approx(expected, rel=1e-4)

    def test_model_with_several_outputs_is_refused(self, tiny_tokenizer, tmp_path):
        config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=1, num_labels=2)
        GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match="must have one output"):
            ModelReward(str(tmp_path), device=torch.device("cpu"), dtype=torch.float32)
