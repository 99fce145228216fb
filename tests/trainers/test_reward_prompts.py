"""The prompts that a reward function is given: what the data's rows have, in training and in evaluation alike."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("accelerate", reason="needs accelerate (the extra `train`)")

from fastalign.cli import commands as cli
from fastalign.demo.models import train_tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}[assistant]"
    "{% endif %}"
)
SYSTEM = {"role": "system", "content": "be fun"}
FIRST, REPLY, LAST = (
    {"role": role, "content": text}
    for role, text in (("user", "is it good"), ("assistant", "it is great"), ("user", "and the film"))
)
PROMPTS = {
    "text": ["the movie", "a film", "is"],
    "messages": [[SYSTEM, FIRST], [FIRST, REPLY, LAST], [LAST]],
    "parts": [[{"role": "user", "content": [{"type": "text", "text": "is it"}]}]],
}
JUDGE = """
import json

def score(prompts, completions):
    assert all(isinstance(text, str) for text in completions)
    with open({path!r}, "a") as file:
        file.writelines(json.dumps(prompt) + chr(10) for prompt in prompts)
    return [float(len(text)) for text in completions]
"""


@pytest.fixture
def seen(tiny_model, tmp_path):
    """A function that runs a command on rows of prompts, and gives the prompts that its reward function was shown."""
    texts = ["the movie is good", "the movie is bad", "a great film and great fun", "a dull film , awful and long"]
    tokenizer = train_tokenizer(texts * 3, vocab_size=300)
    tokenizer.chat_template = TEMPLATE
    tiny_model().save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    log = tmp_path / "seen.jsonl"
    (tmp_path / "judge.py").write_text(JUDGE.format(path=str(log)))

    def run(command, prompts, *more):
        log.unlink(missing_ok=True)
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
        argv = [command, "--dataset", str(tmp_path / "rows.jsonl")]
        if command == "eval":
            argv += ["--models", str(tmp_path / "m"), "--reward", f"{tmp_path}/judge.py:score", "--max_new_tokens", "3"]
        else:
            argv += ["--model", str(tmp_path / "m"), "--reward_fn", f"{tmp_path}/judge.py:score", "--use_cpu"]
            argv += [
                "--output_dir",
                str(tmp_path / command),
                "--overwrite_output_dir",
                "--disable_tqdm",
                "true",
                "--response_length",
                "3",
            ]
            argv += ["--total_episodes", "12", "--per_device_train_batch_size", "4", "--num_generations", "2"]
        assert cli.main([*argv, *more]) == 0
        return set(log.read_text().splitlines())

    return run


@pytest.mark.parametrize("form", PROMPTS)
def test_training_and_evaluation_show_the_rows_own_prompts(seen, form):
    wanted = {json.dumps(prompt) for prompt in PROMPTS[form]}
    assert {command: seen(command, PROMPTS[form]) for command in ("grpo", "ppo", "eval")} == dict.fromkeys(
        ("grpo", "ppo", "eval"), wanted
    )


def test_what_the_policy_does_not_see_is_not_shown_either(seen):
    """Whole turns of a conversation go, and what is left is one; a text loses its beginning."""
    assert seen("grpo", [[FIRST, REPLY, LAST]], "--max_prompt_length", "24") == {json.dumps([LAST])}
    (shown,) = seen("grpo", ["the movie is good and long and awful"], "--max_prompt_length", "5")
    assert "the movie is good and long and awful".endswith(json.loads(shown))
    assert len(json.loads(shown)) < 20
