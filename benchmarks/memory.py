"""Print the memory of a GPU that a training step needs, computed without one.

    python benchmarks/memory.py

The program's own modules and AdamW, of fake tensors, which have shapes and no values. Activations:
what a bf16 forward pass of 32 images saves, each with another prompt of 77 tokens, the worst case.
"""

import sys
from pathlib import Path
from unittest import mock

import open_clip
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import baseline  # noqa: E402  the file next door, not an installed package

CASES = [(name, flags) for name, frozen in (("ViT-B-32", "8"), ("ViT-L-14", "18")) for flags in (
    ["--freeze_clip"], ["--partial_freeze", "--freeze_layers", frozen], [])]


def apply(self, function, recurse=True):
    """Be nn.Module._apply (of to, cuda, cpu), which cannot put one fake parameter for another."""
    for module in self.modules():
        module._parameters |= {name: nn.Parameter(function(p.detach()), p.requires_grad)
                               for name, p in module._parameters.items() if p is not None}
        module._buffers |= {n: function(b) for n, b in module._buffers.items() if b is not None}
    return self


def attention(query, key, value, attn_mask=None, **_):
    """Be one of the GPU's fused kernels, which are not chosen where there is none."""
    bias = None if attn_mask is None else attn_mask.to(query).expand(*query.shape[:3], key.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(query, key, value, bias, True)[0]


def memory(name, flags, batch):
    """Return the GB of parameters and buffers, gradients, AdamW's state and saved activations."""
    args = baseline.parse_args(["--clip_model", name, "--precision", "bf16", *flags])
    config, tokenizer = open_clip.get_model_config(name), open_clip.get_tokenizer(name)
    clip = open_clip.CustomTextCLIP(**config | baseline.plain_attention(config)).eval()
    towers, saved = baseline.make_towers(clip, tokenizer, args, {}), {}
    scorer = baseline.CLIPScorer(clip, towers, {"embed_dim": config["embed_dim"], "preprocess": {
        "mean": [0.0] * 3, "std": [1.0] * 3}}, args).train().cuda()
    pixels = torch.empty(batch, *clip.visual.example.shape[1:], device="cuda")
    ids = torch.empty(batch, 77, dtype=torch.long, device="cuda")
    with baseline.autocast(args, pixels.device), torch.no_grad():
        image, text = towers["image"].prefix(pixels), towers["text"].prefix(ids)
    for tower in towers.values() if flags else ():
        tower.leave()
    with baseline.autocast(args, pixels.device), torch.autograd.graph.saved_tensors_hooks(
            lambda t: saved.setdefault(t.untyped_storage()._cdata, t), lambda t: t):
        scorer(image, text, ids, torch.arange(batch, device="cuda"))
    for p in (own := [*scorer.parameters(), *scorer.buffers()]):
        p.grad = torch.empty_like(p) if p.requires_grad else None
    optimizer = baseline.make_optimizer(scorer, args)
    optimizer.step()
    known = {t.untyped_storage()._cdata for t in own}
    parts = ([t for t in own if t.is_cuda], [t.grad for t in own if t.requires_grad],
             [t for state in optimizer.state.values() for t in state.values()],
             [t for key, t in saved.items() if key not in known])
    return [sum(t.untyped_storage().nbytes() for t in part) / 1e9 for part in parts]


if __name__ == "__main__":
    print("| GB | parameters | gradients | AdamW | activations | sum |\n" + "| --- " * 6 + "|")
    for model, words in CASES:
        with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.multiple(
                torch, allclose=lambda *_, **options: True), mock.patch.multiple(
                nn.Module, _apply=apply), mock.patch.multiple(
                nn.functional, scaled_dot_product_attention=attention), mock.patch.multiple(
                torch.cuda, is_available=lambda: True, is_bf16_supported=lambda: True,
                is_current_stream_capturing=lambda: False):
            each = memory(model, words, batch=32)
        print(f"| {model} `{' '.join(words) or 'full'}` | " + " | ".join(
            f"{value:.3f}" for value in (*each, sum(each))), "|")
