"""On CUDA no step waits for a copy or for the GPU: the program's own steps on fake tensors.

torch's fake tensors have a device and a shape but no values, so that no GPU is needed. A mode sees
each of their operations and notes those that a real program would wait for.
"""

import collections
import contextlib
import traceback

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import baseline

ATEN = torch.ops.aten
CUDA = torch.device("cuda")


class Watch(TorchDispatchMode):
    """Note blocking copies and synchronisations, and where in the program they are, in `waits`.

    Page-locked memory, which needs a GPU, is ordinary memory here that is known by its storage.
    A value that is asked for is true, or 1. What asks for a shape that depends on values (nonzero,
    a mask as an index) fails by itself.
    """

    def __init__(self):
        super().__init__()
        self.waits, self.pinned = [], {}

    def pin(self, tensor):
        """Call a tensor's memory page-locked; it is kept, so that no other gets its address."""
        self.pinned[tensor.untyped_storage()._cdata] = tensor
        return tensor

    def is_pinned(self, tensor):
        """Return whether a tensor's memory is page-locked."""
        return tensor.untyped_storage()._cdata in self.pinned

    def note(self, what):
        """Remember a wait and the line of the program that it is in."""
        at = [frame for frame in traceback.extract_stack() if frame.filename == baseline.__file__]
        self.waits.append((what, f"{at[-1].name}: {at[-1].line}"))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is ATEN.is_pinned.default:
            return self.is_pinned(args[0])
        if func is ATEN._pin_memory.default:
            return self.pin(args[0].clone())
        if func is ATEN._local_scalar_dense.default and args[0].device.type == "cuda":
            self.note("synchronisation")
            return args[0].dtype == torch.bool or 1
        locked = kwargs.pop("pin_memory", False)
        out = func(*args, **kwargs)
        if locked:
            self.pin(out)
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if func in (ATEN._to_copy.default, ATEN.copy_.default):
            source, target = (args[0], out) if func is ATEN._to_copy.default else args[1::-1]
            behind = kwargs.get("non_blocking", args[2] if len(args) > 2 else False)
            ways = source.device.type, target.device.type
            if ways == ("cuda", "cpu") and not behind:
                self.note("synchronisation")
            if ways == ("cpu", "cuda") and not (behind and self.is_pinned(source)):
                self.note("blocking copy")
        elif func is ATEN.index.Tensor and {t.device.type for t in tensors} == {"cpu", "cuda"}:
            self.note("blocking copy")  # of the index
        return out


@contextlib.contextmanager
def on_cuda(monkeypatch, memory=2 ** 40):
    """Pretend in the block that there is a GPU with so much memory; yields the Watch."""
    with monkeypatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), \
            Watch() as watch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, memory))
        patch.setattr(baseline, "ahead", lambda function, items, *_: map(function, items))
        yield watch


def array_of(rows):
    """Return the array of a cache's Rows on a CPU."""
    if rows is None:
        return None
    rows = rows.rows
    return (rows.view(torch.int16) if rows.dtype == torch.bfloat16 else rows).numpy()


