"""A GPU that is not there: tensors that say cuda:0, and are computed on the CPU.

It fails where a GPU would: when the tensors of an operation lie on two devices, when a generator
belongs to another device, when something waits while a graph is recorded, when a recurrent network
is differentiated that was not run for training. It counts what would be launched, and which lines
of the program would wait for the device. A recorded graph repeats its operations on the tensors
that it was recorded with, like a real one.

What it cannot show: speed, memory, the rounding of real kernels, races between streams.
"""
import contextlib
import sys
import traceback
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = torch.device("cuda:0")
HALVES = (torch.float16, torch.bfloat16)
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward"}
# What autocast computes in half, and what in full precision.
LOWERED = ((F, "linear"), (F, "conv2d"), (F, "scaled_dot_product_attention"), (torch, "matmul"),
           (torch, "bmm"), (torch, "baddbmm"))
RAISED = ((F, "layer_norm"), (F, "log_softmax"), (F, "cross_entropy"))
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim",
           "unique_consecutive", "equal", "repeat_interleave", "bincount"}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"}
FREE = {"detach", "alias", "_unsafe_view", "empty", "empty_like", "new_empty", "empty_strided",
        "new_empty_strided"}
REAL_LSTM, REAL_GENERATOR = torch._VF.lstm, torch.Generator


class Gpu:
    """What has happened on it."""

    def __init__(self):
        self.launches, self.waits, self.calls = 0, Counter(), Counter()
        self.recording = None  # of a graph: [(operation, its arguments, what came out)]
        self.generators = {}  # its own
        self.halves = []  # what autocast rounds to, by depth
        self.undo = []  # recording only notes: what was changed meanwhile is changed back

    @property
    def half(self):
        """What autocast rounds to now, if anything."""
        return self.halves[-1] if self.halves else None

    def wait(self, kind):
        """The program waits here until the device has done all it was asked for."""
        if self.recording is not None:
            raise RuntimeError(f"{kind}: operation not permitted when stream is capturing")
        lines = [frame for frame in traceback.extract_stack()
                 if "deep_learning_deliverable" in frame.filename]
        self.waits[f"{kind}: {lines[-1].line}" if lines else kind] += 1


GPU = Gpu()


class Cuda(torch.Tensor):
    """Says that it lies on the GPU; its numbers are in `inner`, on the CPU."""

    @staticmethod
    def __new__(cls, inner):
        with torch._C._DisableTorchDispatch():
            shape = torch.empty_strided(inner.size(), inner.stride(), dtype=inner.dtype,
                                        device="meta")
            made = torch.Tensor._make_subclass(cls, shape, False, device_for_backend_keys=DEVICE)
        made.inner = inner
        return made

    device = property(lambda self: DEVICE)
    is_cuda = property(lambda self: True)
    is_meta = property(lambda self: False)

    def __matmul__(self, other):
        return torch.matmul(self, other)

    def softmax(self, *options):
        return torch.Tensor.softmax(self.whole(), *options)

    def norm(self, *options, **more):
        return torch.Tensor.norm(self.whole(), *options, **more)

    def whole(self):
        return self.float() if GPU.half and self.dtype in HALVES else self

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self, **_):
        return f"Cuda({self.inner})"

    def __deepcopy__(self, memo):
        return self.detach().clone().requires_grad_(self.requires_grad)

    def __reduce_ex__(self, protocol):  # what a file keeps
        return self.inner.__reduce_ex__(protocol)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return compute(function, args, kwargs or {})


def on_gpu(x):
    return isinstance(x, Cuda)


def tree_map(function, some):
    """The function of all that is in lists, tuples and dictionaries; PyTorch's own is slower."""
    if isinstance(some, dict):
        return {key: tree_map(function, x) for key, x in some.items()}
    if isinstance(some, (list, tuple)):
        return (list if isinstance(some, list) else tuple)(tree_map(function, x) for x in some)
    return function(some)


