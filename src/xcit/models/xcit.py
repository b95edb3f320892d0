"""XCiT: the Cross-Covariance Image Transformer. Read top to bottom: construction, then the way of an image.

Legend: B batch, (Hp, Wp) patch grid, N tokens = Hp * Wp, C embed_dim.

Source: El-Nouby et al., "XCiT: Cross-Covariance Image Transformers", NeurIPS 2021 (arXiv 2106.09681).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xcit.errors import ConfigError
from xcit.models.kernel_layers import choose_kernels
from xcit.models.layers import NORM_EPS, XCA, ClassAttentionBlock, ConvPatchEmbed, PositionalEncodingFourier, XCABlock
from xcit.ops.kernels import Kernels
from xcit.ops.xca_form import FORMS, Form

POOLS = ("token", "avg")


class XCiT(nn.Module):
    """An image classifier and feature extractor whose attention is linear in the number of patches.

    Images of any height and width of at least one patch, square or not, multiples of the patch or not: H x W gives a
    grid of ceil(H / patch_size) x ceil(W / patch_size) tokens.

    Args:
        patch_size: 16 or 8, pixels a side of what one token covers.
        in_chans: channels of the image.
        num_classes: outputs of the head; 0 returns the pooled features instead.
        embed_dim: width C of a token.
        depth: number of XCA blocks.
        num_heads: heads of the attention; divides ``embed_dim``.
        mlp_ratio: hidden width of the feed-forward network, in units of ``embed_dim``.
        qkv_bias: whether queries, keys and values have a bias.
        cls_attn_layers: number of class-attention blocks, at least one.
        use_pos: add the Fourier positional encoding.
        eta: initial value of LayerScale: 1.0 in the 12-layer models, 1e-5 in the 24-layer ones.
        tokens_norm: class attention norms all tokens; False only in the released nano.
        global_pool: what the head sees: "token" (the class token, as released) or "avg" (mean of the patch tokens).
        drop_rate: dropout before the head.
        pos_drop_rate: dropout after the positional encoding.
        proj_drop_rate: dropout after the projections of attention and feed-forward network.
        attn_drop_rate: dropout of attention entries.
        drop_path_rate: stochastic depth of every XCA block, the same in each; class attention never has it.
        attn_form: form of XCA: "auto", "tokens" or "covariance" (``xcit.ops.xca``).
        variant: what is taken away for an ablation (``xcit.models.variants``); "none" is XCiT.

    Attributes:
        config: the arguments, all of them: ``XCiT(**model.config)`` builds the same architecture.
        pretrained_cfg: what the weights expect of an image and what the classes are called; {} for random weights.
        feature_info: per XCA block its width, its reduction and its module's name.

    Raises:
        ConfigError: an argument out of its range, naming it.
        UnknownNameError: no such variant.

    Source: section 3.3 and table 1 of the paper; facts of the released code where the paper is silent.
    """

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 12,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        cls_attn_layers: int = 2,
        use_pos: bool = True,
        eta: float = 1.0,
        tokens_norm: bool = True,
        global_pool: Literal["token", "avg"] = "token",
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        attn_form: Form = "auto",
        variant: str = "none",
    ) -> None:
        self.config: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        _check_config(self.config)
        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens = 1
        self.global_pool = global_pool
        self.grad_checkpointing = False
        self.pretrained_cfg: dict[str, Any] = {}

        self.patch_embed = ConvPatchEmbed(patch_size, in_chans, embed_dim)
        self.pos_embeder = PositionalEncodingFourier(embed_dim) if use_pos else None  # spelt as in the released files
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.blocks = nn.ModuleList(
            XCABlock(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                drop_path=drop_path_rate,
                eta=eta,
                attn_form=attn_form,
            )
            for _ in range(depth)
        )
        self.cls_token: nn.Parameter | None = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.cls_attn_blocks = nn.ModuleList(
            ClassAttentionBlock(
                embed_dim,
                num_heads,
                mlp_ratio,
                qkv_bias,
                proj_drop=proj_drop_rate,
                attn_drop=attn_drop_rate,
                eta=eta,
                tokens_norm=tokens_norm,
            )
            for _ in range(cls_attn_layers)
        )
        self.norm = nn.LayerNorm(embed_dim, eps=NORM_EPS)
        self.head_drop = nn.Dropout(drop_rate)
        self.head: nn.Module = _head(embed_dim, num_classes)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        ]

        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.apply(_init_weights)
        if variant != "none":
            from xcit.models.variants import apply_variant  # which builds on this file

            self.config["variant"] = "none"
            apply_variant(self, variant)

    # --- the way of an image ------------------------------------------------------------------------------------------

    def forward(self, x: Float[Tensor, "batch chans height width"]) -> Float[Tensor, "batch classes"]:
        """Return logits (B, num_classes), or pooled features (B, C) when ``num_classes`` is 0."""
        return self.forward_head(self.forward_features(x))

    def forward_features(
        self, x: Float[Tensor, "batch chans height width"]
    ) -> Float[Tensor, "batch tokens_and_cls channels"]:
        """Return all tokens after the final norm, (B, 1 + N, C): the class token first, if the model has one."""
        x, (Hp, Wp) = self._embed(x)
        for block in self.blocks:
            x = self._run(block, x, Hp, Wp)
        return self.norm(self.forward_cls(x))

    def forward_cls(self, x: Float[Tensor, "batch tokens channels"]) -> Float[Tensor, "batch tokens_and_cls channels"]:
        """Put the class token before the patch tokens and run the class-attention blocks; before the final norm."""
        if self.cls_token is None:
            return x
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        for block in self.cls_attn_blocks:
            x = self._run(block, x)
        return x

    def forward_head(
        self, x: Float[Tensor, "batch tokens_and_cls channels"], pre_logits: bool = False
    ) -> Float[Tensor, "batch classes"]:
        """Pool what ``forward_features`` returned and classify it.

        Args:
            x: tokens, class token first.
            pre_logits: return the pooled features (B, C) instead of the logits.
        """
        pooled = x[:, self.num_prefix_tokens :].mean(dim=1) if self.global_pool == "avg" else x[:, 0]
        pooled = self.head_drop(pooled)
        return pooled if pre_logits else self.head(pooled)

    def forward_intermediates(
        self,
        x: Float[Tensor, "batch chans height width"],
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        return_prefix_tokens: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """Return the tokens after chosen XCA blocks, and the final ones.

        Args:
            x: images.
            indices: the last n blocks if an int, these blocks (negative from the end) if a sequence, all if None.
            norm: apply the model's final norm to what is returned of each block.
            stop_early: do not run blocks beyond the last one asked for. The final tokens, unless
                ``intermediates_only``, are then the class attention's of that block.
            output_fmt: "NCHW" for feature maps (B, C, Hp, Wp), "NLC" for tokens (B, N, C).
            intermediates_only: return the list alone and do not run class attention for the final tokens.
            return_prefix_tokens: pair each block's features with a class token (B, 1, C). The class token enters
                only after the XCA blocks, so a block's is what the model's class-attention blocks read out of that
                block's tokens; the last block's is the model's own.

        Returns:
            ``intermediates``, or ``(tokens, intermediates)`` with the tokens of ``forward_features``. Intermediates
            come in the blocks' order.

        Raises:
            ConfigError: an index out of range, an unknown format, or prefix tokens of a model without class token.
        """
        if return_prefix_tokens:
            self._need_class_token()
        if output_fmt not in ("NCHW", "NLC"):
            raise ConfigError(f"output_fmt is {output_fmt!r}; it must be 'NCHW' or 'NLC'.")
        taken = _take_indices(len(self.blocks), indices)
        x, (Hp, Wp) = self._embed(x)
        intermediates: list[Any] = []
        for i, block in enumerate(self.blocks):
            if stop_early and i > max(taken):
                break
            x = self._run(block, x, Hp, Wp)
            if i not in taken:
                continue
            features = self.norm(x) if norm else x
            if output_fmt == "NCHW":
                features = features.transpose(1, 2).unflatten(2, (Hp, Wp)).contiguous()
            if return_prefix_tokens:
                prefix = self.forward_cls(x)[:, :1]
                intermediates.append((features, self.norm(prefix) if norm else prefix))
            else:
                intermediates.append(features)
        if intermediates_only:
            return intermediates
        return self.norm(self.forward_cls(x)), intermediates

    def class_attention(
        self, x: Float[Tensor, "batch chans height width"], layer: int = -1
    ) -> Float[Tensor, "batch heads rows columns"]:
        """Return how much of each patch the class token takes in one of the class-attention blocks.

        Args:
            x: images.
            layer: which block, from 0; negative from the end. The released models have two.

        Returns:
            (B, heads, Hp, Wp), non-negative. A head's map sums to at most one: the rest is what the class token takes
            of itself.

        Raises:
            ConfigError: the model has no class attention, or no such layer of it.

        Source: figure 4 of the paper shows the last layer's maps.
        """
        cls_token = self._need_class_token()
        num_layers = len(self.cls_attn_blocks)
        if not -num_layers <= layer < num_layers:
            raise ConfigError(
                f"layer is {layer}; the model's class-attention layers are 0 to {num_layers - 1}, or -{num_layers} "
                f"to -1."
            )
        tokens, (Hp, Wp) = self._embed(x)
        for block in self.blocks:
            tokens = self._run(block, tokens, Hp, Wp)
        tokens = torch.cat((cls_token.expand(tokens.shape[0], -1, -1), tokens), dim=1)
        *earlier, asked = self.cls_attn_blocks[: layer % num_layers + 1]
        for block in earlier:
            tokens = self._run(block, tokens)
        assert isinstance(asked, ClassAttentionBlock)
        return asked.attn.attention(asked.norm1(tokens))[:, :, 1:].unflatten(2, (Hp, Wp))

    def channel_attention(
        self, x: Float[Tensor, "batch chans height width"]
    ) -> list[Float[Tensor, "batch heads head_dim head_dim"]]:
        """Return the matrices with which the XCA of every block mixes the channels of each head.

        They are those of the forward pass in eval mode, in the form of XCA that it takes (``attn_form``).

        Returns:
            One (B, heads, d, d) tensor a block, d = C / heads, float32 at least, non-negative. Entry (i, j) is how much
            of value channel j goes into output channel i: the last axis sums to one.

        Source: equation 2 of the paper, transposed (``xcit.ops.xca.xca_attention``).
        """
        tokens, (Hp, Wp) = self._embed(x)
        matrices = []
        for block in self.blocks:
            matrices.append(block.attn.attention(block.norm1(tokens)))  # type: ignore[operator, union-attr]
            tokens = self._run(block, tokens, Hp, Wp)
        return matrices

    def _need_class_token(self) -> nn.Parameter:
        if self.cls_token is None:
            raise ConfigError(
                f"The model has no class token and no class attention (variant {self.config['variant']})."
            )
        return self.cls_token

    def _embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        x, (Hp, Wp) = self.patch_embed(x)
        if self.pos_embeder is not None:
            x = x + self.pos_embeder(Hp, Wp)
        return self.pos_drop(x), (Hp, Wp)

    def _run(self, block: nn.Module, *args: Any) -> Tensor:
        return run_block(block, *args, recompute=self.grad_checkpointing)

    # --- what other code asks of a model (timm's verbs) ---------------------------------------------------------------

    def get_classifier(self) -> nn.Module:
        """Return the head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: Literal["token", "avg"] | None = None) -> None:
        """Replace the head by a new one, randomly initialised.

        Args:
            num_classes: its outputs; 0 for features.
            global_pool: change the pooling as well.
        """
        if global_pool is not None:
            if global_pool not in POOLS:
                raise ConfigError(f"global_pool is {global_pool!r}; it must be one of {', '.join(POOLS)}.")
            if global_pool == "token":
                self._need_class_token()
            self.global_pool = self.config["global_pool"] = global_pool
        if num_classes < 0:
            raise ConfigError(f"num_classes is {num_classes}; it must be 0 (features) or more.")
        self.num_classes = self.config["num_classes"] = num_classes
        if self.pretrained_cfg:  # the names are those of the former head's classes
            self.pretrained_cfg = self.pretrained_cfg | {"class_names": None, "label_set": None}
        head = _head(self.embed_dim, num_classes)
        _init_weights(head)
        self.head = head.to(self.norm.weight.device, self.norm.weight.dtype).train(self.training)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training: keep only the blocks' inputs and recompute the rest backward."""
        self.grad_checkpointing = enable

    def set_attn_form(self, form: Form) -> None:
        """Choose the form of XCA in every block: "auto", "tokens" or "covariance"."""
        if form not in FORMS:
            raise ConfigError(f"attn_form is {form!r}; XCA has the forms {', '.join(FORMS)}.")
        self.config["attn_form"] = form
        for module in self.modules():
            if isinstance(module, XCA):
                module.form = form

    def set_kernels(self, kernels: Kernels) -> None:
        """Choose what runs the layers: "plain", their definitions in PyTorch, or "triton", the fused kernels for CUDA.

        Raises:
            UnknownNameError: another name.
            ConfigError: a layer that the kernels cannot run.
        """
        choose_kernels(self, kernels)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters that the released training kept from weight decay by name.

        Vectors and biases are kept from it by every usual optimiser factory as well. The temperatures are not, and were
        decayed; so was the projection of the positional encoding, whose name the released model's list misses.
        """
        return {"cls_token"} & dict(self.named_parameters()).keys()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns that sort parameters into depth groups, for layer-wise learning rates.

        Args:
            coarse: one group for all XCA blocks instead of one a block.
        """
        return {
            "stem": r"^cls_token|pos_embeder|patch_embed",
            "blocks": r"^blocks" if coarse else r"^blocks\.(\d+)",
            "cls_attn_blocks": [(r"^cls_attn_blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def run_block(block: nn.Module, *args: Any, recompute: bool) -> Tensor:
    """Return a block's output.

    Args:
        block: of an XCiT.
        *args: its inputs.
        recompute: keep only the inputs for the backward pass and compute the rest again there.
    """
    if not recompute or not torch.is_grad_enabled():
        return block(*args)
    if torch.compiler.is_compiling():  # dynamo takes no Python contexts, and drops repeated buffer updates itself
        return checkpoint(block, *args, use_reentrant=False)
    return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _frozen_statistics(block)))


def _head(embed_dim: int, num_classes: int) -> nn.Module:
    return nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


@contextmanager
def _frozen_statistics(block: nn.Module) -> Iterator[None]:
    """Recompute a block without moving its batch-norm statistics a second time."""
    norms = [m for m in block.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training]
    before = [(n, n.momentum, n.num_batches_tracked) for n in norms]
    for norm in norms:
        norm.momentum = 0.0  # not track_running_stats: autograd must save the same tensors as the first time
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked = norm.num_batches_tracked.clone()
    try:
        yield
    finally:
        for norm, momentum, count in before:
            norm.momentum, norm.num_batches_tracked = momentum, count


def _take_indices(depth: int, indices: int | Sequence[int] | None) -> list[int]:
    if indices is None:
        return list(range(depth))
    if isinstance(indices, int):
        if not 0 < indices <= depth:
            raise ConfigError(f"indices={indices} asks for the last {indices} blocks; the model has {depth}.")
        return list(range(depth - indices, depth))
    wrong = [i for i in indices if not -depth <= i < depth]
    if wrong or not indices:
        raise ConfigError(f"indices={list(indices)}: the model's blocks are 0 to {depth - 1}, or -{depth} to -1.")
    return sorted({i % depth for i in indices})


def _check_config(config: dict[str, Any]) -> None:
    problems = [
        f"{name} is {config[name]}; it must be {floor} or more"
        for name, floor in {"in_chans": 1, "num_classes": 0, "depth": 1, "cls_attn_layers": 1, "embed_dim": 8}.items()
        if config[name] < floor
    ]
    problems += [
        f"{name} is {value}; it must be at least 0 and less than 1"
        for name, value in config.items()
        if (name.endswith("drop_rate") or name in ("drop_rate", "drop_path_rate")) and not 0 <= value < 1
    ]
    problems += [
        f"{name} is {config[name]!r}; it must be one of {', '.join(known)}"
        for name, known in (("global_pool", POOLS), ("attn_form", FORMS))
        if config[name] not in known
    ]
    if config["mlp_ratio"] <= 0:
        problems.append(f"mlp_ratio is {config['mlp_ratio']}; it must be more than 0")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
