"""The scattering transform of Bruna and Mallat (2013), by fast Fourier transforms."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from mvmr.representations.base import Representation, fixed
from mvmr.types import UserError

PI_OF_KYMATIO = 3.1415
"""kymatio normalises its Gaussians by 2 * 3.1415 * sigma^2, and so did the published runs: kept, to be equal."""
CPU_CHUNK, OTHER_CHUNK = 2**17, 2**24
"""Complex numbers that the widest layer holds at once: a core's cache full, or a share of an accelerator's memory."""


class Scattering(Representation):
    """Morlet scattering of order 0 to 2 per colour channel (Bruna and Mallat 2013, Eq. 4 and Section 2.2).

    [B, C, H, W] to [B, C * K * floor(H / 2^J) * floor(W / 2^J)], K = 1 + J L + L^2 J (J - 1) / 2 at order 2
    (81 at J = 2, L = 8). Equal to kymatio's ScatteringTorch2D, its order of channels and its borders included: images
    are padded by reflection to the multiple of 2^J that leaves at least 2^(J-1) on each side, and where H is no
    multiple of 2^J the grid's last, partial cell is dropped. Raises UserError for settings out of range, or if a
    side is less than 2^J.
    """

    def __init__(self, *, J: int = 2, L: int = 8, order: Literal[0, 1, 2] = 2):
        super().__init__()
        if J < 1 or L < 1 or order not in (0, 1, 2):
            raise UserError(f"Scattering needs J >= 1, L >= 1 and order 0, 1 or 2; got J={J}, L={L}, order={order}.")
        self.J, self.L, self.order = J, L, order

    @property
    def channels(self) -> int:
        """K, the number of scattering paths per colour channel."""
        first, second = self.J * self.L, self.L**2 * self.J * (self.J - 1) // 2
        return 1 + (first if self.order > 0 else 0) + (second if self.order > 1 else 0)

    def forward(self, images: Tensor, index: Tensor | None = None, epoch: int = 0) -> Tensor:
        return self.maps(images).flatten(1)

    @fixed
    def maps(self, images: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C, K, floor(H / 2^J), floor(W / 2^J)].

        Channels: order 0, then order 1 by (j1, angle1), then order 2 by (j1, angle1, j2, angle2).
        """
        batch, colours, height, width = images.shape
        if min(height, width) < 2**self.J:
            raise UserError(
                f"Scattering with J={self.J} needs images of at least {2**self.J} pixels a side, "
                f"not {height}x{width}: lower representations.scattering.J."
            )
        bank = filter_bank(height, width, self.J, self.L, images.device)
        planes = images.reshape(-1, height, width)  # [P, H, W]
        out = planes.new_empty(len(planes), self.channels, *bank.grid)  # [P, K, h, w]
        chunk = CPU_CHUNK * torch.get_num_threads() if images.device.type == "cpu" else OTHER_CHUNK
        size = max(1, chunk // (self.L * bank.area))
        for begin in range(0, len(planes), size):
            part = slice(begin, begin + size)
            self._scatter(planes[part, bank.rows[:, None], bank.columns], bank, out[part])
        return out.unflatten(0, (batch, colours))

    def _scatter(self, padded: Tensor, bank: FilterBank, out: Tensor) -> None:
        """Fill out [P, K, h, w] from padded planes [P, M, N]."""
        out[:, 0] = bank.low_pass(padded, 0)
        if self.order == 0:
            return
        J, L = self.J, self.L
        spectrum = torch.fft.fft2(padded)  # [P, M, N]
        at = 1 + J * L
        for j1 in range(J):
            first = bank.modulus(spectrum, 0, j1)  # [P, L, m, n]
            out[:, 1 + j1 * L : 1 + (j1 + 1) * L] = bank.low_pass(first, j1)
            wider = J - 1 - j1
            if self.order == 1 or wider == 0:
                continue
            block = out[:, at : at + L * wider * L].unflatten(1, (L, wider, L))  # [P, L, J-1-j1, L, h, w]
            at += L * wider * L
            first_spectrum = torch.fft.fft2(first)  # [P, L, m, n]
            for j2 in range(j1 + 1, J):
                block[:, :, j2 - j1 - 1] = bank.low_pass(bank.modulus(first_spectrum, j1, j2), j2)


@dataclass(frozen=True)
class FilterBank:
    """Filters for one image size on one device; level r is the grid subsampled by 2^r, of M/2^r by N/2^r points."""

    rows: Tensor
    """[M] int64: the row of the image that each padded row repeats."""
    columns: Tensor
    """[N] int64."""
    grid: tuple[int, int]
    """Size of a scattering map."""
    wavelets: dict[tuple[int, int], tuple[tuple[int, Tensor], ...]]
    """(level, j) to the wavelets in every block of frequencies that folds onto level j: (block, [L, m, n, 2])."""
    gaussians: tuple[tuple[Tensor, Tensor], ...]
    """Per level, the low-pass filter, subsampling to 2^J and removal of the border: [h, M/2^r] and [N/2^r, w]."""

    @property
    def area(self) -> int:
        return len(self.rows) * len(self.columns)

    def low_pass(self, x: Tensor, level: int) -> Tensor:
        """[..., M/2^r, N/2^r] to [..., h, w]. The Gaussian is separable, so two small products do it all."""
        down, across = self.gaussians[level]
        # A graphics card may run float32 products in TF32, with 10 bits of mantissa: the matrices are float64 there.
        return (down @ x.to(down.dtype) @ across).to(x.dtype)

    def modulus(self, spectrum: Tensor, level: int, j: int) -> Tensor:
        """|x * psi_j| at level j for all L angles, from the transform of x: [..., m, n] to [..., L, m', n']."""
        k = 2 ** (j - level)
        m, n = spectrum.shape[-2] // k, spectrum.shape[-1] // k
        # Subsampling in space is folding in frequency: the k^2 blocks are weighted by the filter and added.
        blocks = torch.view_as_real(spectrum).unflatten(-2, (k, n)).unflatten(-4, (k, m))  # [..., k, m, k, n, 2]
        blocks = blocks.movedim(-3, -4).flatten(-5, -4).contiguous()  # [..., k k, m, n, 2]
        (first, filters), *others = self.wavelets[level, j]
        folded = blocks[..., first, None, :, :, :] * filters  # [..., L, m, n, 2]
        for block, filters in others:
            folded.addcmul_(blocks[..., block, None, :, :, :], filters)
        wave = torch.fft.ifft2(torch.view_as_complex(folded), norm="forward")  # scaled in the filters
        parts = torch.view_as_real(wave).square_()
        return (parts[..., 0] + parts[..., 1]).sqrt_()


@lru_cache(maxsize=8)
def filter_bank(height: int, width: int, J: int, L: int, device: torch.device) -> FilterBank:
    """Filters for images of height x width. Low-pass: sigma 0.8 * 2^(J-1). Wavelets: see `morlet`."""
    rows, columns = reflected(height, 2**J), reflected(width, 2**J)
    m, n = len(rows), len(columns)
    wavelets: dict[tuple[int, int], tuple[tuple[int, Tensor], ...]] = {}
    for j in range(J):
        # kymatio counts the angles down from the one just below a half turn over two.
        angles = [(int(L / 2 - 1) - turn) * math.pi / L for turn in range(L)]
        filters = np.stack([morlet(m, n, j, angle, 4 / L) for angle in angles])  # [L, M, N]
        for level in range(max(1, j)):
            wavelets[level, j] = folding_blocks(low_frequencies(filters, level, 1, 2), 2 ** (j - level), device)
    sigma = 0.8 * 2 ** (J - 1)
    gaussians = []
    for level in range(J):
        down, across = (low_pass_matrix(size, sigma, level, J) for size in (m, n))
        kind = torch.float64 if device.type == "cuda" else torch.float32
        gaussians.append(
            (torch.tensor(down, dtype=kind, device=device), torch.tensor(across.T.copy(), dtype=kind, device=device))
        )
    return FilterBank(
        rows=torch.tensor(rows, device=device),
        columns=torch.tensor(columns, device=device),
        grid=(height >> J, width >> J),
        wavelets=wavelets,
        gaussians=tuple(gaussians),
    )


def reflected(size: int, cell: int) -> np.ndarray:
    """Positions in 0 ... size - 1 read by the padded axis, which has size // cell + 2 cells; edges are not repeated."""
    length = (size // cell + 2) * cell
    position = np.abs(np.arange(length) - (length - size) // 2)
    period = max(1, 2 * size - 2)
    return np.minimum(position % period, -position % period)


def morlet(m: int, n: int, j: int, angle: float, slant: float) -> np.ndarray:
    """Fourier transform [m, n] of psi(u) = g(u) (exp(i xi u1) - K): periodised, with K such that its mean is zero.

    g is a Gaussian of width sigma = 0.8 * 2^j along u1 (at `angle` to the rows' axis) and sigma / slant across;
    xi = 3 pi / (4 * 2^j).
    """
    sigma, xi, periods = 0.8 * 2**j, 0.75 * math.pi / 2**j, 5
    x = np.arange(-(periods // 2) * m, (periods // 2 + 1) * m)[:, None]  # [5 m, 1]
    y = np.arange(-(periods // 2) * n, (periods // 2 + 1) * n)  # [5 n]
    along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    envelope = np.exp(-(along**2 + (slant * across) ** 2) / (2 * sigma**2)) * slant / (2 * PI_OF_KYMATIO * sigma**2)
    wave = envelope * (np.exp(1j * xi * math.cos(angle) * x) * np.exp(1j * xi * math.sin(angle) * y))
    wave, envelope = (part.reshape(periods, m, periods, n).sum((0, 2)) for part in (wave, envelope))
    return np.fft.fft2(wave - wave.sum() / envelope.sum() * envelope).real


def low_frequencies(response: np.ndarray, level: int, *axes: int) -> np.ndarray:
    """The frequencies that the grid of this level holds, along each of the axes: M to M / 2^level."""
    for axis in axes:
        size = response.shape[axis]
        kept = size >> level
        response = np.delete(response, np.s_[kept // 2 : size - kept // 2], axis)
    return response


def folding_blocks(filters: np.ndarray, k: int, device: torch.device) -> tuple[tuple[int, Tensor], ...]:
    """[L, M, N] to its k^2 blocks [L, M / k, N / k, 2] (repeated for real and imaginary part), without empty ones.

    Scaled for a mean over the blocks and an inverse transform without a factor: 1 / (M N) in all.
    """
    L, m, n = filters.shape
    blocks = filters.reshape(L, k, m // k, k, n // k).transpose(1, 3, 0, 2, 4).reshape(k * k, L, m // k, n // k)
    floor = 1e-8 * np.abs(filters).max()
    kept = ((number, block / (m * n)) for number, block in enumerate(blocks) if np.abs(block).max() > floor)
    return tuple(
        (number, torch.tensor(np.stack((block, block), -1), dtype=torch.float32, device=device))
        for number, block in kept
    )


def low_pass_matrix(size: int, sigma: float, level: int, J: int) -> np.ndarray:
    """Gaussian blur, then every 2^(J - level)th point without the first and the last: [size/2^J - 2, size/2^level]."""
    x = np.arange(-2 * size, 3 * size)
    gaussian = np.exp(-(x**2) / (2 * sigma**2)).reshape(5, size).sum(0) / math.sqrt(2 * PI_OF_KYMATIO * sigma**2)
    response = low_frequencies(np.fft.fft(gaussian).real, level, 0)  # [size / 2^level]
    kernel = np.fft.ifft(response).real
    step, length = 2 ** (J - level), len(kernel)
    return np.stack([np.roll(kernel, row) for row in range(step, length - step, step)])