def tree_leaves(some):
    found = []
    for x in some:
        if isinstance(x, (list, tuple)):
            found += tree_leaves(x)
        elif isinstance(x, dict):
            found += tree_leaves(x.values())
        else:
            found.append(x)
    return found


def check_devices(name, function, args, leaves, here):
    """Fail where a GPU would; note where a GPU would be waited for."""
    def fail(what):
        raise RuntimeError(f"Expected all tensors to be on the same device: {function} has {what}")

    for generator in leaves:
        if isinstance(generator, REAL_GENERATOR):
            if here and GPU.recording is not None:
                fail("a generator that the graph does not know")
            if (generator._cdata in GPU.generators) != here:
                fail("a generator of another device")
    ours = [x for x in leaves if on_gpu(x)]
    others = [x for x in leaves if isinstance(x, torch.Tensor) and not on_gpu(x) and x.ndim]
    if not ours or name in ("_to_copy", "copy_"):
        return
    if name in INDEXING:
        for place in args[1]:
            if place is not None and not on_gpu(place):
                GPU.wait("an index on the CPU")
            elif place is not None and place.dtype in (torch.bool, torch.uint8):
                GPU.wait("a mask as an index")
        others = [x for x in others if not any(x is place for place in args[1])]
        if not on_gpu(args[0]):
            fail("an index on the GPU")
    if others:
        fail(f"{[tuple(x.shape) for x in others]} on the CPU, {[tuple(x.shape) for x in ours]}"
             " on the GPU")
    if name in WAITING:
        GPU.wait(name)


def call(function, args, kwargs):
    """The operation on the CPU: a product of halves in full precision, as tensor cores sum it."""
    def bare(x):
        return x.inner if on_gpu(x) else torch.device("cpu") if isinstance(x, torch.device) else x

    def other(x, one, two):
        return x.to(two) if isinstance(x, torch.Tensor) and x.dtype == one else x

    args, kwargs = tree_map(bare, args), tree_map(bare, kwargs)
    if "device" in kwargs:
        kwargs["device"] = torch.device("cpu")
    dtypes = {x.dtype for x in tree_leaves(args) if isinstance(x, torch.Tensor)}
    half = next((dtype for dtype in dtypes if dtype in HALVES), None)
    exact = half is None or function._schema.name.split("::")[1] not in PRODUCTS
    try:
        if exact:
            return function(*args, **kwargs)
    except RuntimeError as problem:  # some operations in half the CPU does not have
        if "not implemented for" not in str(problem) or half is None:
            raise
    if torch.float32 in dtypes and not exact:
        raise RuntimeError(f"expected {function}'s arguments to have the same dtype")
    found = function(*tree_map(lambda x: other(x, half, torch.float32), args), **kwargs)
    return tree_map(lambda x: other(x, torch.float32, half), found)


def written(name, function, args):
    """The tensors that an operation changes."""
    some = [args[i] for i, one in enumerate(function._schema.arguments[:len(args)])
            if one.alias_info is not None and one.alias_info.is_write]
    some += args[3:5] if name == "native_batch_norm" else []  # which does not say so
    return [x for x in tree_leaves(some) if on_gpu(x)]


