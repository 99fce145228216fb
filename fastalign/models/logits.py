"""A language model's logits for a batch: the tensor, or what stands in its place in a loss so that it is never formed.

The statistics are computed inside the model's own forward call, so whatever wraps the model (DDP, FSDP, autocast, LoRA)
sees one ordinary forward pass: weights are gathered around it and gradients synchronised after it. For that a causal
language model's forward takes one more keyword, `request`; without it, it is what it was.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..head.head import Head
from ..ops.statistics import TokenStats, token_stats
from .headless import Headless
from .lm_head import unwrapped
from .shared_prompts import PromptSharing

T = TypeVar("T")

MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
GROUPS = "groups"
"""Key of a batch, beside the model's inputs: see `ask`."""


class Request(NamedTuple):
    """What a forward pass is asked for in place of logits."""

    labels: Tensor | None = None
    """[B, T]: statistics of these; None: the head."""
    objective: Callable[[Head], Any] | None = None
    """In place of statistics: what this makes of the head, within the model's forward."""
    options: Mapping[str, Any] = {}
    """Of `head_token_stats`."""
    hidden: bool = False
    """The hidden states too."""
    head: bool = False
    """The head too, where labels are given."""
    alone: bool = False
    """Its hidden states are to lie as the batch does, as a reference's do."""


class Answer(NamedTuple):
    """What came of a `Request`."""

    stats: TokenStats | None = None
    logits: Tensor | None = None
    """[B, T, V], where nothing was requested in their place."""
    head: Head | None = None
    """The head, with the hidden states that it would take, where no labels were given or it was asked for."""
    hidden: Tensor | None = None
    """[B, T, H], the last hidden states."""
    values: Tensor | None = None
    """[B, T], of a model with a value function."""
    output: Any = None
    """What an objective returned."""


# ----------------------------------------------------------------------------------------------------- plain logits
def model_logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits [B, T, V] of a model that takes `input_ids`, `attention_mask` and, if it knows them, `position_ids`."""
    return run_model(model, batch).logits


def run_model(model: Any, batch: Mapping[str, Tensor], **options: Any) -> Any:
    """The model's output for a padded batch."""
    kind: Any = type(unwrapped(model))
    names = _inputs(kind)
    return model(**{name: batch[name] for name in names if name in batch}, use_cache=False, **options)


@functools.cache
def _inputs(cls: Any) -> tuple[str, ...]:
    """Inputs that the class's forward names (ALiBi models take no positions)."""
    names = inspect.signature(cls.forward).parameters  # type: ignore[attr-defined]
    return tuple(name for name in MODEL_INPUTS if name in names)


# ------------------------------------------------------------------------------------------------- never formed logits
def can_answer(model: Any) -> bool:
    """Makes the model take requests, if its head can be read; False, and no change, for one whose head cannot.

    To be asked before accelerate wraps the model: a forward that was put around the model's own for mixed precision
    would hide the new one, and the answer is False as well.
    """
    return _answering(model) is not None


def _answering(model: Any) -> _Answering | None:
    """The model's forward that takes requests, put in place if need be; None if it cannot be."""
    inner: Any = unwrapped(model)
    forward = vars(inner).get("forward")
    while hasattr(forward, "__wrapped__"):  # by accelerate, for mixed precision
        forward = forward.__wrapped__
    if forward is not None:
        return forward if isinstance(forward, _Answering) else None
    try:
        return _Answering(inner)
    except ValueError:
        return None


def prompt_sharing(model: Any, *, anew: bool = False) -> PromptSharing | str:
    """How the model runs prompts once, or why it cannot. Found out once, before anything wraps the model.

    anew: once more, since the model may have changed: new adapters, with dropout or without, another attention.
    """
    forward = _answering(model)
    if forward is None:
        return "its head is not known"
    if forward.sharing is None or anew:
        try:
            kind: Any = type(forward.model)
            if "position_ids" not in _inputs(kind):
                raise ValueError(f"{kind.__name__} takes no position_ids")
            forward.sharing = PromptSharing(model, lambda batch: ask(model, batch, Request()).head.hidden)  # type: ignore[union-attr]
        except ValueError as error:
            forward.sharing = str(error)
    return forward.sharing


