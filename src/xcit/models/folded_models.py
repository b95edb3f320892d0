"""A folded XCiT and a folded pyramid: the same images in, the same out, for inference alone.

Legend: B batch, (Hp, Wp) patch grid, N tokens = Hp * Wp, C embed_dim, K classes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from xcit.errors import ConfigError, ExportError, ShapeError
from xcit.models.folded_inplace import OverwritingGELU, can_run_in_bands, can_run_in_place
from xcit.models.folded_layers import (
    FoldedBlock,
    FoldedClassBlock,
    FoldedPosition,
    InferenceModule,
    conv_with_batch_norm,
    linear_after_norm,
    transposed_conv_with_batch_norm,
    without_affine,
)
from xcit.models.folded_stem import embed_in_tiles
from xcit.models.folded_xca import FoldedXCA
from xcit.models.kernel_layers import choose_kernels
from xcit.models.layers import XCA, ClassAttentionBlock, ConvPatchEmbed, XCABlock
from xcit.models.pyramid import XCiTPyramid
from xcit.models.variants import BlockWithoutLPI, LinearPatchEmbed, XCAWithoutTemperature
from xcit.models.xcit import XCiT
from xcit.ops.kernels import Kernels
from xcit.ops.xca_form import FORMS, Form

_BLOCKS = (XCABlock, BlockWithoutLPI)
_ATTENTIONS = (XCA, XCAWithoutTemperature)
_STEMS = (ConvPatchEmbed, LinearPatchEmbed)


class FoldedTrunk(InferenceModule):
    """What a folded XCiT and a folded pyramid have in common: stem, positional encoding and XCA blocks.

    Attributes:
        config: as of the model that was folded.
        pretrained_cfg: likewise.
        patch_size: likewise.
        embed_dim: C.
    """

    def __init__(
        self,
        model: XCiT | XCiTPyramid,
        form: Form,
        small_terms: torch.dtype,
        image_sizes: Sequence[tuple[int, int]],
    ) -> None:
        super().__init__()
        refuse_unknown(model)
        self.config: dict[str, Any] = copy.deepcopy(model.config) | {"attn_form": form}
        self.pretrained_cfg: dict[str, Any] = copy.deepcopy(model.pretrained_cfg)
        self.embed_dim: int = model.embed_dim
        self.patch_size: int = model.patch_embed.patch_size
        self.patch_embed = _folded_stem(model.patch_embed)
        grids = [(-(-height // self.patch_size), -(-width // self.patch_size)) for height, width in image_sizes]
        embeder = model.pos_embeder
        self.pos_embeder = None if embeder is None else FoldedPosition(embeder, list(dict.fromkeys(grids)))
        self.blocks = nn.ModuleList(
            FoldedBlock(block, form, small_terms)  # type: ignore[arg-type]  # refuse_unknown has looked
            for block in model.blocks
        )

    def set_attn_form(self, form: Form) -> None:
        """Choose the form of XCA in every block: "auto", "tokens" or "covariance".

        Raises:
            ConfigError: another form.
        """
        if form not in FORMS:
            raise ConfigError(f"form is {form!r}; XCA has the forms {', '.join(FORMS)}.")
        self.config["attn_form"] = form
        for module in self.modules():
            if isinstance(module, FoldedXCA):
                module.form = form

    def set_kernels(self, kernels: Kernels) -> None:
        """Choose what runs the layers: "plain", their definitions in PyTorch, or "triton", the fused kernels for CUDA.

        Raises:
            UnknownNameError: another name.
            ConfigError: a layer that the kernels cannot run.
        """
        choose_kernels(self, kernels)

    def _embed(self, x: Tensor) -> tuple[Tensor, int, int]:
        """Return the tokens, which are nobody else's, and the patch grid."""
        position = self.pos_embeder
        if self._can_embed_in_tiles(x):
            tokens = embed_in_tiles(self.patch_embed, x, None if position is None else position.parts)
            if tokens is not None:
                Hp, Wp = (-(-side // self.patch_size) for side in x.shape[2:])
                return tokens, Hp, Wp
        x, (Hp, Wp) = self.patch_embed(x)
        if position is None:
            return x, Hp, Wp
        encoding = position(Hp, Wp)
        return (x.add_(encoding) if can_run_in_place(x) else x + encoding), Hp, Wp

    def _can_embed_in_tiles(self, x: Tensor) -> bool:
        """Return whether images are ones that the stem takes, and can go through it in bands."""
        return (
            can_run_in_bands(x)
            and x.ndim == 4
            and x.shape[1] == self.config["in_chans"]
            and min(x.shape[2:]) >= self.patch_size
        )


class FoldedXCiT(FoldedTrunk):
    """What ``fold`` makes of an ``XCiT``.

    ``forward`` and ``forward_features`` return what the model's own do. The final norm's affine is part of the head,
    which therefore has no use for the tokens of ``forward_features``.

    Attributes:
        num_classes: K; 0 for pooled features.
        num_features: C.
        num_prefix_tokens: 1 with a class token, else 0.
        global_pool: "token" or "avg".
        is_folded_xcit: True; how those who know no more than its attributes and ``forward`` tell it.
    """

    is_folded_xcit = True

    def __init__(
        self,
        model: XCiT,
        form: Form = "auto",
        small_terms: torch.dtype = torch.float32,
        image_sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(model, form, small_terms, image_sizes)
        self.num_classes = model.num_classes
        self.num_features = self.head_hidden_size = model.embed_dim
        self.num_prefix_tokens = model.num_prefix_tokens
        self.global_pool = model.global_pool
        token = model.cls_token
        self.cls_token = None if token is None else nn.Parameter(token.detach().clone(), requires_grad=False)
        self.cls_attn_blocks = nn.ModuleList(
            FoldedClassBlock(block)  # type: ignore[arg-type]
            for block in model.cls_attn_blocks
        )
        self.norm = without_affine(model.norm)
        self.norm_scale = nn.Parameter(model.norm.weight.detach().clone(), requires_grad=False)
        self.norm_shift = nn.Parameter(model.norm.bias.detach().clone(), requires_grad=False)
        self.head = linear_after_norm(model.head, model.norm) if isinstance(model.head, nn.Linear) else None
        self.eval()

    def forward(self, x: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits (B, num_classes), or pooled features (B, C) when ``num_classes`` is 0."""
        pooled = self._pooled(x)
        return pooled if self.head is None else self.head(pooled)

    def forward_features(
        self, x: Float[Tensor, "batch chans height width"]
    ) -> Float[Tensor, "batch tokens_and_cls channels"]:
        """Return all tokens after the final norm, (B, 1 + N, C): the class token first, if the model has one."""
        x = self._tokens(x)
        if self.cls_token is not None:
            cls = self.cls_token.expand(x.shape[0], -1, -1)
            for block in self.cls_attn_blocks:
                cls, x = block(cls, x, overwrite=True)
            x = torch.cat((cls, x), dim=1)
        return self.whole_final_norm(x)

    def _tokens(self, x: Tensor) -> Tensor:
        x, Hp, Wp = self._embed(x)
        for block in self.blocks:
            x = block(x, Hp, Wp, overwrite=True)
        return x

    def _pooled(self, x: Tensor) -> Tensor:
        """Return the pooled features, without the final norm's affine where the head has it."""
        x = self._tokens(x)
        if self.global_pool == "avg":  # which sees patch tokens alone
            for block in self.cls_attn_blocks:
                x = block.patch_tokens(x, overwrite=True)  # type: ignore[operator]
            return self.final_norm(x).mean(dim=1)
        assert self.cls_token is not None
        cls = self.cls_token.expand(x.shape[0], -1, -1)
        *earlier, last = list(self.cls_attn_blocks)
        for block in earlier:
            cls, x = block(cls, x, overwrite=True)
        return self.final_norm(last.class_token(cls, x))[:, 0]  # type: ignore[operator]

    def final_norm(self, x: Tensor) -> Tensor:
        """Return tokens after the final norm, without its affine where the head has it."""
        return self.whole_final_norm(x) if self.head is None else self.norm(x)

    def whole_final_norm(self, x: Tensor) -> Tensor:
        """Return tokens after the final norm with its affine."""
        return F.layer_norm(x, x.shape[-1:], self.norm_scale, self.norm_shift, self.norm.eps)


class FoldedPyramid(FoldedTrunk):
    """What ``fold`` makes of an ``XCiTPyramid``: the same four maps.

    Attributes:
        taps: as of the pyramid.
        strides: likewise.
        out_channels: likewise.
    """

    def __init__(
        self,
        pyramid: XCiTPyramid,
        form: Form = "auto",
        small_terms: torch.dtype = torch.float32,
        image_sizes: Sequence[tuple[int, int]] = (),
    ) -> None:
        super().__init__(pyramid, form, small_terms, image_sizes)
        self.taps, self.strides, self.out_channels = pyramid.taps, pyramid.strides, pyramid.out_channels
        self.fpn1 = _without_batch_norm(pyramid.fpn1)
        self.fpn2, self.fpn3, self.fpn4 = (
            copy.deepcopy(operation).requires_grad_(False) for operation in (pyramid.fpn2, pyramid.fpn3, pyramid.fpn4)
        )
        self.eval()

    def forward(self, x: Float[Tensor, "batch chans height width"]) -> list[Tensor]:
        """Return the four maps, the finest first.

        Raises:
            ShapeError: as the pyramid.
        """
        x, Hp, Wp = self._embed(x)
        least = self.strides[-1] // self.patch_size
        # During export a comparison of symbolic sizes would become a constraint on the caller's Dim.
        if not torch.compiler.is_exporting() and min(Hp, Wp) < least:
            raise ShapeError(
                f"The image gives a grid of {Hp} x {Wp} patches; the pyramid's coarsest level needs {least} x {least}: "
                f"enlarge or pad the image to more than {self.strides[-1] - self.patch_size} px each way."
            )
        levels: list[Tensor] = []
        operations = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        larger = [stride < self.patch_size for stride in self.strides]
        for i, block in enumerate(self.blocks):
            x = block(x, Hp, Wp, overwrite=True)
            for level, tap in enumerate(self.taps):
                if tap == i:
                    # The next layer may overwrite the tokens, and not every level is made of a copy of them.
                    tokens = x.clone() if can_run_in_place(x) else x
                    grid = tokens.unflatten(1, (Hp, Wp)).permute(0, 3, 1, 2)
                    # What would be larger than the tokens waits: the blocks that follow need the memory.
                    levels.append(grid if larger[level] else operations[level](grid))
        return [operations[i](level) if larger[i] else level for i, level in enumerate(levels)]


def refuse_unknown(model: XCiT | XCiTPyramid) -> None:
    """Refuse a model with a part whose folding would not be exact, or that is not known.

    Raises:
        ExportError: naming the part.
    """
    variant = model.config.get("variant", "none")
    if variant == "no_qk_norm":
        raise ExportError(
            "The variant no_qk_norm has another attention, which cannot be folded; run or export the model unfolded."
        )
    _expect(model.patch_embed, _STEMS, "patch_embed")
    for i, block in enumerate(model.blocks):
        _expect(block, _BLOCKS, f"blocks.{i}")
        _expect(block.attn, _ATTENTIONS, f"blocks.{i}.attn")  # type: ignore[arg-type]
    if isinstance(model, XCiT):
        for i, block in enumerate(model.cls_attn_blocks):
            _expect(block, (ClassAttentionBlock,), f"cls_attn_blocks.{i}")
        _expect(model.head, (nn.Linear, nn.Identity), "head")


def _expect(module: nn.Module, kinds: tuple[type[nn.Module], ...], name: str) -> None:
    if type(module) not in kinds:  # a subclass may compute something else
        names = " or ".join(kind.__name__ for kind in kinds)
        raise ExportError(
            f"{name} is of class {type(module).__name__}; folding is known for {names} only: undo what replaced it, or "
            f"run the model unfolded."
        )


def _folded_stem(stem: nn.Module) -> nn.Module:
    folded = copy.deepcopy(stem)
    if isinstance(folded, ConvPatchEmbed):
        for i, layer in enumerate(folded.proj):
            if isinstance(layer, nn.Sequential):
                conv, norm = layer
                assert isinstance(conv, nn.Conv2d)
                assert isinstance(norm, _BatchNorm)
                folded.proj[i] = conv_with_batch_norm(conv, norm)
            elif type(layer) is nn.GELU:
                folded.proj[i] = OverwritingGELU(layer.approximate)
    return folded.requires_grad_(False)


def _without_batch_norm(operation: nn.Module) -> nn.Module:
    """Return a pyramid's operation with its batch norm, if it has one, in the transposed convolution before it."""
    if not isinstance(operation, nn.Sequential) or len(operation) == 1:
        return copy.deepcopy(operation).requires_grad_(False)
    conv, norm, *rest = operation
    assert isinstance(conv, nn.ConvTranspose2d)
    assert isinstance(norm, _BatchNorm)
    folded = nn.Sequential(transposed_conv_with_batch_norm(conv, norm), *(copy.deepcopy(layer) for layer in rest))
    return folded.requires_grad_(False)