def compute(function, args, kwargs):
    """One operation: checked, counted, done on the CPU."""
    name = function._schema.name.split("::")[1]
    leaves, target = tree_leaves((args, kwargs)), kwargs.get("device")
    target = None if target is None else torch.device(target)
    ours = any(on_gpu(x) for x in leaves)
    here = ours if target is None else target.type != "cpu"  # C++ believes that Cuda is "meta"
    check_devices(name, function, args, leaves, here)
    if name == "_to_copy":
        source = args[0]
        if on_gpu(source) and here and source.dtype == kwargs.get("dtype", source.dtype) and (
                kwargs.get("memory_format") in (None, torch.preserve_format)):
            return Cuda(source.inner)
        quick = kwargs.pop("non_blocking", False) and getattr(source, "pinned", False)
        if not (on_gpu(source) and here) and not quick:
            GPU.wait("to the GPU" if here else "to the CPU")
        kwargs.pop("pin_memory", None)
    if name == "copy_" and on_gpu(args[0]) != on_gpu(args[1]) and args[1].ndim:
        GPU.wait("to the GPU" if on_gpu(args[0]) else "to the CPU")
    here &= not (name == "copy_" and not on_gpu(args[0]))
    launched = here and not function.is_view and name not in FREE
    GPU.launches += launched
    GPU.calls[name] += launched
    changed = written(name, function, args)
    if GPU.recording is not None:
        GPU.undo += [(x.inner, x.inner.clone()) for x in changed]
    found = call(function, args, kwargs)
    if not here:
        return found
    if name.endswith("_") and changed and isinstance(found, torch.Tensor):
        out = changed[0]
    else:
        out = tree_map(lambda x: Cuda(x) if isinstance(x, torch.Tensor) else x, found)
    if GPU.recording is not None and not function.is_view:
        in_place = changed and name != "native_batch_norm"
        GPU.recording.append((function, args, kwargs, None if in_place else out))
    return out


class Mode(TorchDispatchMode):
    """Also operations without a tensor of the GPU may make one."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function._schema.name in ("aten::_pin_memory", "aten::pin_memory"):
            pinned = args[0].clone()
            pinned.pinned = True
            return pinned
        target = kwargs.get("device")
        if any(on_gpu(x) for x in tree_leaves((args, kwargs))) or (
                target is not None and torch.device(target).type in ("cuda", "meta")):
            return compute(function, args, kwargs)
        return function(*args, **kwargs)


class Generator(REAL_GENERATOR):
    """For torch.Generator: makes a usual one, and remembers which are the GPU's."""

    def __new__(cls, device="cpu"):
        made = REAL_GENERATOR()
        if torch.device(device).type == "cuda":
            GPU.generators[made._cdata] = made  # the object that an operation gets is another
        return made


class Recurrent(torch.autograd.Function):
    """A fused recurrent network: one launch there, one back."""

    @staticmethod
    def forward(ctx, options, *tensors):
        # Whatever autocast says, cuDNN's recurrent networks get float16.
        half = torch.float16 if GPU.half else tensors[0].dtype
        inner = [x.inner.detach().to(half).float().requires_grad_() for x in tensors]
        with torch.enable_grad():
            found = REAL_LSTM(inner[0], inner[1:3], inner[3:], *options)
        ctx.inner, ctx.found = inner, found
        ctx.train = options[3] or not torch.backends.cudnn.enabled
        GPU.launches += 1
        return tuple(Cuda(x.detach().to(half)) for x in found)

    @staticmethod
    def backward(ctx, *gradients):
        if not ctx.train:
            raise RuntimeError("cudnn RNN backward can only be called in training mode")
        GPU.launches += 1
        found = torch.autograd.grad(ctx.found, ctx.inner, [x.inner.float() for x in gradients])
        return None, *map(Cuda, found)


def lstm(x, hidden, weights, *options):
    """For torch.lstm: on a GPU cuDNN's."""
    tensors = [x, *hidden, *weights]
    if not any(map(on_gpu, tensors)):
        return REAL_LSTM(x, hidden, weights, *options)
    if not all(map(on_gpu, tensors)):
        raise RuntimeError("Input and parameter tensors are not at the same device")
    return Recurrent.apply(options, *tensors)


class Graph:
    """A recorded sequence of operations that is launched as one."""

    def __init__(self):
        self.steps = []

    def replay(self):
        GPU.launches += 1
        GPU.calls["graph"] += 1
        for function, args, kwargs, out in self.steps:
            found = call(function, args, kwargs)
            if out is not None:
                for to, new in zip(tree_leaves([out]), tree_leaves([found]), strict=True):
                    if isinstance(new, torch.Tensor):
                        to.inner.copy_(new)