def shares_prompts(model: Any, args: Any, device: torch.device) -> bool:
    """Whether a trainer shares prompts: as configured; unless told, on a CPU where the model can.

    Args:
        model: not wrapped yet.
        args: a configuration with `share_prompts` and `fused_head`.

    Raises:
        ValueError: it is told to, and the model cannot.
    """
    if args.share_prompts is False or (args.share_prompts is None and (device.type != "cpu" or not args.fused_head)):
        return False
    found = prompt_sharing(model, anew=True) if args.fused_head else "it needs fused_head"
    if args.share_prompts and isinstance(found, str):
        raise ValueError(f"share_prompts must be false here: {found}")
    return not isinstance(found, str)


class _Answering(Headless):
    """A forward that takes one more keyword, `request`; without it, it is the model's own."""

    sharing: PromptSharing | str | None = None
    """Once it was asked for; where it cannot be, the reason."""

    def __call__(self, *args: Any, request: Request | None = None, **inputs: Any) -> Any:
        if request is None:
            return self._forward(*args, **inputs)
        with _returned(self.model.base_model) if request.hidden else contextlib.nullcontext([None]) as last:
            head = self.take(self.run(*args, **inputs).logits, softcap=self.softcap)
        if request.labels is None:
            return Answer(head=head, hidden=last[0])
        options = dict(request.options)
        chosen = head._replace(rows=options.pop("rows", None), chunk_bytes=options.pop("chunk_bytes", None))
        found = Answer(head=head if request.head else None, hidden=last[0])
        if request.objective is not None:
            return found._replace(output=request.objective(chosen))
        return found._replace(stats=chosen.stats(request.labels, **options))


