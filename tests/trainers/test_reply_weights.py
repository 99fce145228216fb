"""Weights of replies in supervised fine-tuning: from a message's `weight` to the loss, whatever the batching."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")

from fastalign.trainers.common.callbacks import LOG_NAME, read_log
from fastalign.trainers.data.encode import Encoder
from fastalign.trainers.data.tokenize import tokenize_preferences, tokenize_sft
from fastalign.trainers.sft import SFTConfig, SFTTrainer

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
USER = {"role": "user", "content": "the movie"}


def reply(text, weight=None):
    return {"role": "assistant", "content": text, **({} if weight is None else {"weight": weight})}


CHATS = [
    {"messages": [USER, reply("is good", 0.5), USER, reply("is a dull film"), USER, reply("is long", 2.0)]},
    {"messages": [USER, reply("is great", 3), USER, reply("is bad", 0)]},
    {"messages": [USER, reply("is awful , awful and bad")]},
]


@pytest.fixture
def tokenizer(tiny_tokenizer):
    found = type(tiny_tokenizer)(
        tokenizer_object=tiny_tokenizer.backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    found.chat_template = TEMPLATE
    return found


@pytest.fixture
def make(tiny_model, tokenizer, tmp_path):
    def build(rows, **options):
        shared = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "save_strategy": "no", "disable_tqdm": True}
        shared |= {"logging_steps": 1, "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_steps": 1}
        shared |= {"optim": "sgd", "max_grad_norm": 0.0, "train_sampling_strategy": "sequential"}
        return SFTTrainer(tiny_model(), SFTConfig(**{**shared, **options}), rows, None, tokenizer)

    return build


def by_hand(model, rows, sequences, loss_type):
    """The weighted mean by torch, one row at a time without padding."""
    losses, weights = [], []
    for row in rows:
        ids = torch.tensor([[*row["prompt_ids"], *row["completion_ids"]]])
        with torch.no_grad():
            logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(-1)
        logps = logps[len(row["prompt_ids"]) - 1 :]
        losses.append(-logps * (logps.exp() if loss_type == "dft" else 1))
        weights.append(torch.tensor(row["weights"]))
    if sequences:
        return float(torch.stack([(x * w).sum() / w.sum() for x, w in zip(losses, weights, strict=True)]).mean())
    return float((torch.cat(losses) * torch.cat(weights)).sum() / torch.cat(weights).sum())


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("normalization", ["token", "sequence"])
def test_the_loss_is_the_weighted_mean(make, tiny_model, tokenizer, normalization, loss_type, padding_side):
    rows = list(tokenize_sft(CHATS, Encoder(tokenizer, 1024)))
    want = by_hand(tiny_model(), rows, normalization == "sequence", loss_type)
    after = []
    for size, steps in ((3, 1), (1, 3), (2, 2)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        options |= {"normalization": normalization, "loss_type": loss_type, "padding_side": padding_side}
        trainer = make(CHATS, **options)
        trainer.train()
        line = read_log(os.path.join(trainer.args.output_dir, LOG_NAME))[0]
        assert line["loss"] == pytest.approx(want, rel=1e-4)
        after.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters()]))
    for other in after[1:]:
        torch.testing.assert_close(other, after[0], rtol=1e-4, atol=1e-6)


def test_tokens_have_the_weight_of_their_reply(tokenizer):
    (first, *_) = tokenize_sft(CHATS, Encoder(tokenizer, 1024))
    said = {}
    for token, own, weight in zip(first["completion_ids"], first["own"], first["weights"], strict=True):
        assert own == (weight > 0)
        said[weight] = said.get(weight, "") + tokenizer.decode([token])
    assert said[0.5].replace(" ", "") == "isgood</s>"
    assert said[1.0].replace(" ", "") == "isadullfilm</s>"
    assert said[2.0].replace(" ", "") == "islong</s>"


def test_rows_without_weights_of_their_own_have_no_column(tokenizer):
    plain = [{"messages": [USER, reply("is good", 1), USER, reply("is bad", 0), USER, reply("is long")]}]
    assert "weights" not in tokenize_sft(plain, Encoder(tokenizer, 1024)).column_names


def test_what_is_refused(make, tokenizer):
    with pytest.raises(ValueError, match=r"row 0 .*weights of 0 or more; one message has -1"):
        tokenize_sft([{"messages": [USER, reply("is good", -1)]}], Encoder(tokenizer, 1024))
    pair = {"prompt": [USER], "chosen": [reply("is good", 0.5)], "rejected": [reply("is bad")]}
    with pytest.raises(ValueError, match=r"row 0 .*compared must have weights of 0 or 1; one has 0.5"):
        tokenize_preferences([pair], Encoder(tokenizer, 1024))
    with pytest.raises(ValueError, match="packing must be false for rows whose messages have weights"):
        make(CHATS, packing=True)