def to_cuda(run, features, pixels, texts):
    """Move a run that was set up on a CPU to the fake GPU; the arrays are what its caches hold."""
    key = {"preprocess": run.identity["preprocess"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(baseline, "cached", lambda args, kind, *_: {
            "image": None if features is None else features[:, None], "pixels": pixels}[kind])
        run.images = baseline.ImageInputs(run.scorer, run.table, key, run.args, CUDA)
    run.device = run.texts.device = CUDA
    run.texts.features = None if texts is None else baseline.Rows(texts, CUDA, run.args)
    run.texts.ids = torch.empty_like(run.texts.ids, device=CUDA)
    for module in run.scorer.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(
                    torch.empty_like(parameter, device=CUDA), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=CUDA)
    run.s0 = torch.empty_like(run.s0, device=CUDA)
    run.mos = {name: torch.empty_like(mos, device=CUDA) for name, mos in run.mos.items()}
    if run.teacher is not None:
        run.teacher = torch.empty_like(run.teacher, device=CUDA)


def waits_of_epochs(run, monkeypatch, memory):
    """Yield (precision, waits, steps) of an epoch in each precision, on a GPU of so much memory.

    What comes before the first step (the epoch's plan goes to the GPU) and after the last (the
    results come back) does not count. Autograd cannot compute on fake tensors: gradients are put
    in place.
    """
    arrays = [*map(array_of, (run.images.features, run.images.pixels, run.texts.features))]
    real, steps, ends = baseline.update, [], []

    def backward(_):
        for parameter in run.scorer.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.empty_like(parameter)

    def update(*args):
        real(*args)
        ends.append(len(watch.waits))

    with on_cuda(monkeypatch, memory) as watch, monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        patch.setattr(torch.cuda, "manual_seed", lambda seed: steps.append(len(watch.waits)))
        patch.setattr(baseline, "update", update)
        patch.setattr(baseline, "epoch_summary", lambda *args: None)
        patch.setattr(baseline, "everywhere", lambda outputs: None)
        to_cuda(run, *arrays)
        for run.args.precision in baseline.PRECISIONS:
            steps.clear()
            run.optimizer = baseline.make_optimizer(run.scorer, run.args)
            run.scaler = torch.amp.GradScaler("cuda", enabled=run.args.precision == "fp16")
            baseline.train_one_epoch(run, 1)
            yield run.args.precision, watch.waits[steps[0]:ends[-1]], len(steps)


MODES = {"frozen": ["--freeze_clip"], "partial": ["--partial_freeze", "--freeze_layers", 2],
         "full": [], "all heads, resnet": ["--use_refinement", "--use_two_branch",
                                           "--use_explanations", "--grad_accum_steps", 2]}
SOURCES = {"flip, cache on the GPU": ("auto", 2 ** 40), "flip, cache in RAM": ("auto", 0),
           "crop, cache on the GPU": ("auto", 2 ** 40), "crop, no cache": ("off", 0)}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("mode", MODES)
def test_no_step_waits(build, monkeypatch, mode, source):
    """No blocking copy and no synchronisation, whatever trains, wherever the images come from."""
    (cache, memory), augment = SOURCES[source], source.split(",")[0]
    run = build(*MODES[mode], "--augment", augment, "--cache", cache,
                clip="resnet" if "resnet" in mode else "vit")
    for precision, waits, steps in waits_of_epochs(run, monkeypatch, memory):
        kinds = collections.Counter(what for what, _ in waits)
        print(f"{mode}, {source}, {precision}: {kinds['blocking copy']} blocking copies and "
              f"{kinds['synchronisation']} synchronisations in {steps} steps")
        assert not waits, f"{mode}, {source}, {precision}"


@pytest.mark.parametrize("real, precision", [(True, "bf16"), (False, "fp16")])
def test_bf16_that_is_only_emulated_is_not_used(monkeypatch, real, precision):
    """--precision auto is fp16 on a GPU older than bf16, which torch would emulate slowly."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: including_emulation or real)
    args = baseline.parse_args([])
    baseline.settle_precision(args)
    assert (args.asked_precision, args.precision) == ("auto", precision)


@pytest.mark.parametrize("precision, there, tf32", [
    ("fp32", True, True), ("fp32", False, False), ("bf16", True, False)])
def test_fp32_is_tf32_where_the_gpu_has_it(build, monkeypatch, capsys, precision, there, tf32):
    """Set once, said in the line of the device; heads beside half precision stay in real fp32."""
    before = torch.get_float32_matmul_precision()
    run = build("--freeze_clip", "--precision", precision)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_tf32_supported", lambda: there)
    try:
        assert baseline.pick_device(run.args) == CUDA
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        capsys.readouterr()
        baseline.print_setup(run.args, run.table, run.parts, run.scorer, CUDA)
    finally:
        torch.set_float32_matmul_precision(before)
    assert f"device cuda, {precision}{' as TF32' * tf32}, lr" in capsys.readouterr().out


@pytest.mark.parametrize("clip, tunes", [("vit", False), ("resnet", True)])
def test_convolutions_are_tuned(build, monkeypatch, clip, tunes):
    """CuDNN tries its algorithms where the trunk convolves: all its pictures have one size."""
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", not tunes)
    build("--freeze_clip", clip=clip)
    assert torch.backends.cudnn.benchmark is tunes


@pytest.mark.parametrize("mode, more, gone", [
    ("frozen", [], "all"), ("partial", [], 2), ("partial", ["--augment", "crop"], 0),
    ("partial", ["--cache", "off"], 0), ("full", [], 0)])
def test_what_is_cached_leaves_the_gpu(build, monkeypatch, mode, more, gone):
    """Frozen blocks leave where their outputs are cached, and only there; none of them runs then.

    The crops of an epoch are new, so that the image tower has to stay.
    """
    left = []
    monkeypatch.setattr(nn.Module, "cpu", lambda self: left.append(self))
    run = build(*MODES[mode], *more)
    towers = [run.scorer.towers[name] for name in ("image", "text")]
    wanted = [[] if not gone else [tower.encoder] if gone == "all" else tower.blocks[:gone]
              for tower in towers]
    if "crop" in more:
        wanted[1] = towers[1].blocks[:2]
    assert left == [module for modules in wanted for module in modules]
    for module in left:  # whatever reads them fails
        for parameter in module.parameters():
            parameter.data = torch.empty(0)
    for part in ("train", "val"):
        assert baseline.evaluate(run, part)[0].notna().all(axis=None)
    baseline.train_one_epoch(run, 1)


@pytest.mark.parametrize("mode", ["frozen", "partial", "full"])
def test_the_memory_of_a_step_is_said_at_the_start(build, capsys, mode):
    """It is what weights, gradients, AdamW and a forward pass of a whole batch really take."""
    run = build(*MODES[mode], "--batch_size", 16)
    baseline.print_setup(run.args, run.table, run.parts, run.scorer, CUDA)
    said = float(capsys.readouterr().out.split("GPU memory of a step: about ")[1].split(" MB")[0])
    saved = {}
    pixels, ids = (run.scorer.towers[name].encoder.example for name in ("image", "text"))
    pixels, ids = pixels.repeat(16, 1, 1, 1), ids.repeat(16, 1)
    with torch.no_grad():
        image, text = run.scorer.towers["image"].prefix(pixels), run.texts.tower.prefix(ids)
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        run.scorer.train()(image, text, ids, torch.arange(16))
    for parameter in (own := [*run.scorer.parameters()]):
        saved.pop(parameter.untyped_storage()._cdata, None)
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    run.optimizer.step()
    moments = [t for state in run.optimizer.state.values() for t in state.values()]
    taken = sum(t.untyped_storage().nbytes() for t in (
        *own, *(p.grad for p in own if p.requires_grad), *moments, *saved.values())) / 1e6
    assert said == pytest.approx(taken, rel=0.15), mode