@contextlib.contextmanager
def _returned(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the module returns first: of a model's body its last hidden states."""
    found: list[Tensor] = []
    hook = module.register_forward_hook(lambda *call: found.append(call[2][0]))
    try:
        yield found
    finally:
        hook.remove()


class ModelLogits:
    """Stands in place of logits [B, T, V] in a loss, which asks it for their statistics.

    Args:
        call: a request, or None for logits, to its answer: one forward pass.
        model: the language model that it runs, wrapped or not.
        shape: [B, T] of the batch.
        fused: never form the logits, if the model's head can be read; else they are formed whole.
        chunk_bytes: as in `head_token_stats`.
    """

    def __init__(
        self,
        call: Callable[[Request | None], Answer],
        model: Any,
        shape: torch.Size,
        *,
        fused: bool = True,
        chunk_bytes: int | None = None,
    ) -> None:
        inner: Any = unwrapped(model)
        self._call, self._model, self._rows = call, inner, shape
        self.fused, self._chunk_bytes = fused and can_answer(model), chunk_bytes
        self.answer = Answer()
        """The last forward pass's."""

    @property
    def shape(self) -> torch.Size:
        """That of the logits."""
        return torch.Size((*self._rows, self._model.get_output_embeddings().weight.shape[0]))

    def stats(
        self, labels: Tensor, *, ref_logits: ModelLogits | None = None, inplace_backward: bool = False, **options: Any
    ) -> TokenStats:
        """Token statistics, from one forward pass of the model, and one of the reference if one is given.

        The gradient of logits that are formed nevertheless is written over them: nobody else has them.
        """
        if not self._fused_with(ref_logits):
            reference = None if ref_logits is None else ref_logits.logits()
            self.answer = self._call(None)
            logits: Any = self.answer.logits
            return token_stats(logits, labels, ref_logits=reference, inplace_backward=True, **options)
        if ref_logits is not None:
            options |= _reference(ref_logits.head())
        return self._ask(labels, options)

    @torch.no_grad()
    def with_reference(
        self, reference: ModelLogits, labels: Tensor, *, temperature: float = 1.0
    ) -> tuple[TokenStats, TokenStats]:
        """Constants, of one forward pass of either model.

        Args:
            temperature: divides both models' logits.

        Returns:
            (own statistics with the entropy and the exact KL to the reference, the reference's own).
        """
        more: dict[str, Any] = {"kl": True, "entropy": True, "temperature": temperature}
        if not self._fused_with(reference):
            logits = reference.logits()
            theirs = token_stats(logits, labels, temperature=temperature)
            return token_stats(self.logits(), labels, ref_logits=logits, **more), theirs
        theirs = reference._ask(labels, {"temperature": temperature}, head=True)
        return self._ask(labels, {**more, **_reference(reference.answer.head)}), theirs

    def gives_head(self, reference: Any) -> bool:
        """Whether `loss` can be called, with the logits of this reference or None."""
        return self._fused_with(reference) if reference is None or isinstance(reference, ModelLogits) else False

    def loss(self, labels: Tensor, objective: Callable[[Head, Head | None], T], reference: ModelLogits | None) -> T:
        """What the objective makes of the model's head and the reference's, within the model's own forward."""
        theirs = None if reference is None else reference.head()
        options: dict[str, Any] = {"chunk_bytes": self._chunk_bytes}
        request = Request(labels, lambda head: objective(head, theirs), options, alone=theirs is not None)
        self.answer = self._call(request)
        return self.answer.output

    def _fused_with(self, reference: ModelLogits | None) -> bool:
        """Whether neither model's logits are formed: heads side by side must scale and cap their logits alike."""
        if reference is None or not (self.fused and reference.fused):
            return self.fused and reference is None
        ours, theirs = _answering(self._model), _answering(reference._model)
        alike = ours is not None and theirs is not None
        return alike and (ours.scale, ours.softcap) == (theirs.scale, theirs.softcap)  # type: ignore[union-attr]

    def _ask(self, labels: Tensor, options: Mapping[str, Any], *, head: bool = False) -> TokenStats:
        """Statistics from one forward pass, which is kept as `answer`."""
        options = {**options, "chunk_bytes": self._chunk_bytes}
        self.answer = self._call(Request(labels, None, options, head=head, alone="ref_hidden" in options))
        if self.answer.stats is None:
            raise RuntimeError("the model gave no statistics")
        return self.answer.stats

    def formed(self) -> Tensor:
        """The tensor itself, from one forward pass."""
        self.answer = self._call(None)
        return self.answer.logits  # type: ignore[return-value]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """The tensor itself, a constant, from one forward pass."""
        return self._call(None).logits  # type: ignore[return-value]

    @torch.no_grad()
    def head(self) -> Head:
        """The head and the hidden states of one forward pass: constants, for a reference."""
        return self._call(Request()).head  # type: ignore[return-value]


def _reference(head: Any) -> dict[str, Any]:
    """A reference's head as `head_token_stats` takes it."""
    return {"ref_hidden": head.hidden, "ref_weight": head.weight, "ref_bias": head.bias}


def ask(model: nn.Module, batch: Mapping[str, Tensor], request: Request | None, groups: Tensor | None = None) -> Answer:
    """One forward pass of a language model; over a prompt once for all the sequences of a group, where that pays."""
    if request is None:
        return Answer(logits=model_logits(model, batch))
    # Hidden states that are handed out lie as the batch does, and so must those of a policy and its reference.
    handed_out = request.labels is None or request.head or request.hidden or request.alone
    if groups is not None and not handed_out:
        sharing = prompt_sharing(model)
        shared = sharing(model, batch, groups) if isinstance(sharing, PromptSharing) else None
        if shared is not None:
            request = request._replace(options={**request.options, "rows": shared.rows})
            batch = shared.inputs
    return run_model(model, batch, request=request)


def logits_of(
    model: nn.Module, batch: Mapping[str, Tensor], *, groups: Tensor | None = None, **options: Any
) -> ModelLogits:
    """What a loss takes for the model's logits of a padded batch; options as in `ModelLogits`.

    groups: [B], int64: sequences of one group, which may begin alike, have one number; None: nothing is shared.
    """
    call = functools.partial(ask, model, batch, groups=groups)
    return ModelLogits(call, model, batch["input_ids"].shape, **options)
