"""Judges of pairs (scores, people, a chat model behind a local server) and the win rates that they amount to."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
pytest.importorskip("datasets", reason="needs datasets (the extra `train`)")
pytest.importorskip("sklearn", reason="needs scikit-learn (the extra `train`)")

from fastalign.evaluation.chat_judge import ChatJudge
from fastalign.evaluation.evaluate import EvalConfig, evaluate
from fastalign.evaluation.judges import HumanLabels, ScoreJudge, load_pair_judge
from fastalign.evaluation.winrate import length_matched, win_rate


def by_length(prompts, answers):
    return np.array([float(len(a)) for a in answers])


class Order:
    """A judge that always prefers what it is shown first, or with a taste, what contains it."""

    positional = True

    def __init__(self, taste=None):
        self.taste, self.calls = taste, 0

    def __call__(self, prompts, first, second):
        self.calls += 1
        if self.taste is None:
            return np.ones(len(first))
        return np.array(
            [0.5 + 0.5 * ((self.taste in a) - (self.taste in b)) for a, b in zip(first, second, strict=True)]
        )


class TestWinRate:
    def test_wins_ties_and_losses(self):
        found = win_rate(ScoreJudge(by_length), ["p", "q", "r"], ["aaa", "aa", "a"], ["a", "bb", "bb"])
        assert (found.wins, found.ties, found.losses) == (1 / 3, 1 / 3, 1 / 3)
        assert found.rate.mean == 0.5
        assert found.consistency is None
        wide = win_rate(ScoreJudge(by_length, tie_margin=1), ["p", "q", "r"], ["aaa", "aa", "a"], ["a", "bb", "bb"])
        assert (wide.wins, wide.ties, wide.losses) == (1 / 3, 2 / 3, 0)

    def test_a_judge_who_likes_a_place_counts_for_nothing(self):
        judge = Order()
        found = win_rate(judge, ["p"] * 4, ["x"] * 4, ["y"] * 4)
        assert judge.calls == 2
        assert (found.rate.mean, found.ties, found.consistency, found.first_position) == (0.5, 1.0, 0.0, 1.0)

    def test_a_judge_with_a_taste_is_consistent(self):
        found = win_rate(Order("good"), ["p", "q"], ["good", "bad"], ["bad", "good"])
        assert (found.wins, found.losses, found.consistency, found.first_position) == (0.5, 0.5, 1.0, 0.5)

    def test_one_reference_text_stands_against_every_sample(self):
        found = win_rate(ScoreJudge(by_length), ["p", "q"], [["aaa", "a"], ["aa", "aaaa"]], ["bb", "bb"])
        np.testing.assert_array_equal(found.outcomes, [[1, 0], [0.5, 1]])

    def test_uneven_answers_are_refused(self):
        for ours in (["a"], [["a", "b"], ["a", "b", "c"]], [[], []]):
            with pytest.raises(ValueError, match="answer"):
                win_rate(ScoreJudge(by_length), ["p", "q"], ours, ["b", "b"] if ours != [[], []] else [[], []])

    def test_length_matched_leaves_only_pairs_of_one_length(self):
        outcomes = np.array([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
        ours, theirs = np.array([[10, 30], [20, 20], [30, 10]]), np.full((3, 2), 10)
        assert length_matched(outcomes, ours, theirs).mean == 0.5  # [1] of the first prompt, [0] of the third
        assert np.isnan(length_matched(outcomes[1:2], ours[1:2], theirs[1:2]).mean)


class TestHumanLabels:
    def write(self, path, *rows):
        names = ("prompt", "first", "second", "preference")
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
        return str(path)

    def test_several_people_in_either_order_are_averaged(self, tmp_path):
        rows = [("p", "a", "b", "first"), ("p", "b", "a", "second"), ("p", "a", "b", "tie"), ("q", "c", "d", "second")]
        judge = load_pair_judge(self.write(tmp_path / "labels.jsonl", *rows))
        assert judge(["p", "p", "q"], ["a", "b", "c"], ["b", "a", "d"]) == pytest.approx([5 / 6, 1 / 6, 0])

    def test_mistakes_are_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"row 1 \(from 0\) must be one of first, second, tie; got 'both'"):
            HumanLabels(self.write(tmp_path / "a.jsonl", ("p", "a", "b", "tie"), ("p", "a", "b", "both")))
        (tmp_path / "b.jsonl").write_text('{"prompt": "p"}\n')
        with pytest.raises(ValueError, match=r"row 0 \(from 0\) must be a JSON object"):
            HumanLabels(str(tmp_path / "b.jsonl"))
        judge = HumanLabels(self.write(tmp_path / "c.jsonl", ("p", "a", "b", "tie")))
        with pytest.raises(ValueError, match="no label of the pair 'a' and 'c'"):
            judge(["p"], ["a"], ["c"])


@pytest.fixture
def server():
    """A local endpoint of the OpenAI form; `.reply` takes a request's body and gives (status, headers, content)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            place.seen.append((self.path, dict(self.headers), body))
            status, headers, content = place.reply(body)
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    place = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    place.seen, place.url = [], f"http://127.0.0.1:{place.server_address[1]}/v1"
    thread = threading.Thread(target=place.serve_forever)
    thread.start()
    yield place
    place.shutdown()
    thread.join()
    place.server_close()


