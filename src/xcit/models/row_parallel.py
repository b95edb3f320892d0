"""One XCiT over images whose rows are split over several processes, for training and inference.

Images too large for one machine's memory are trained on exactly: attention is global, batch statistics are those of the
whole, and gradients are those that one process would have. In XCA all tokens meet in sums of d x (d + 2) numbers a
head, in class attention in sums of d + 1; convolutions need one row of a neighbour; batch norm two sums a channel. None
of it grows with the number of rows. How gradients pass through what is sent: ``xcit.models.row_collectives``.

Legend: B batch, (H, W) an image, (Hp, Wp) its token grid, r rows of tokens that a process holds, n = r * Wp tokens,
N = Hp * Wp all of them, C embed_dim, h heads, d = C / h head_dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from xcit.errors import ConfigError, ShapeError
from xcit.models.layers import LPI, XCA, ClassAttention, ClassAttentionBlock, ConvPatchEmbed, XCABlock
from xcit.models.row_collectives import RowGroup, batch_norm, convolve
from xcit.models.variants import BlockWithoutLPI, LinearPatchEmbed, XCAWithoutNorm, XCAWithoutTemperature
from xcit.models.xcit import XCiT
from xcit.ops.position import fourier_position
from xcit.ops.xca import NORM_EPS

LEAST_ROWS = 2
"""Rows of tokens that each of several processes holds at least: as many as inference of giant images needs."""


def split_rows(model: XCiT, group: dist.ProcessGroup | None = None) -> RowParallel:
    """Let the processes of a group run one model over images of which each holds some rows.

    Every process calls this, with the same weights, and from then on takes part in everything that is computed:

        model = create_model("xcit_small_12_p8", num_classes=10)    # the same weights in all processes
        parallel = split_rows(model)
        optimizer = torch.optim.AdamW(model.parameters())
        first, end = parallel.share(height)
        loss = F.cross_entropy(parallel(images[:, :, first:end], height), targets)    # the same in all processes
        loss.backward()
        parallel.sync_gradients()
        optimizer.step()                                            # the same in all processes

    started with ``torchrun --nproc-per-node N``, after ``torch.distributed.init_process_group("gloo")`` (or "nccl" with
    the model on the process's own graphics card). It is not to be wrapped in DistributedDataParallel.

    Args:
        model: an XCiT or one of its variants. Its parameters are used as they are; gradients and batch-norm statistics
            go to it.
        group: the processes; None for all.

    Raises:
        ConfigError: no group yet, a process outside of it, another kind of model, or other weights in another process.
    """
    _check_model(model)
    rows = RowGroup(group)
    _check_weights(model, rows)
    return RowParallel(model, rows)


class RowParallel(nn.Module):
    """An XCiT over a process's rows of an image; made by ``split_rows``.

    Args:
        model: what is run; whether it trains, and which of its batch norms do, is up to it.
        rows: the processes.
    """

    def __init__(self, model: XCiT, rows: RowGroup) -> None:
        super().__init__()
        self.model = model
        self._rows = rows

    def share(self, height: int) -> tuple[int, int]:
        """Return which pixel rows of an image this process is to be given: the first, and the one behind the last.

        They are whole rows of tokens, as many in each process, or one more.

        Args:
            height: H, of the whole image, in px.

        Raises:
            ShapeError: less than one patch.
            ConfigError: too few rows of tokens for so many processes.
        """
        return self._share(self._rows.rank, height)

    def forward(self, rows: Float[Tensor, "batch chans rows width"], height: int) -> Float[Tensor, "batch classes"]:
        """Return what ``model(images)`` returns of the whole images; it is the same in all processes.

        In training mode, stochastic depth drops the same branches in all processes: those that the first one draws.

        Args:
            rows: this process's rows of the images, those of ``share(height)``.
            height: H, of the whole images, in px.

        Raises:
            ShapeError: not the rows of the share, other channels, or rows of different images.
            ConfigError: too few rows of tokens for so many processes, processes in different modes, or a setting that
                cannot be honoured: dropout in training, gradient checkpointing, XCA in its covariance form.
        """
        self._check_settings()
        self._check_rows(rows, height)
        kept = self._draw_kept(rows.shape[0])
        x = self._embed(rows, height)
        Hp = -(-height // self._patch_size)
        for block in self.model.blocks:
            x = self._block(block, x, Hp, kept)
        pooled = self._pool(x.flatten(1, 2), Hp * x.shape[2])
        return self._rows.share_of_loss(self.model.head(pooled))

    @torch.no_grad()
    def sync_gradients(self) -> None:
        """Give every process the gradients that a single one would have; to be called once, after the backward pass.

        After several backward passes whose gradients add up: after the last. Before clipping, and before the
        optimizer's step. A parameter that the loss does not depend on gets zeros.

        Raises:
            ConfigError: there are no gradients yet.
        """
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if all(p.grad is None for p in parameters):
            raise ConfigError("No parameter has a gradient; call loss.backward() before sync_gradients().")
        grads = []
        for p in parameters:
            if p.grad is None:  # as the whole model has it, in which class token and patches are one tensor
                p.grad = torch.zeros_like(p)
            grads.append(p.grad)
        for dtype in dict.fromkeys(grad.dtype for grad in grads):
            alike = [grad for grad in grads if grad.dtype == dtype]
            wide = torch.promote_types(dtype, torch.float32)
            total = self._rows.total(torch.cat([grad.flatten().to(wide) for grad in alike]))
            for grad, part in zip(alike, total.split([grad.numel() for grad in alike]), strict=True):
                grad.copy_(part.view(grad.shape))

    # --- the way of an image: as in ``XCiT``, with (B, r, Wp, C) rows of tokens ---------------------------------------

    def _embed(self, rows: Tensor, height: int) -> Tensor:
        model = self.model
        stem, grid_height = model.patch_embed, -(-height // self._patch_size)
        if isinstance(stem, LinearPatchEmbed):
            tokens, grid = stem(rows)
            x = tokens.unflatten(1, grid)
        else:
            x = rows
            for layer in stem.proj:
                if isinstance(layer, nn.Sequential):
                    conv, norm = layer
                    assert isinstance(conv, nn.Conv2d)
                    assert isinstance(norm, nn.BatchNorm2d)
                    height = -(-height // 2)
                    x = batch_norm(norm, convolve(conv, x, self._rows), height, self._rows)
                else:
                    x = layer(x)
            x = x.permute(0, 2, 3, 1)
        if model.pos_embeder is not None:
            D, projection = model.pos_embeder.hidden_dim, model.pos_embeder.token_projection
            first, end = self._token_rows(self._rows.rank, grid_height)
            r, Wp = x.shape[1:3]
            down = fourier_position(grid_height, 1, hidden_dim=D, device=x.device)[first:end, :, :D]
            across = fourier_position(1, Wp, hidden_dim=D, device=x.device)[:, :, D:]
            features = torch.cat((down.expand(r, Wp, D), across.expand(r, Wp, D)), dim=-1)
            x = x + F.linear(features.to(projection.weight.dtype), projection.weight.flatten(1), projection.bias)
        return x

    def _block(self, block: nn.Module, x: Tensor, grid_height: int, kept: Iterator[Tensor]) -> Tensor:
        assert isinstance(block, XCABlock | BlockWithoutLPI)
        drops = _drops(block)

        def drop_path(branch: Tensor) -> Tensor:
            return branch * next(kept) if drops else branch

        x = x + drop_path(block.gamma1 * _xca(block.attn, block.norm1(x), self._rows))
        if isinstance(block, XCABlock):
            x = x + drop_path(block.gamma3 * _lpi(block.local_mp, block.norm3(x), grid_height, self._rows))
        return x + drop_path(block.gamma2 * block.mlp(block.norm2(x)))

    def _pool(self, x: Tensor, num_tokens: int) -> Tensor:
        """Return what the head sees (B, C) of this process's patch tokens (B, n, C)."""
        model = self.model
        if model.cls_token is not None:
            cls: Tensor = model.cls_token.expand(x.shape[0], -1, -1)
            for block in model.cls_attn_blocks:
                assert isinstance(block, ClassAttentionBlock)
                cls, x = _class_block(block, cls, x, self._rows)
            if model.global_pool == "token":
                return model.norm(cls)[:, 0]
        (total,) = self._rows.sums(model.norm(x).sum(dim=1))
        return total / num_tokens

    def _draw_kept(self, batch: int) -> Iterator[Tensor]:
        """Return stochastic depth's factors (B, 1, 1, 1) in the order and from the generator that the model would."""
        like = self.model.norm.weight
        draws = []
        for block in self.model.blocks:
            if _drops(block):
                survival = 1.0 - block.drop_path.p  # type: ignore[operator, union-attr]
                for _ in range(3 if isinstance(block, XCABlock) else 2):
                    noise = torch.empty(batch, 1, 1, 1, dtype=like.dtype, device=like.device)
                    draws.append(noise.bernoulli_(survival).div_(survival))
        return iter(self._rows.of_first(torch.stack(draws)) if draws else ())

    # --- checks -------------------------------------------------------------------------------------------------------

    @property
    def _patch_size(self) -> int:
        return self.model.patch_embed.patch_size

    def _share(self, rank: int, height: int) -> tuple[int, int]:
        p = self._patch_size
        if height < p:
            raise ShapeError(f"The image is {height} px high, less than one patch of {p} x {p}; enlarge it first.")
        first, end = self._token_rows(rank, -(-height // p))
        return first * p, min(end * p, height)

    def _token_rows(self, rank: int, grid_height: int) -> tuple[int, int]:
        size = self._rows.size
        if size > 1 and grid_height < LEAST_ROWS * size:
            raise ConfigError(
                f"The image has {grid_height} rows of tokens, too few for {size} processes, of which each takes "
                f"{LEAST_ROWS} at least; use {max(1, grid_height // LEAST_ROWS)} or fewer."
            )
        return rank * grid_height // size, (rank + 1) * grid_height // size

    def _check_settings(self) -> None:
        if self.model.grad_checkpointing and torch.is_grad_enabled():
            raise ConfigError("Split rows are not recomputed in the backward pass; call set_grad_checkpointing(False).")
        for name, module in self.model.named_modules():
            if isinstance(module, XCA) and module.form == "covariance":
                raise ConfigError("Over split rows XCA has the token form only; call set_attn_form('auto').")
            p = module.attn_drop if isinstance(module, XCA) else module.p if isinstance(module, nn.Dropout) else 0.0
            if p > 0 and module.training:
                raise ConfigError(
                    f"{name} drops values with p = {p}, which would be others in each process; to train over split "
                    f"rows, set every drop rate but drop_path_rate to 0."
                )

    def _check_rows(self, rows: Tensor, height: int) -> None:
        """Check what all processes were given, so that all of them fail, and none waits for one that did."""
        records = torch.is_grad_enabled()
        shape = rows.shape if rows.ndim == 4 else (rows.ndim, -1, -1, -1)
        mode = (
            self.model.training,
            records and rows.requires_grad,
            records and sum(p.requires_grad for p in self.model.parameters()),
        )
        table = self._rows.table([*shape, height, *map(int, mode)], rows.device)
        chans, p = self.model.patch_embed.in_chans, self._patch_size
        for rank, (B, C, r, W, *_) in enumerate(table):
            if chans != C:
                raise ShapeError(
                    f"The model takes rows of images, (batch, {chans}, rows, W); process {rank} gave "
                    f"{(B, C, r, W) if C >= 0 else f'a tensor with {B} axes'}."
                )
        images = [(B, H, W) for B, _, _, W, H, *_ in table]
        if len(set(images)) > 1:
            raise ShapeError(
                f"The processes gave rows of different images: (batch, H, W) are {', '.join(map(str, images))}."
            )
        if len({tuple(row[5:]) for row in table}) > 1:
            raise ConfigError(
                "Training mode, gradient mode, and what needs gradients must be the same in all processes, and are not."
            )
        if rows.shape[3] < p:
            raise ShapeError(
                f"The image is {height} x {rows.shape[3]} px, less than one patch of {p} x {p}; enlarge it first."
            )
        for rank, (_, _, r, *_) in enumerate(table):
            first, end = self._share(rank, height)
            if r != end - first:
                raise ShapeError(
                    f"Process {rank} of {self._rows.size} gave {r} rows of an image {height} px high; its share is "
                    f"the {end - first} rows from {first} on."
                )


# --- the layers over split rows: each is the module's own forward, with its sums over all processes -------------------


def _lpi(lpi: LPI, x: Tensor, grid_height: int, rows: RowGroup) -> Tensor:
    x = lpi.act(convolve(lpi.conv1, x.permute(0, 3, 1, 2), rows))
    return convolve(lpi.conv2, batch_norm(lpi.bn, x, grid_height, rows), rows).permute(0, 2, 3, 1)


def _xca(attn: XCA, x: Tensor, rows: RowGroup) -> Tensor:
    """XCA's token form: cosines are products summed over all tokens, divided by norms that are."""
    qkv = attn.qkv(x.flatten(1, 2)).unflatten(-1, (3, attn.num_heads, -1))
    q, k, v = qkv.permute(2, 0, 3, 4, 1).unbind(0)  # each (B, h, d, n)
    with torch.autocast(x.device.type, enabled=False):
        q, k = _wide(q), _wide(k)
        gram = q @ k.transpose(-2, -1)  # (B, h, d, d)
        if isinstance(attn, XCAWithoutNorm):
            (logits,) = rows.sums(gram)
        else:
            gram, squares = rows.sums(gram, torch.stack((q.square().sum(-1), k.square().sum(-1))))
            # clamp before the root: the same floor as max(norm, eps), and a finite gradient at a norm of zero
            q_norm, k_norm = squares.clamp_min(NORM_EPS**2).sqrt().unbind(0)  # each (B, h, d)
            logits = gram / (q_norm.unsqueeze(-1) * k_norm.unsqueeze(-2))
        if not isinstance(attn, XCAWithoutTemperature):
            logits = logits * attn.temperature
    y = logits.softmax(dim=-1).to(v.dtype) @ v
    return attn.proj(y.permute(0, 3, 1, 2).flatten(2)).view(x.shape)


def _class_block(block: ClassAttentionBlock, cls: Tensor, x: Tensor, rows: RowGroup) -> tuple[Tensor, Tensor]:
    own, normed = block.norm1(cls), block.norm1(x)
    cls = cls + block.gamma1 * _class_attention(block.attn, own, normed, rows)
    x = x + block.gamma1 * normed
    cls = block.norm2(cls)
    if block.tokens_norm:
        x = block.norm2(x)
    return cls + block.gamma2 * block.mlp(cls), x + x


def _class_attention(attn: ClassAttention, own: Tensor, normed: Tensor, rows: RowGroup) -> Tensor:
    """Attend to the class token, of which each process has a copy, and to the patch tokens of all."""
    C, h = own.shape[2], attn.num_heads
    weight, bias = attn.qkv.weight, attn.qkv.bias

    def heads(x: Tensor, part: slice) -> Tensor:
        y = F.linear(x, weight[part], None if bias is None else bias[part])
        return y.unflatten(-1, (-1, h, C // h)).permute(2, 0, 3, 1, 4)  # (q, k, v) of (B, h, n, d)

    q = heads(own, slice(0, C))[0]
    own_k, own_v = heads(own, slice(C, None)).unbind(0)
    k, v = heads(normed, slice(C, None)).unbind(0)
    with torch.autocast(own.device.type, enabled=False):
        q, k, v, own_k, own_v = (_wide(t) for t in (q * attn.scale, k, v, own_k, own_v))
        scores, own_score = q @ k.transpose(-2, -1), q @ own_k.transpose(-2, -1)  # (B, h, 1, n), (B, h, 1, 1)
        # a softmax does not depend on what is taken from all of its scores, so the highest needs no gradient
        top = rows.maximum(torch.maximum(scores.amax(-1, keepdim=True), own_score))
        shares, own_share = (scores - top).exp(), (own_score - top).exp()
        weighted, total = rows.sums(shares @ v, shares.sum(-1, keepdim=True))
        cls = (weighted + own_share * own_v) / (total + own_share)
    return attn.proj(cls.to(normed.dtype).transpose(1, 2).flatten(2))


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _drops(block: nn.Module) -> bool:
    """Tell whether stochastic depth acts in a block."""
    assert isinstance(block, XCABlock | BlockWithoutLPI)
    return block.drop_path.training and block.drop_path.p > 0


# --- what can be split ------------------------------------------------------------------------------------------------


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, XCiT):
        raise ConfigError(f"split_rows takes an XCiT, not compiled nor wrapped; got a {type(model).__name__}.")
    known: list[tuple[str, nn.Module, tuple[type, ...]]] = [
        ("patch_embed", model.patch_embed, (ConvPatchEmbed, LinearPatchEmbed))
    ]
    for i, block in enumerate(model.blocks):
        known.append((f"blocks.{i}", block, (XCABlock, BlockWithoutLPI)))
        known.append((f"blocks.{i}.attn", getattr(block, "attn", block), (XCA, XCAWithoutNorm, XCAWithoutTemperature)))
    known += [(f"cls_attn_blocks.{i}", block, (ClassAttentionBlock,)) for i, block in enumerate(model.cls_attn_blocks)]
    for name, module, kinds in known:
        if type(module) not in kinds:
            raise ConfigError(
                f"{name} is a {type(module).__name__}, whose rows cannot be split; split_rows takes an XCiT as "
                f"create_model makes it."
            )


def _check_weights(model: XCiT, rows: RowGroup) -> None:
    state = {name: t for name, t in model.state_dict().items() if t.is_floating_point()}
    sums = torch.stack([t.double().sum() for t in state.values()])
    sizes = torch.stack([t.double().abs().sum() for t in state.values()])
    highest, minus_lowest, size = rows.maximum(torch.stack((sums, -sums, sizes)))
    differs = highest + minus_lowest > 1e-9 * size  # the order of summation may differ
    if differs.any():
        raise ConfigError(
            f"The processes begin with different weights ({list(state)[int(differs.nonzero()[0])]} is the first that "
            f"differs); load one checkpoint in all of them, or seed them alike."
        )
