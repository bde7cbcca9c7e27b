"""The network, loss and step of chapter 5 as one writes them in plain torch, channels last."""

from itertools import pairwise

import torch
from torch import nn
from torch.nn import functional as F

LAST = torch.channels_last_3d
SHELLS, POINTS, WAVES = 6, 24, 4


def place(x: torch.Tensor) -> torch.Tensor:
    """Maps (n, c, s, s, s) with the position appended: three channels from -1 to 1."""
    side = x.shape[-1]
    axis = (torch.arange(side, dtype=x.dtype) + 0.5) * (2 / side) - 1
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    return torch.cat([x, grid.expand(len(x), -1, -1, -1, -1)], dim=1)


class Block(nn.Module):
    """Convolution, layer norm over the channels of each place without scale and shift, ReLU."""

    def __init__(self, channels: int, width: int, stride: int = 1, at_end: bool = False):
        super().__init__()
        self.at_end = at_end and stride == 2
        self.conv = nn.Conv3d(channels, width, 3, stride, padding=0 if self.at_end else 1)
        self.norm = nn.LayerNorm(width, eps=1e-3, elementwise_affine=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.conv(F.pad(x, (0, 1) * 3) if self.at_end else x)
        x = self.norm(x.permute(0, 2, 3, 4, 1))
        return F.relu(x, inplace=True).permute(0, 4, 1, 2, 3)  # a fifth of the step faster than in the other order


class Standardise(nn.Module):
    """Rows (n, c) less the running mean, over the running deviation; both follow the batches of a training."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("variance", torch.ones(width))
        self.batches = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            now, rate = x.detach(), 1 / min(self.batches + 1, 50)
            self.variance.lerp_(((now - self.mean) ** 2).mean(0), rate)
            self.mean.lerp_(now.mean(0), rate)
            self.batches += 1
        return ((x - self.mean) * (self.variance + 1e-4).rsqrt()).clamp(-5, 5)


class Network(nn.Module):
    """Encoder-decoder with heat, box and subtype heads, for volumes with two channels.

    `at_end` pads strided convolutions at the end alone, as TensorFlow does, which makes the outputs comparable to the
    last digits; without it they are padded on both sides, as torch users do.
    """

    def __init__(self, classes: int = 4, filters: tuple[int, ...] = (16, 32, 64), dropout: float = 0.3,
                 at_end: bool = False):
        super().__init__()
        widths = (2, *filters)
        self.downs = nn.ModuleList(Block(a, b, 2, at_end) for a, b in pairwise(widths))
        self.levels = nn.ModuleList(Block(width, width) for width in filters[1:])
        self.bottom = Block(filters[-1] + 3, filters[-1])
        upwards = filters[::-1]
        self.mixes = nn.ModuleList(nn.Conv3d(a, b, 1) for a, b in pairwise(upwards))
        self.ups = nn.ModuleList(Block(width, width) for width in upwards[1:])
        self.heat, self.box = nn.Conv3d(filters[0], 1, 1), nn.Conv3d(filters[0], 6, 1)
        nn.init.constant_(self.heat.bias, -4.6)
        seen = sum(filters) + 6 + (2 + WAVES) * SHELLS * widths[0]
        self.scale, self.subtype = Standardise(seen), nn.Linear(seen, classes)
        self.dropout = nn.Dropout(dropout)
        points = ((torch.arange(POINTS) + 0.5) * (2 / POINTS) - 1) * SHELLS / 4
        self.register_buffer("points", torch.cartesian_prod(points, points, points))
        shell = (self.points.norm(dim=1) * 4).long().clamp(max=SHELLS)
        self.register_buffer("inside", F.one_hot(shell, SHELLS + 1)[:, :SHELLS].float())
        self.register_buffer("share", self.inside / self.inside.sum(0))
        waves, degree = zip(*(part for k in range(SHELLS) for part in waves_of(self.points, shell == k)), strict=True)
        self.register_buffer("waves", torch.cat(waves, dim=1).float())
        owner = torch.tensor([d * SHELLS + k // WAVES for k, d in enumerate(degree)])
        self.register_buffer("owner", owner.repeat_interleave(torch.tensor([wave.shape[1] for wave in waves])))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        volume, seen = x, []
        for down, level in zip(self.downs, (nn.Identity(), *self.levels), strict=True):
            seen.append(x := level(down(x)))
        decoded = [x := self.bottom(place(x))]
        for mix, up, skip in zip(self.mixes, self.ups, seen[-2::-1], strict=True):
            decoded.append(x := up(F.interpolate(mix(x), scale_factor=2) + skip))
        with torch.autocast("cpu", enabled=False):
            decoded = [maps.float() for maps in decoded]
            heat, box = torch.sigmoid(self.heat(decoded[-1])), self.box(decoded[-1])
            evidence = pooled(heat, box, [*decoded[:-1], place(decoded[-1])])
            evidence = torch.cat([evidence, self.shells(heat.detach(), box.detach(), volume)], dim=1)
            subtype = self.subtype(self.dropout(self.scale(evidence)))
            return {"heat": heat, "box": box, "subtype": torch.softmax(subtype, dim=1)}

    def shells(self, heat: torch.Tensor, box: torch.Tensor, volume: torch.Tensor) -> torch.Tensor:
        """Means, then deviations, then their waves, of the volume in shells around the surest box."""
        side = heat.shape[-1]
        cell = heat.flatten(1).argmax(1)
        told = box.flatten(2).gather(2, cell[:, None, None].expand(-1, 6, 1))[..., 0]
        centre = torch.stack([cell // side**2, cell // side % side, cell % side], 1) + 0.5 + told[:, :3]
        half = told[:, 3:].clamp(-4, 6).exp() / 2
        at = ((centre[:, None] + half[:, None] * self.points) * (2 / side) - 1)[:, :, None, None].flip(-1)
        seen = F.grid_sample(volume, at, padding_mode="border", align_corners=False).flatten(2)
        means = seen @ self.share
        apart = seen - means @ self.inside.T
        waves = torch.zeros(*means.shape[:2], WAVES * SHELLS).index_add_(2, self.owner, (apart @ self.waves) ** 2)
        parts = torch.cat([means, (apart**2 @ self.share).sqrt(), waves.sqrt()], dim=2)
        return parts.transpose(1, 2).flatten(1)


def waves_of(points: torch.Tensor, here: torch.Tensor) -> list[tuple[torch.Tensor, int]]:
    """For 1 to `WAVES` waves around a shell, the places (v,) of which are told: (v, functions), and the number less 1.

    A degree's functions are the polynomials of the direction that lower degrees cannot make.
    """
    way = F.normalize(points[here].double(), dim=1)
    known, parts = torch.ones(len(way), 1, dtype=torch.double) / len(way) ** 0.5, []
    for degree in range(1, WAVES + 1):
        powers = torch.combinations(torch.arange(3), degree, with_replacement=True)
        columns = way[:, powers].prod(2)
        new, strength, _ = torch.linalg.svd(columns - known @ (known.T @ columns), full_matrices=False)
        new = new[:, strength > 1e-6 * len(way) ** 0.5]
        wide = torch.zeros(len(points), new.shape[1], dtype=torch.double)
        wide[here] = new / len(way) ** 0.5
        known = torch.cat([known, new], dim=1)
        parts.append((wide, degree - 1))
    return parts


def pooled(heat: torch.Tensor, box: torch.Tensor, maps: list[torch.Tensor]) -> torch.Tensor:
    """Means of maps and of the box size, weighted by the squared heat."""
    weight, parts = heat.detach() ** 2, []
    for x in (*maps, box[:, 3:].detach()):
        factor = weight.shape[-1] // x.shape[-1]
        share = F.avg_pool3d(weight, factor) if factor > 1 else weight
        parts.append((share * x).sum((2, 3, 4)) / (share.sum((2, 3, 4)) + 1e-6))
    return torch.cat(parts, dim=1)


def loss(seen: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """Focal loss of the heat, absolute error of the boxes, cross-entropy of the subtype: mean over the batch."""
    p, true, axes = seen["heat"].clamp(1e-6, 1 - 1e-6), wanted["heat"], (1, 2, 3, 4)
    centre = (true >= 1).float()
    focal = centre * (1 - p) ** 2 * p.log() + (1 - centre) * (1 - true) ** 4 * p ** 2 * (1 - p).log()
    heat = -focal.sum(axes) / centre.sum(axes).clamp(min=1)
    weight = wanted["box"][:, 6:]
    box = (weight * (wanted["box"][:, :6] - seen["box"]).abs()).sum(axes) / (6 * weight.sum(axes).clamp(min=1e-6))
    subtype = -(wanted["subtype"] * seen["subtype"].clamp(1e-7, 1).log()).sum(1)
    return (heat + box + subtype).mean()


def tensors(batch: dict) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A batch of arrays with channels last to volumes and targets with channels second, in the same memory order."""
    moved = {name: torch.from_numpy(values.copy()) for name, values in batch.items()}
    moved = {name: t.permute(0, 4, 1, 2, 3).contiguous(memory_format=LAST) if t.ndim == 5 else t
             for name, t in moved.items()}
    return moved.pop("seen"), moved


def stepper(network: nn.Module, batch: dict, loss_of, half: bool):
    """A function that makes one training step and returns its loss."""
    volumes, wanted = tensors(batch)
    network = network.to(memory_format=LAST).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=0.01)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            value = loss_of(network(volumes), wanted)
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        return value.item()

    return step


def monai_network(name: str, classes: int = 4) -> nn.Module:
    """Another network, from MONAI: one prediction a volume."""
    own = {"DenseNet121": {}, "UNet": {"channels": (16, 32, 64), "strides": (2, 2)}}[name]
    from monai.networks import nets

    return getattr(nets, name)(spatial_dims=3, in_channels=2, out_channels=classes, **own)


def monai_loss(seen: torch.Tensor, wanted: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of the subtype; of a map its mean over all places is taken."""
    seen = seen.float().mean((2, 3, 4)) if seen.ndim == 5 else seen.float()
    return -(wanted["subtype"] * torch.log_softmax(seen, dim=1)).sum(1).mean()