@contextlib.contextmanager
def record(graph, pool=None):
    """For torch.cuda.graph: notes what is launched, and launches nothing."""
    GPU.recording, GPU.undo, random = graph.steps, [], torch.get_rng_state()
    try:
        yield
    finally:
        GPU.recording = None
        torch.set_rng_state(random)
        for now, before in reversed(GPU.undo):
            now.copy_(before)


PRETENDED = {
    "_lazy_init": lambda: None, "is_available": lambda: True, "device_count": lambda: 1,
    "set_device": lambda one: None, "current_device": lambda: 0,
    "is_bf16_supported": lambda *one: True, "get_device_capability": lambda *one: (9, 0),
    "get_device_name": lambda *one: "a pretend GPU", "reset_peak_memory_stats": lambda *one: None,
    "max_memory_allocated": lambda *one: 2**20, "mem_get_info": lambda *one: (2**36, 2**36),
    "get_rng_state": lambda *one: torch.get_rng_state(), "manual_seed_all": lambda seed: None,
    "set_rng_state": lambda state, *one: None, "_is_in_bad_fork": lambda: False,
    "is_current_stream_capturing": lambda: GPU.recording is not None, "CUDAGraph": Graph,
    "graph": record, "graph_pool_handle": lambda: (0, 1),
    "current_stream": lambda *one: Stream(), "stream": lambda one: contextlib.nullcontext()}


def under_autocast(function, lower):
    """The function, its floats brought to half or to full precision while autocast is on."""
    def rounded(*args, **kwargs):
        if GPU.half and any(map(on_gpu, args)):
            to = GPU.half if lower else torch.float32
            args = [x.to(to) if on_gpu(x) and x.is_floating_point() else x for x in args]
        return function(*args, **kwargs)
    return rounded


class Autocast(torch.autocast):
    """PyTorch's own takes no notice of such tensors."""

    def __enter__(self):
        if self.device == "cuda":
            GPU.halves.append(self.fast_dtype if self._enabled else None)
        return super().__enter__()

    def __exit__(self, *problem):
        if self.device == "cuda":
            GPU.halves.pop()
        return super().__exit__(*problem)


class Stream:
    """The only one there is."""

    def is_capturing(self):
        return GPU.recording is not None


@contextlib.contextmanager
def pretend_gpu():
    """While this is open, PyTorch has a GPU."""
    GPU.__init__()
    with pytest.MonkeyPatch.context() as patch, Mode():
        for name, value in PRETENDED.items():
            patch.setattr(torch.cuda, name, value)
        patch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        patch.setattr(torch.accelerator, "synchronize", lambda *one: GPU.wait("synchronize"))
        patch.setattr(torch.accelerator, "current_stream", lambda *one: Stream())
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "autocast", Autocast)
        patch.setattr(clip_grad, "_has_foreach_support", lambda *some: True)
        for place, name in LOWERED + RAISED:
            patch.setattr(place, name, under_autocast(getattr(place, name),
                                                      (place, name) in LOWERED))
        patch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *one: None, raising=False)
        patch.setattr(torch, "lstm", lstm)
        patch.setattr(torch._VF, "lstm", lstm, raising=False)
        # A tensor on the CPU cannot become one on the GPU in place.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        torch._C._set_only_lift_cpu_tensors(True)  # so that torch.tensor comes by here
        try:
            yield GPU
        finally:
            torch._C._set_only_lift_cpu_tensors(False)
            torch.__future__.set_overwrite_module_params_on_conversion(False)


if __name__ == "__main__":  # python tests/pretend_gpu.py --task mnist --device cuda ...
    from conftest import dld
    with pretend_gpu():
        code = dld.main(sys.argv[1:])
    print(f"exit code {code}, {GPU.launches:,} launches, {sum(GPU.waits.values()):,} waits:")
    for place, times in GPU.waits.most_common(40):
        print(f"{times:6}  {place}")
    sys.exit(code)
