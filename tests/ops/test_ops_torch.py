"""token_stats as a citizen of PyTorch: operators, compile, autograd's rules, in-place gradients, bad input."""

import subprocess
import sys
import tempfile

import pytest
import torch
from torch.testing._internal.logging_tensor import LoggingTensorMode, capture_logs
from torch.utils.checkpoint import checkpoint

import fastalign as fa
from fastalign.ops.sequences import sequence_sums

OPS = torch.ops.fastalign


def problem(dtype=torch.float32, rows=6, vocab=30):
    g = torch.Generator().manual_seed(3)
    x = torch.randn(rows, vocab, generator=g).to(dtype).requires_grad_()
    labels = torch.randint(0, vocab, (rows,), generator=g)
    labels[1] = -100
    return x, labels


def gradient(x, labels, **options):
    stats = fa.token_stats(x, labels, **options)
    return torch.autograd.grad(sum(s.sum() for s in stats if s is not None), x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("with_ref", [False, True])
def test_opcheck(dtype, with_ref):
    x, labels = problem(dtype)
    ref = x.detach().flip(0) if with_ref else None
    args = (x, labels, ref, -100, 0.9, 4.0, True, True, False)
    torch.library.opcheck(OPS.token_stats, args)
    with torch.no_grad():
        logps, _, entropy, kl, _, saved, *_ = OPS.token_stats(*args)
    g = torch.ones_like(logps)
    backward = (x.detach(), labels, ref, saved, entropy, kl if with_ref else None, g, g, g, g if with_ref else None, g)
    torch.library.opcheck(OPS.token_stats_backward, (*backward, -100, 0.9, 4.0))
    torch.library.opcheck(OPS.token_stats_backward_, (x.detach().clone(), *backward[1:], -100, 0.9, 4.0))


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_a_graph_break(inplace, dynamic):
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=dynamic)
    def loss(x, labels, ref):
        stats = fa.token_stats(
            2 * x, labels, ref_logits=ref, kl=True, entropy=True, label_smoothing=0.1, inplace_backward=inplace
        )
        return stats.logps.sum() + stats.entropy.sum() + (stats.kl * stats.lse).sum()

    for rows in (6, 9):
        x, labels = problem(rows=rows)
        ref = x.detach().flip(0)
        got = torch.autograd.grad(loss(x, labels, ref), x)[0]
        want = torch.autograd.grad(loss._torchdynamo_orig_callable(x, labels, ref), x)[0]
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-7)


def test_inplace_backward_writes_over_the_logits_and_says_so():
    x, labels = problem()
    logits = x * 1
    version = logits._version
    logps = fa.token_logps(logits, labels, inplace_backward=True)
    (grad,) = torch.autograd.grad(logps.sum(), logits)
    assert grad.data_ptr() == logits.data_ptr()
    assert logits._version > version
    assert torch.equal(grad, torch.autograd.grad(fa.token_logps(x, labels).sum(), x)[0])


def test_inplace_backward_makes_a_later_use_of_the_old_values_raise():
    x, labels = problem()
    logits = x * 1
    other = logits.exp().sum() + logits.square().sum()  # square saves its input
    logps = fa.token_logps(logits, labels, inplace_backward=True)
    logps.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        other.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_default_backward_leaves_the_logits_alone():
    x, labels = problem()
    before, version = x.detach().clone(), x._version
    gradient(x, labels, entropy=True)
    assert torch.equal(x.detach(), before)
    assert x._version == version


def test_modifying_the_logits_before_backward_raises():
    x, labels = problem()
    logits = x * 1
    logps = fa.token_logps(logits, labels)
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logps.sum().backward()