def said(text):
    return 200, {}, {"choices": [{"message": {"role": "assistant", "content": text}}]}


def prefers_good(body):
    """Reads the question as a judge would: the answer with the word good in it wins."""
    question = body["messages"][0]["content"]
    first, second = question.split("Answer A:")[1].split("Compare")[0].split("Answer B:")
    verdict = "A" if "good" in first and "good" not in second else "B" if "good" in second else "tie"
    return said(f"VERDICT: X is not one.\nThe words decide.\nVERDICT: {verdict}")


class TestChatJudge:
    def test_request_and_verdicts(self, server, monkeypatch):
        server.reply = prefers_good
        monkeypatch.setenv("FASTALIGN_JUDGE_KEY", "secret")
        judge = load_pair_judge(server.url + "/", model="m")
        found = win_rate(judge, ["p {second}"] * 3, ["good", "bad", "so"], ["bad", "a good one", "so"])
        assert (found.wins, found.losses, found.ties, found.consistency) == (1 / 3, 1 / 3, 1 / 3, 1.0)
        path, headers, body = server.seen[0]
        assert path == "/v1/chat/completions"
        assert headers["Authorization"] == "Bearer secret"
        assert (body["model"], body["temperature"], len(body["messages"])) == ("m", 0.0, 1)
        assert "p {second}" in body["messages"][0]["content"]
        assert len(server.seen) == 6  # both orders

    def test_no_verdict_is_a_tie_and_counted(self, server):
        server.reply = lambda body: said("I would rather not say")
        judge = ChatJudge(server.url, "m")
        assert judge(["p"], ["a"], ["b"]).tolist() == [0.5]
        assert judge.unread == 1

    def test_passing_failures_are_tried_again(self, server):
        replies = iter([(503, {}, {"error": "busy"}), (429, {"Retry-After": "0"}, {}), said("VERDICT: **B**")])
        server.reply = lambda body: next(replies)
        assert ChatJudge(server.url, "m", wait=0.01)(["p"], ["a"], ["b"]).tolist() == [0.0]
        assert len(server.seen) == 3

    def test_what_fails_for_good_says_why(self, server):
        server.reply = lambda body: (401, {}, {"error": "no key"})
        with pytest.raises(ValueError, match=r"refused the request \(401\).*no key"):
            ChatJudge(server.url, "m")(["p"], ["a"], ["b"])
        server.reply = lambda body: (200, {}, {"choices": []})
        with pytest.raises(ValueError, match=r"must answer with choices\[0\]"):
            ChatJudge(server.url, "m")(["p"], ["a"], ["b"])
        server.reply = lambda body: (200, {}, b"<html>")
        with pytest.raises(ValueError, match="must answer with JSON"):
            ChatJudge(server.url, "m")(["p"], ["a"], ["b"])
        server.reply = lambda body: (500, {}, {"error": "down"})
        with pytest.raises(OSError, match="in 2 tries: 500"):
            ChatJudge(server.url, "m", retries=1, wait=0.01)(["p"], ["a"], ["b"])

    def test_bad_input(self):
        with pytest.raises(ValueError, match="url must begin with http"):
            ChatJudge("localhost", "m")
        with pytest.raises(ValueError, match="model must be the judge's name"):
            load_pair_judge("http://localhost/v1")
        with pytest.raises(ValueError, match=r"lacks.*second"):
            ChatJudge("http://localhost/v1", "m", template="{prompt} {first}")
        with pytest.raises(ValueError, match="tie_margin must be at least 0"):
            ScoreJudge(by_length, -1)


def test_eval_with_a_judge_a_reference_and_the_rows_own_completions(server, tiny_model, tiny_tokenizer, tmp_path):
    server.reply = prefers_good
    for name, scale in (("one", 1.0), ("two", 6.0)):
        model = tiny_model()
        model.lm_head.weight.data.mul_(scale)
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
    rows = [{"prompt": "the movie", "chosen": " is good"}, {"prompt": "a", "chosen": " b"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    config = EvalConfig(
        models=[one, two],
        dataset=str(tmp_path / "rows.jsonl"),
        judge=server.url,
        judge_model="m",
        against="completion",
        reference=one,
        max_new_tokens=4,
    )
    found = evaluate(config)
    for figures in found.values():
        assert figures["losses"] >= 0.5  # the first row's own completion has the word that this judge likes
        assert figures["consistency"] == 1
    assert found[one]["kl"]["mean"] == pytest.approx(0, abs=1e-6)
    assert found[two]["kl"]["mean"] > 0.01
    assert abs(found[two]["kl_k3"]["mean"] - found[two]["kl"]["mean"]) < 5 * found[two]["kl_k3"]["se"] + 0.05
    with pytest.raises(ValueError, match="temperature must be above 0"):
        EvalConfig(models=[one], dataset="rows.jsonl", reference=one, temperature=0)
