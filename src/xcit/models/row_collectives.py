"""What processes that hold rows of the same maps tell each other, with gradients, and the layers that need no more.

One rule gives every gradient. Each process runs the same program with a copy of its own of all parameters, and what is
minimised is the mean of the losses that they compute, which is the loss itself where all compute the same. Collectives
are linear maps of what all processes hold, and their gradients the transposed maps: a sum over the group has a sum over
the group, and rows sent to a neighbour come back as gradients, which are added. The gradient of a parameter is then the
sum of those of its copies, whether it was used for a process's own rows, for what all hold alike, or for both. So
nothing has to be known of a parameter, and one sum after the backward pass is right for all of them.

In an XCiT every collective depends on the one before it, so that the backward pass meets them in the same order in all
processes, and none waits for another in vain.

Legend: B batch, C channels, (h, w) a map, r of whose rows a process holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from xcit.errors import ConfigError, ShapeError


class RowGroup:
    """Processes of which each holds some rows of the same maps: the first the upper ones, and so on downwards.

    Args:
        group: of ``torch.distributed``; None for that of all processes.

    Attributes:
        rank: of this process in the group.
        size: how many there are.

    Raises:
        ConfigError: there is no group yet, or this process is not in it.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ConfigError(
                "There is no group of processes; start the program with torchrun --nproc-per-node N, and call "
                "torch.distributed.init_process_group first."
            )
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ConfigError("This process is not in the group; split rows in the processes of the group only.")

    # --- with gradients -----------------------------------------------------------------------------------------------

    def sums(self, *parts: Tensor) -> list[Tensor]:
        """Return the sums over all processes of tensors of one dtype, in one message.

        The gradients are summed over all processes in one message as well.
        """
        total = _Sum.apply(torch.cat([part.flatten() for part in parts]), self)
        split = total.split([part.numel() for part in parts])
        return [one.view(part.shape) for one, part in zip(split, parts, strict=True)]

    def with_neighbours(
        self, x: Float[Tensor, "batch channels rows width"], above: int, below: int
    ) -> Float[Tensor, "batch channels more_rows width"]:
        """Return a process's rows with those next to them: ``above`` more, and ``below`` more.

        Beyond the border of the image there is nothing: the rows there are the zeros with which a convolution pads.

        Args:
            x: own rows, as many at least as are asked of a neighbour.
            above: rows to take from the process before.
            below: rows to take from the process after.

        Returns:
            (B, C, above + r + below, w), channels-last.
        """
        return _WithNeighbours.apply(x, above, below, self)

    def share_of_loss(self, x: Tensor) -> Tensor:
        """Return what is the same in all processes as it is; its gradient is divided by their number.

        Of all that is computed from here on each process has a copy, and the loss is the mean over them.
        """
        return _ShareOfLoss.apply(x, self.size)

    # --- without ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def total(self, x: Tensor) -> Tensor:
        """Return the sum over all processes, a new tensor."""
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=self._group)
        return total

    @torch.no_grad()
    def maximum(self, x: Tensor) -> Tensor:
        """Return each entry's highest value in any process, a new tensor."""
        highest = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=self._group)
        return highest

    def table(self, row: Sequence[int], device: torch.device) -> list[list[int]]:
        """Return what each process says of itself, in their order.

        Args:
            row: of this process, as long as everyone's.
            device: by whose memory messages go.
        """
        own = torch.tensor(list(row), dtype=torch.int64, device=device)
        found = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(found, own, group=self._group)
        return [each.tolist() for each in found]

    def of_first(self, x: Tensor) -> Tensor:
        """Return what the first process has; ``x`` is overwritten with it."""
        dist.broadcast(x, group=self._group, group_src=0)
        return x

    def exchange(self, up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows to both neighbours, and receive theirs.

        Args:
            up: for the process before.
            down: for the process after.

        Returns:
            What the one before sent down, and what the one after sent up; zeros where there is none.
        """
        up, down = up.contiguous(), down.contiguous()
        from_above, from_below = torch.zeros_like(down), torch.zeros_like(up)
        messages = []
        for peer, sent, received in ((self.rank - 1, up, from_above), (self.rank + 1, down, from_below)):
            for verb, rows in ((dist.isend, sent), (dist.irecv, received)):
                if 0 <= peer < self.size and rows.numel():
                    messages.append(dist.P2POp(verb, _bytes(rows), group=self._group, group_peer=peer))
        if messages:
            for request in dist.batch_isend_irecv(messages):
                request.wait()
        return from_above, from_below


def convolve(
    conv: nn.Conv2d, x: Float[Tensor, "batch channels rows width"], rows: RowGroup
) -> Float[Tensor, "batch out_channels out_rows out_width"]:
    """Return a process's rows of a convolution of 3 x 3 with padding 1.

    Args:
        conv: of stride 1, or of stride 2; the rows then begin with one of even number.
        x: a process's rows.
        rows: the processes.
    """
    stride = conv.stride[0]
    assert (conv.kernel_size, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1))
    x = rows.with_neighbours(x, above=1, below=1 if stride == 1 else 0)
    if stride == 2 and x.shape[2] % 2 == 0:  # an odd number of own rows: only where the image ends
        x = F.pad(x, (0, 0, 0, 1))
    return F.conv2d(x, conv.weight, conv.bias, conv.stride, (0, 1), groups=conv.groups)


def batch_norm(
    norm: nn.BatchNorm2d, x: Float[Tensor, "batch channels rows width"], height: int, rows: RowGroup
) -> Float[Tensor, "batch channels rows width"]:
    """Return a process's rows of a batch norm; in training mode its statistics are those of all rows.

    The running ones move as the module's own forward would move them, alike in all processes.

    Args:
        norm: with its mode.
        x: a process's rows.
        height: h, of the whole map.
        rows: the processes.

    Raises:
        ShapeError: in training, a single value a channel.
    """
    if not norm.training and norm.running_mean is not None:
        return norm(x)
    count = x.shape[0] * height * x.shape[3]
    if count == 1:
        raise ShapeError("Batch norm has no statistics of a single value; give larger images, or more of them.")
    wide = torch.promote_types(x.dtype, torch.float32)
    (total,) = rows.sums(x.sum(dim=(0, 2, 3), dtype=wide))
    mean = total / count
    centered = x.to(wide) - mean[:, None, None]
    (squares,) = rows.sums(centered.square().sum(dim=(0, 2, 3)))
    variance = squares / count
    if norm.training and norm.track_running_stats:
        _track(norm, mean.detach(), squares.detach() / (count - 1))
    scale = (variance + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight
    y = centered * scale[:, None, None]
    return (y if norm.bias is None else y + norm.bias[:, None, None]).to(x.dtype)


def _track(norm: nn.BatchNorm2d, mean: Tensor, unbiased: Tensor) -> None:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    assert norm.num_batches_tracked is not None
    norm.num_batches_tracked.add_(1)
    share = 1.0 / float(norm.num_batches_tracked) if norm.momentum is None else norm.momentum
    norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), share)
    norm.running_var.lerp_(unbiased.to(norm.running_var.dtype), share)


class _Sum(torch.autograd.Function):
    """x_i -> sum_j x_j in every process i, and the same of the gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: RowGroup) -> Tensor:
        ctx.group = group
        return group.total(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.group.total(grads[0]), None


class _WithNeighbours(torch.autograd.Function):
    """Rows go to the neighbours, and their gradients come back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, above: int, below: int, group: RowGroup) -> Tensor:
        ctx.above, ctx.below, ctx.group = above, below, group
        B, C, r, w = x.shape
        from_above, from_below = group.exchange(up=x.narrow(2, 0, below), down=x.narrow(2, r - above, above))
        joined = torch.empty(
            (B, C, above + r + below, w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        joined[:, :, :above] = from_above
        joined[:, :, above : above + r] = x
        joined[:, :, above + r :] = from_below
        return joined

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (grad,) = grads
        above, below = ctx.above, ctx.below
        r = grad.shape[2] - above - below
        own = grad.narrow(2, above, r).clone(memory_format=torch.channels_last)
        upper, lower = grad.narrow(2, 0, above), grad.narrow(2, above + r, below)
        from_above, from_below = ctx.group.exchange(up=upper, down=lower)
        own[:, :, :below] += from_above
        own[:, :, r - above :] += from_below
        return own, None, None, None


class _ShareOfLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, size: int) -> Tensor:
        ctx.size = size
        return x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] / ctx.size, None


def _bytes(x: Tensor) -> Tensor:
    """Return a tensor's memory as bytes: not every backend sends every type."""
    return x.view(torch.uint8)
