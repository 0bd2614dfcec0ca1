"""Restormer, written from the paper: Zamir et al., "Restormer: Efficient Transformer for
High-Resolution Image Restoration", CVPR 2022.

Attention runs over channels, not positions (MDTA, section 3.1), so its cost grows linearly with the
picture; the feed-forward layer is gated and looks at 3x3 neighbourhoods (GDFN, section 3.2). A
four-level encoder-decoder holds the blocks, and a few more refine the result at full resolution.

Parameter names and shapes are those of the official release, so that its weight files load with
`strict=True`. Activations are kept channels-last, where a LayerNorm over channels and a 1x1
convolution read memory in order.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class LayerNorm(nn.Module):
    """Normalises each position over its channels; (B, C, H, W) in and out.

    `BiasFree` divides by the standard deviation without subtracting the mean; `WithBias` is the
    usual LayerNorm. Weight and bias sit in a sub-module called `body`, as in the official files.
    """

    def __init__(self, dim: int, kind: str) -> None:
        super().__init__()
        if kind not in ("WithBias", "BiasFree"):
            raise ValueError(f"LayerNorm type {kind!r} is neither 'WithBias' nor 'BiasFree'")
        self.body = nn.Module()
        self.body.weight = nn.Parameter(torch.ones(dim))
        if kind == "WithBias":
            self.body.bias = nn.Parameter(torch.zeros(dim))
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        x = rearrange(x, "b c h w -> b h w c")
        if self.kind == "WithBias":
            x = F.layer_norm(x, x.shape[-1:], self.body.weight, self.body.bias, eps=1e-5)
        else:
            variance = x.var(-1, keepdim=True, unbiased=False)
            x = x * torch.rsqrt(variance + 1e-5) * self.body.weight
        return rearrange(x, "b h w c -> b c h w")


class Attention(nn.Module):
    """Multi-Dconv head transposed attention (MDTA): a (C/heads x C/heads) map per head, eq. 1."""

    def __init__(self, dim: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(dim, dim * 3, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(dim * 3, dim * 3, 3, padding=1, groups=dim * 3, bias=bias)
        self.project_out = nn.Conv2d(dim, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        heads = self.temperature.shape[0]
        query, key, value = (
            rearrange(part, "b (head c) h w -> b head c (h w)", head=heads)
            for part in self.qkv_dwconv(self.qkv(x)).chunk(3, dim=1)
        )
        # Cosines: the small product is divided by the norms, not each long row before it.
        query_norm, key_norm = (
            torch.linalg.vector_norm(part, dim=-1, keepdim=True, dtype=torch.float32).clamp_min(
                1e-12
            )
            for part in (query, key)
        )
        cosines = (query @ key.transpose(-2, -1)) / (query_norm * key_norm.transpose(-2, -1))
        attention = (cosines * self.temperature).softmax(dim=-1)
        mixed = rearrange(attention @ value, "b head c (h w) -> b (head c) h w", h=height, w=width)
        return self.project_out(mixed.contiguous(memory_format=torch.channels_last))


class FeedForward(nn.Module):
    """Gated-Dconv feed-forward network (GDFN): one half, through GELU, gates the other, eq. 2."""

    def __init__(self, dim: int, expansion: float, bias: bool) -> None:
        super().__init__()
        hidden = int(dim * expansion)
        self.project_in = nn.Conv2d(dim, hidden * 2, 1, bias=bias)
        self.dwconv = nn.Conv2d(hidden * 2, hidden * 2, 3, padding=1, groups=hidden * 2, bias=bias)
        self.project_out = nn.Conv2d(hidden, dim, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, content = self.dwconv(self.project_in(x)).chunk(2, dim=1)
        return self.project_out(F.gelu(gate) * content)


class TransformerBlock(nn.Module):
    """MDTA, then GDFN, each behind a LayerNorm and around a skip connection."""

    def __init__(self, dim: int, heads: int, expansion: float, bias: bool, norm: str) -> None:
        super().__init__()
        self.norm1 = LayerNorm(dim, norm)
        self.attn = Attention(dim, heads, bias)
        self.norm2 = LayerNorm(dim, norm)
        self.ffn = FeedForward(dim, expansion, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class OverlapPatchEmbed(nn.Module):
    """The first 3x3 convolution; (B, in, H, W) to (B, dim, H, W)."""

    def __init__(self, in_channels: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Downsample(nn.Module):
    """Half the size, twice the channels, by space-to-depth."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(dim, dim // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Upsample(nn.Module):
    """Twice the size, half the channels, by depth-to-space."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(dim, dim * 2, 3, padding=1, bias=False), nn.PixelShuffle(2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Restormer(nn.Module):
    """The whole network; (B, inp_channels, H, W) to (B, out_channels, H, W).

    Height and width must be multiples of 8 (ValueError otherwise). With `dual_pixel_task` the input
    is a left-right pair of six channels and the output stands alone; otherwise the network predicts
    a correction that is added to its input. The defaults are the published motion-deblurring
    network: 26,126,644 parameters.
    """

    def __init__(
        self,
        inp_channels: int = 3,
        out_channels: int = 3,
        dim: int = 48,
        num_blocks: tuple[int, ...] = (4, 6, 6, 8),
        num_refinement_blocks: int = 4,
        heads: tuple[int, ...] = (1, 2, 4, 8),
        ffn_expansion_factor: float = 2.66,
        bias: bool = False,
        LayerNorm_type: str = "WithBias",
        dual_pixel_task: bool = False,
    ) -> None:
        super().__init__()

        def blocks(count: int, width: int, head_count: int) -> nn.Sequential:
            return nn.Sequential(
                *(
                    TransformerBlock(width, head_count, ffn_expansion_factor, bias, LayerNorm_type)
                    for _ in range(count)
                )
            )

        self.patch_embed = OverlapPatchEmbed(inp_channels, dim)
        self.encoder_level1 = blocks(num_blocks[0], dim, heads[0])
        self.down1_2 = Downsample(dim)
        self.encoder_level2 = blocks(num_blocks[1], dim * 2, heads[1])
        self.down2_3 = Downsample(dim * 2)
        self.encoder_level3 = blocks(num_blocks[2], dim * 4, heads[2])
        self.down3_4 = Downsample(dim * 4)
        self.latent = blocks(num_blocks[3], dim * 8, heads[3])

        self.up4_3 = Upsample(dim * 8)
        self.reduce_chan_level3 = nn.Conv2d(dim * 8, dim * 4, 1, bias=bias)
        self.decoder_level3 = blocks(num_blocks[2], dim * 4, heads[2])
        self.up3_2 = Upsample(dim * 4)
        self.reduce_chan_level2 = nn.Conv2d(dim * 4, dim * 2, 1, bias=bias)
        self.decoder_level2 = blocks(num_blocks[1], dim * 2, heads[1])
        self.up2_1 = Upsample(dim * 2)
        # Level 1 is not reduced: its skip is concatenated and stays 2 * dim wide to the end.
        self.decoder_level1 = blocks(num_blocks[0], dim * 2, heads[0])
        self.refinement = blocks(num_refinement_blocks, dim * 2, heads[0])

        self.dual_pixel_task = dual_pixel_task
        if dual_pixel_task:
            self.skip_conv = nn.Conv2d(dim, dim * 2, 1, bias=bias)
        self.output = nn.Conv2d(dim * 2, out_channels, 3, padding=1, bias=bias)

    def forward(self, image: Tensor) -> Tensor:
        if image.shape[-2] % 8 or image.shape[-1] % 8:
            size = f"{image.shape[-1]}x{image.shape[-2]}"
            raise ValueError(f"Restormer needs multiples of 8, not {size}; pad the picture first")
        embedded = self.patch_embed(image.contiguous(memory_format=torch.channels_last))
        level1 = self.encoder_level1(embedded)
        level2 = self.encoder_level2(self.down1_2(level1))
        level3 = self.encoder_level3(self.down2_3(level2))
        latent = self.latent(self.down3_4(level3))

        x = self.reduce_chan_level3(torch.cat([self.up4_3(latent), level3], dim=1))
        x = self.decoder_level3(x)
        x = self.reduce_chan_level2(torch.cat([self.up3_2(x), level2], dim=1))
        x = self.decoder_level2(x)
        x = self.decoder_level1(torch.cat([self.up2_1(x), level1], dim=1))
        x = self.refinement(x)
        if self.dual_pixel_task:
            return self.output(x + self.skip_conv(embedded))
        return self.output(x) + image


class StemmedRestormer(Restormer):
    """A Restormer that sees an RGB picture folded to 1/r of its size; (B, 3, H, W) in and out.

    r follows from its input channels, 3 r^2; with 3 of them it is the published network. A compact
    one at r = 2 trains three times as fast on a CPU, where full-resolution layers wait for memory.
    Height and width must be multiples of 8 r.
    """

    @property
    def stem_stride(self) -> int:
        return math.isqrt(self.patch_embed.proj.in_channels // 3)

    def forward(self, image: Tensor) -> Tensor:
        folded = super().forward(F.pixel_unshuffle(image, self.stem_stride))
        return F.pixel_shuffle(folded, self.stem_stride)


def restormer_dimensions(state: dict[str, Tensor]) -> dict:
    """Restormer's constructor arguments, read from a state dict's names and shapes.

    The expansion factor is known only through int(dim * factor) at each width; the middle of the
    interval that explains all of them is taken. KeyError if `state` is no Restormer's.
    """

    def count(stage: str) -> int:
        return len({name.split(".")[1] for name in state if name.startswith(f"{stage}.")})

    levels = ("encoder_level1", "encoder_level2", "encoder_level3", "latent")
    low, high = 0.0, math.inf
    for level in levels:
        weight = state[f"{level}.0.ffn.project_out.weight"]
        width, hidden = weight.shape[:2]
        low, high = max(low, hidden / width), min(high, (hidden + 1) / width)
    return {
        "inp_channels": state["patch_embed.proj.weight"].shape[1],
        "out_channels": state["output.weight"].shape[0],
        "dim": state["patch_embed.proj.weight"].shape[0],
        "num_blocks": tuple(count(level) for level in levels),
        "num_refinement_blocks": count("refinement"),
        "heads": tuple(state[f"{level}.0.attn.temperature"].shape[0] for level in levels),
        "ffn_expansion_factor": (low + high) / 2,
        "bias": "output.bias" in state,
        "LayerNorm_type": "WithBias" if "latent.0.norm1.body.bias" in state else "BiasFree",
        "dual_pixel_task": "skip_conv.weight" in state,
    }
