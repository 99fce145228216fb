"""A template that knows all that messages hold, rows with calls of tools, and encoders: for the tests of chats."""

from fastalign.demo.models import train_tokenizer
from fastalign.trainers.data.encode import Encoder

WHOLE = (
    "{% for t in tools or [] %}[tool]{{ t.function.name }}{% endfor %}{% if polite %}[polite]{% endif %}"
    "{% for m in messages %}[{{ m.role }}]{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}"
    "{{ m.content or '' }}{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}</s>{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
USER, REPLY = {"role": "user", "content": "is it good"}, {"role": "assistant", "content": "it is great"}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]


def call(**given):
    return {"role": "assistant", "content": "so", "tool_calls": [{"function": {"name": "look", "arguments": given}}]}


def make_encoder(template=WHOLE, **options):
    texts = ["the movie is good", "the movie is bad", "a great film and great fun", "a dull film , awful and long"]
    tokenizer = train_tokenizer(texts * 3, vocab_size=300)
    tokenizer.chat_template = template
    return Encoder(tokenizer, 500, **({"template_options": options} if options else {}))


def decode(encode, ids):
    return encode.tokenizer.decode(ids)