def test_double_backward_is_refused_with_the_way_out():
    x, labels = problem()
    (grad,) = torch.autograd.grad(fa.token_logps(x, labels).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiated once only.*log_softmax"):
        grad.sum().backward()


def test_no_grad_and_inference_mode():
    x, labels = problem()
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            assert not fa.token_logps(x, labels).requires_grad


def test_unused_outputs_need_no_gradient():
    x, labels = problem()
    stats = fa.token_stats(x, labels, entropy=True)
    (grad,) = torch.autograd.grad(stats.entropy.sum(), x)
    p = torch.softmax(x.detach(), -1)
    want = p * ((p * p.log()).sum(-1, keepdim=True) - p.log())
    want[1] = 0
    torch.testing.assert_close(grad, want, rtol=1e-5, atol=1e-7)


def test_gradient_checkpointing():
    x, labels = problem()
    direct = gradient(x, labels)

    def loss(x):
        stats = fa.token_stats(x, labels)
        return stats.logps.sum() + stats.lse.sum()

    (again,) = torch.autograd.grad(checkpoint(loss, x, use_reentrant=False), x)
    assert torch.equal(direct, again)


def test_autocast():
    x, labels = problem()
    weight = torch.randn(30, 30)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = x @ weight
        assert logits.dtype == torch.bfloat16
        logps = fa.token_logps(logits, labels)
    assert logps.dtype == torch.float32
    logps.sum().backward()
    assert x.grad.dtype == torch.float32


def test_backend_may_change_between_forward_and_backward():
    x, labels = problem(rows=40, vocab=700)
    grads = []
    for forward, backward in (("eager", "eager"), ("eager", None), (None, "eager"), (None, None)):
        with fa.use_backend(forward):
            stats = fa.token_stats(x, labels, entropy=True, temperature=0.8)
        with fa.use_backend(backward):
            grads.append(torch.autograd.grad(stats.logps.sum() + stats.entropy.sum(), x)[0])
    for g in grads[1:]:
        torch.testing.assert_close(g, grads[0], rtol=1e-5, atol=2e-7)


# ------------------------------------------------------------------------------------------------- bad input
X, L = torch.randn(3, 8), torch.tensor([1, 2, 3])
BAD = {
    "label too large": (
        (X, torch.tensor([1, 8, 3])),
        {},
        ValueError,
        r"labels must be in \[0, 8\).*got 8 at flat position 1",
    ),
    "label negative": ((X, torch.tensor([1, 2, -1])), {}, ValueError, "got -1 at flat position 2"),
    "old ignore index": ((X, torch.tensor([1, -100, 3])), {"ignore_index": 0}, ValueError, "got -100"),
    "label dtype": ((X, L.float()), {}, TypeError, "labels must be int64 or int32; got torch.float32"),
    "label bool": ((X, L.bool()), {}, TypeError, "labels must be int64 or int32"),
    "integer logits": ((X.long(), L), {}, TypeError, "logits must be float32.*got torch.int64"),
    "complex logits": ((X + 0j, L), {}, TypeError, "logits must be float32"),
    "shape": ((X, L[:2]), {}, ValueError, r"labels must have the shape.*\[3\]; got \[2\]"),
    "labels with vocabulary": ((X, X.long()), {}, ValueError, "labels must have the shape"),
    "empty vocabulary": ((X[:, :0], L), {}, ValueError, "non-empty vocabulary"),
    "scalar logits": ((torch.tensor(1.0), torch.tensor(0)), {}, ValueError, "non-empty vocabulary"),
    "device": ((X, L.to("meta")), {}, ValueError, "labels must be on the device of logits, cpu; got meta"),
    "not a tensor": (([[1.0]], L), {}, TypeError, "logits must be a torch.Tensor; got list"),
    "label list": ((X, [1, 2, 3]), {}, TypeError, "labels must be a torch.Tensor; got list"),
    "temperature zero": (
        (X, L),
        {"temperature": 0.0},
        ValueError,
        "temperature must be a finite number above 0; got 0.0",
    ),
    "temperature negative": ((X, L), {"temperature": -1.0}, ValueError, "temperature"),
    "temperature nan": ((X, L), {"temperature": float("nan")}, ValueError, "temperature"),
    "temperature inf": ((X, L), {"temperature": float("inf")}, ValueError, "temperature"),
    "softcap zero": ((X, L), {"softcap": 0.0}, ValueError, "softcap"),
    "softcap nan": ((X, L), {"softcap": float("nan")}, ValueError, "softcap"),
    "softcap inf": ((X, L), {"softcap": float("inf")}, ValueError, "softcap"),
    "smoothing": ((X, L), {"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
    "kl without reference": ((X, L), {"kl": True}, ValueError, "kl=True needs ref_logits"),
    "reference without kl": ((X, L), {"ref_logits": X}, ValueError, "kl=False"),
    "reference shape": (
        (X, L),
        {"ref_logits": X[:2], "kl": True},
        ValueError,
        "ref_logits must have the shape of logits",
    ),
    "reference dtype": (
        (X, L),
        {"ref_logits": X.half(), "kl": True},
        TypeError,
        "ref_logits must have the dtype of logits",
    ),
    "reference device": (
        (X, L),
        {"ref_logits": X.to("meta"), "kl": True},
        ValueError,
        "ref_logits must be on the device",
    ),
    "reference type": ((X, L), {"ref_logits": 1.0, "kl": True}, TypeError, "ref_logits must be a torch.Tensor"),
    "reference gradient": ((X, L), {"ref_logits": X.clone().requires_grad_(), "kl": True}, ValueError, "detach"),
    "expanded in place": ((X[:1].expand(3, 8), L), {"inplace_backward": True}, ValueError, "do not share memory"),
}


@pytest.mark.parametrize("backend", ["cpu", "eager"])
@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_named(name, backend):
    args, options, error, message = BAD[name]
    with fa.use_backend(backend), pytest.raises(error, match=message):
        fa.token_stats(*args, **options)


def test_the_operators_check_too():
    """Called without the wrapper, by itself: still nothing unchecked reaches a pointer."""
    with pytest.raises(TypeError, match="labels must be int64"):
        OPS.token_stats(X, X[:, 0], None, -100, 1.0, 0.0, False, False, False)
    saved = OPS.token_stats(X, L, None, -100, 1.0, 0.0, False, False, False)[5]
    g = torch.ones(3)
    rest = (-100, 1.0, 0.0)
    with pytest.raises(ValueError, match="labels must be in"):
        OPS.token_stats_backward(X, L + 7, None, saved, None, None, g, None, None, None, None, *rest)
    with pytest.raises(ValueError, match="saved must"):
        OPS.token_stats_backward(X, L, None, saved[:2], None, None, g, None, None, None, None, *rest)
    with pytest.raises(ValueError, match="g_logps must"):
        OPS.token_stats_backward(X, L, None, saved, None, None, g[:1], None, None, None, None, *rest)
    with pytest.raises(ValueError, match="g_entropy"):
        OPS.token_stats_backward(X, L, None, saved, None, None, None, None, g, None, None, *rest)


def test_one_openmp_runtime_in_the_process():
    """A second runtime would mean a second pool of threads beside torch's."""
    code = (
        "import torch, fastalign as fa\n"
        "x = torch.randn(512, 4000)\n"
        "fa.token_logps(x, torch.zeros(512, dtype=int)), x.exp()\n"
        "names = ('libgomp', 'libiomp', 'libomp')\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if any(n in line for n in names)}))"
    )
    if not sys.platform.startswith("linux"):
        pytest.skip("needs /proc/self/maps, which this system does not have")
    # Not in the source tree, whose fastalign/ would come before the installed one.
    options = {"capture_output": True, "text": True, "check": True, "cwd": tempfile.gettempdir()}
    out = subprocess.run([sys.executable, "-c", code], **options)
    assert out.stdout.strip() == "1"


@pytest.mark.parametrize("change", [torch.Tensor.half, lambda t: t[:1]], ids=["half", "short"])
def test_saved_tensors_that_a_hook_changed_are_refused(change):
    """They reach the kernel as raw pointers."""
    x, labels = problem()
    own = (len(labels), 4)  # what the forward keeps of each row
    with torch.autograd.graph.saved_tensors_hooks(lambda t: change(t) if t.shape == own else t, lambda t: t):
        total = fa.token_stats(x, labels, entropy=True).entropy.sum()
    with pytest.raises(ValueError, match=r"saved must be torch.float32 \[6, 4\] on cpu; got torch.float"):
        total.backward()


@pytest.mark.parametrize("loss", [lambda x, y: fa.token_logps(x, y).sum(), fa.cross_entropy], ids=["logps", "mean"])
def test_labels_that_a_hook_changed_are_refused(loss):
    x, labels = problem()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t[:1] if t.shape == labels.shape else t, lambda t: t):
        total = loss(x, labels)
    with pytest.raises(ValueError, match="labels must"):
        total.backward()


def test_a_reference_that_a_hook_moved_is_refused():
    """Elsewhere it has no memory that the kernel could read."""
    logits, labels, ref = torch.randn(3, 9, requires_grad=True), torch.tensor([0, 4, 8]), torch.full((3, 9), 3.0)
    moved = lambda t: t.to("meta") if t.shape == ref.shape and bool((t == 3).all()) else t  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t, moved):
        kl = fa.token_stats(logits, labels, kl=True, ref_logits=ref).kl
    with pytest.raises(ValueError, match="ref_logits must be on the device of logits, cpu; got meta"):
        kl.sum().backward()


# ------------------------------------------------------------------------------------------ the direct path on a CPU
def watched(function, x, labels, monkeypatch):
    """The same by the checks and operations of the general path."""
    with monkeypatch.context() as patch:
        patch.setattr(fa._backends, "direct", lambda tensor: None)
        return function(x, labels)


SUMS = {
    "logps": lambda x, y: fa.token_logps(x, y),
    "logps and lse": lambda x, y: torch.stack(fa.token_stats(x, y)[:2]),
    "logps and lse, one used": lambda x, y: fa.token_stats(x, y).lse,
    "in place": lambda x, y: fa.token_logps(x * 1, y, inplace_backward=True),
    "capped": lambda x, y: fa.token_logps(x, y, temperature=0.7, softcap=3.0, ignore_index=-100),
    "sums": lambda x, y: fa.sequence_logps(x, y),
    "wide sums": lambda x, y: fa.sequence_logps(x, y, dtype=torch.float64),
    "sums in place": lambda x, y: fa.sequence_logps(x * 1, y, inplace_backward=True),
    "halves": lambda x, y: torch.cat(sequence_sums(x, y, 2, torch.float32)),
    "a half": lambda x, y: sequence_sums(x, y, 2)[1],
    "strided": lambda x, y: fa.sequence_logps(x.transpose(1, 2).contiguous().transpose(1, 2), y),
    "strided labels": lambda x, y: fa.token_logps(x, torch.stack([y, y], -1)[..., 0]),
    "int32": lambda x, y: fa.sequence_logps(x, y.int()),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", SUMS)
def test_the_direct_road_is_the_general_one_to_the_bit(name, dtype, monkeypatch):
    draw = torch.Generator().manual_seed(5)
    x = torch.randn(4, 3, 50, generator=draw).mul(3).to(dtype).requires_grad_()
    labels = torch.randint(50, (4, 3), generator=draw)
    labels[1, :2] = -100
    found, want = SUMS[name](x, labels), watched(SUMS[name], x, labels, monkeypatch)
    assert torch.equal(found, want)
    weights = torch.randn(found.shape, generator=draw).to(found.dtype)
    for g in (weights, torch.ones(()).to(found.dtype).expand(found.shape)):  # dense, and one number in all places
        grads = [torch.autograd.grad(SUMS[name](x, labels), x, g)[0]]
        with monkeypatch.context() as patch:
            patch.setattr(fa._backends, "direct", lambda tensor: None)
            grads.append(torch.autograd.grad(SUMS[name](x, labels), x, g)[0])
        assert torch.equal(*grads)


def test_what_leaves_the_direct_road():
    """Modes see the operators; a second derivative is refused; changed logits are noticed."""
    x, labels = problem()
    x2, labels2 = x.detach().view(2, 3, 30).requires_grad_(), labels.view(2, 3)
    for function in (SUMS["logps"], SUMS["sums"], SUMS["halves"]):
        with LoggingTensorMode(), capture_logs() as log:
            function(x2, labels2).sum().backward()
        assert any("fastalign.token_stats_backward" in line for line in log)
        (grad,) = torch.autograd.grad(function(x2, labels2).sum(), x2, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiated once only"):
            grad.sum().backward()
        logits = x2 * 1
        total = function(logits, labels2).sum()
        logits.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            total.backward()
        found = torch.func.grad(lambda x, f=function: f(x, labels2).sum())(x2.detach())
        torch.testing.assert_close(found, grad.detach())


@pytest.mark.parametrize("name", ["logps", "sums", "halves"])
def test_bad_labels_on_the_direct_road(name):
    x = torch.randn(2, 2, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"labels must be in \[0, 8\).*got 8 at flat position 3"):
        SUMS[name](x, torch.tensor([[0, -100], [7, 8]]))
