"""Run every public op and model verb with its shape annotations checked at run time. Started by test_shapes.py.

jaxtyping's hook decorates the functions as they are imported, so it must come before any import of xcit; that is why
this runs in a process of its own. Prints one line a wrong input that was refused.
"""

import sys
import tempfile
from pathlib import Path

from jaxtyping import TypeCheckError, install_import_hook

with install_import_hook(["xcit.ops", "xcit.models"], "beartype.beartype"):
    import torch

    from xcit.models import factory, layers, weights
    from xcit.models.xcit import XCiT
    from xcit.ops import position, xca

torch.manual_seed(0)


def refused(what, call):
    """Call with a wrong input, which the annotations must catch."""
    try:
        call()
    except TypeCheckError:
        sys.stdout.write(f"refused {what}\n")
    else:
        raise SystemExit(f"{what}: a wrong shape went through")


def run_ops():
    """Every public function of xcit.ops, right and wrong."""
    encoding = position.fourier_position(3, 5)
    assert encoding.shape == (3, 5, 64)
    refused("fourier_position", lambda: position.fourier_position("3", 5))

    for bias in (True, False):
        weights = xca.XCAWeights(
            torch.randn(96, 32),
            torch.randn(96) if bias else None,
            torch.randn(32, 32),
            torch.randn(32) if bias else None,
            torch.ones(4, 1, 1),
        )
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            x = torch.randn(2, 50, 32).to(dtype)
            cast = xca.XCAWeights(*(None if w is None else w.to(dtype) for w in weights))
            for form in xca.FORMS:
                assert xca.xca(x, cast, form=form).shape == x.shape
    x = torch.randn(2, 50, 32)
    assert xca.xca_tokens(x, weights).shape == x.shape
    assert xca.xca_covariance(x, weights).shape == x.shape
    assert xca.second_moment(x).shape == (2, 32, 32)
    for name in ("xca", "xca_tokens", "xca_covariance"):
        refused(name, lambda name=name: getattr(xca, name)(x[0], weights))
        refused(f"{name} dtype", lambda name=name: getattr(xca, name)(x.long(), weights))
    refused("second_moment", lambda: xca.second_moment(x[0]))


def run_layers():
    """Every public module of xcit.models.layers, right and wrong."""
    images, tokens = torch.randn(2, 3, 40, 48), torch.randn(2, 15, 32)
    modules = {
        "ConvPatchEmbed": (layers.ConvPatchEmbed(8, 3, 32), (images,), (tokens,)),
        "XCA": (layers.XCA(32, 4), (tokens,), (images,)),
        "LPI": (layers.LPI(32), (tokens, 3, 5), (images, 3, 5)),
        "Mlp": (layers.Mlp(32, 64), (tokens,), (images,)),
        "ClassAttention": (layers.ClassAttention(32, 4), (tokens,), (images,)),
    }
    for name, (module, right, wrong) in modules.items():
        module(*right)
        refused(name, lambda module=module, wrong=wrong: module(*wrong))
    layers.PositionalEncodingFourier(32)(3, 5)
    attention = layers.ClassAttention(32, 4).attention(tokens)
    assert attention.shape == (2, 4, 15)


def run_model():
    """The verbs of XCiT, in training and evaluation, right and wrong."""
    images = torch.randn(2, 3, 41, 48)
    for options in ({}, {"tokens_norm": False, "global_pool": "avg"}, {"use_pos": False, "num_classes": 0}):
        model = XCiT(patch_size=8, embed_dim=32, depth=2, num_heads=4, **({"num_classes": 7} | options))
        classes = model.num_classes or 32
        for form in xca.FORMS:
            model.set_attn_form(form)
            assert model(images).shape == (2, classes)
        model(images).sum().backward()
        model.set_grad_checkpointing()
        model(images).sum().backward()
        model.eval()
        tokens = model.forward_features(images)
        assert tokens.shape == (2, 1 + 6 * 6, 32)
        assert model.forward_head(tokens).shape == (2, classes)
        assert model.forward_head(tokens, pre_logits=True).shape == (2, 32)
        assert model.forward_cls(tokens[:, 1:]).shape == tokens.shape
        assert model.class_attention(images).shape == (2, 4, 6, 6)
        for output_fmt in ("NCHW", "NLC"):
            for indices in (None, 1, [0, -1]):
                _, maps = model.forward_intermediates(
                    images, indices, norm=True, output_fmt=output_fmt, return_prefix_tokens=True
                )
                assert maps
        model.forward_intermediates(images, 1, intermediates_only=True, stop_early=True)
        for name in ("forward", "forward_features", "forward_intermediates", "class_attention"):
            refused(name, lambda model=model, name=name: getattr(model, name)(images[0]))
        refused("forward_head", lambda model=model, tokens=tokens: model.forward_head(tokens[0]))
        refused("forward_cls", lambda model=model, tokens=tokens: model.forward_cls(tokens[0]))
        model.reset_classifier(5)
        assert model(images).shape == (2, 5)


def run_verbs():
    """The verbs that make, save and load models."""
    assert "xcit_nano_12_p16" in factory.list_models("*nano*")
    model = factory.create_model("xcit_nano_12_p16", num_classes=3, in_chans=1, depth=1)
    with tempfile.TemporaryDirectory() as folder:
        path = weights.save_checkpoint(model, Path(folder) / "model.safetensors", class_names=["a", "b", "c"])
        again = factory.create_model(path)
        weights.load_checkpoint(model, path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    refused("create_model", lambda: factory.create_model("xcit_nano_12_p16", num_classes="3"))


if __name__ == "__main__":
    run_ops()
    run_layers()
    run_model()
    run_verbs()
    sys.stdout.write("checked\n")
