"""Products with packed weights: right, and the same bits in any company."""

from __future__ import annotations

import ctypes
import math
import mmap
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels.strange_tensors import NOT_PLAIN
from kernels.strange_tensors import made as made_of
from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache_kernels.cpu import library as library_module
from prefixcache_kernels.cpu.library import library
from prefixcache_kernels.cpu.linear import GROUP, Matrix, in_panels, pack, quantize

pytestmark = pytest.mark.skipif(library() is None, reason="no C compiler")

DTYPES = (torch.float32, torch.bfloat16)
SIZES = ((16, 2), (17, 34), (200, 64), (1, 6), (97, 130))


def made(outputs: int, inputs: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A weight, and 40 rows."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=draw).to(dtype)
    return weight, torch.randn(40, inputs, generator=draw).to(dtype)


def close(got: Tensor, want: Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, atol=2e-4, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES)
def test_products_are_those_of_exact_arithmetic(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    weight, x = made(*sizes, dtype)
    want = x.double() @ weight.double().T
    close(Matrix(pack(weight), sizes[1], sizes[0]).multiply(x), want)
    bias = torch.randn(sizes[0])
    matrix = Matrix(pack(weight), sizes[1], sizes[0], bias=in_panels(bias).flatten())
    close(matrix.multiply(x), want + bias)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8])
def test_a_row_has_the_same_bits_alone_and_in_any_company(dtype: torch.dtype, threads: int) -> None:
    eight_bits = dtype == torch.int8
    order = quantize if eight_bits else pack
    weight, x = made(200, 66, torch.bfloat16 if eight_bits else dtype)
    norm = torch.rand(66)
    for matrix in (
        Matrix(order(weight), 66, 200),
        Matrix(order(weight, gated=True), 66, 100, True),
    ):
        alone = torch.cat([matrix.multiply(row[None], norm=norm, eps=1e-5) for row in x])
        torch.set_num_threads(threads)
        try:
            for num in (*range(1, 20), 40):
                for first in (0, 40 - num):
                    some = x[first : first + num]
                    got = matrix.multiply(some, norm=norm, eps=1e-5)
                    assert torch.equal(got, alone[first : first + num])
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("sizes", [*SIZES, (33, 32), (16, 64), (96, 98), (272, 576)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_has_the_same_bits_in_blocks_of_any_number(
    units: str, sizes: tuple[int, int], dtype: torch.dtype, threads: int
) -> None:
    """Blocks of 16 rows, two of them at a time; panels by four, by two and alone."""
    weight, _ = made(*sizes, torch.bfloat16)
    order = pack if dtype == torch.bfloat16 else quantize
    x = torch.randn(70, sizes[1])
    matrices = [Matrix(order(weight), sizes[1], sizes[0])]
    if sizes[0] % 2 == 0:
        matrices.append(Matrix(order(weight, gated=True), sizes[1], sizes[0] // 2, gated=True))
    for matrix in matrices:
        alone = torch.cat([matrix.multiply(row[None]) for row in x])
        torch.set_num_threads(threads)
        try:
            for num in range(1, 71):
                first = (70 - num) // 2
                got = matrix.multiply(x[first : first + num])
                assert torch.equal(got, alone[first : first + num])
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("sizes", [(16, 64), (33, 66), (96, 98), (272, 576)])
def test_of_eight_bits_matrices_and_vectors_give_the_same_bits(
    sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums of whole numbers are exact, so many rows go where they are fast."""
    loaded = library()
    if loaded is None or not loaded.matrices:
        pytest.skip("no AMX, or not compiled in")
    weight, _ = made(*sizes, torch.bfloat16)
    matrix = Matrix(quantize(weight), sizes[1], sizes[0])
    x = torch.randn(70, sizes[1]) * torch.logspace(-30, 30, 70)[:, None]
    x[20], x[30], x[40, 1], x[50, 0] = 0.0, 1.0, float("nan"), -float("inf")
    with_matrices = [matrix.multiply(x[:num]) for num in range(1, 71)]
    monkeypatch.setattr(ctypes.c_int64.in_dll(loaded.handle, "prefixcache_amx"), "value", 0)
    for got in with_matrices:
        want = matrix.multiply(x[: len(got)])
        assert torch.equal(got.view(torch.int32), want.view(torch.int32))


@pytest.mark.parametrize("sizes", SIZES)
def test_all_units_round_rows_and_sum_products_as_bfloat16_does(
    units: str, sizes: tuple[int, int]
) -> None:
    weight, _ = made(*sizes, torch.bfloat16)
    x = torch.randn(40, sizes[1])
    x[:, 0] = 1 + 2**-8  # between two numbers of bfloat16: to the even one
    x[:, 1] = 1 + 3 * 2**-8
    want = x.bfloat16().double() @ weight.double().T
    close(Matrix(pack(weight), sizes[1], sizes[0]).multiply(x), want)


def test_weights_end_with_their_memory(units: str) -> None:
    """Nothing is read behind the last weights, and nothing from the next panel: it may be odd."""
    weight = torch.randn(32, 34).bfloat16()
    weight[16:] = float("nan")
    got = Matrix(pack(weight), 34, 32).multiply(torch.randn(20, 34))
    assert bool(got[:, :16].isfinite().all())
    assert not bool(got[:, 16:].isfinite().any())
    page = mmap.PAGESIZE
    weight = torch.randn(16, 34).bfloat16()
    packed = pack(weight)
    size = packed.numel() * 2
    memory = mmap.mmap(-1, -(-size // page) * page + page)
    _forbid(memory, len(memory) - page, page)
    last = torch.frombuffer(
        memory, dtype=torch.bfloat16, offset=len(memory) - page - size, count=packed.numel()
    )
    last.copy_(packed)
    x = torch.randn(3, 34)
    want = Matrix(packed, 34, 16).multiply(x)
    assert torch.equal(Matrix(last, 34, 16).multiply(x), want)


def _forbid(memory: mmap.mmap, offset: int, size: int) -> None:
    """Let nobody read a part of it: to read it is a fault."""
    at = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + offset
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.mprotect(ctypes.c_void_p(at), ctypes.c_size_t(size), 0) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [8, 16, 50])
def test_what_stands_before_and_behind_a_product(dtype: torch.dtype, width: int) -> None:
    weight, x = made(2 * width, 64, dtype)
    norm = torch.rand(64) + 0.5
    rows = x.double() / (x.double().square().mean(1, keepdim=True) + 1e-5).sqrt() * norm
    gate, up = (rows.to(dtype).double() @ weight.double().T).chunk(2, 1)
    want = torch.nn.functional.silu(gate) * up
    matrix = Matrix(pack(weight, gated=True), 64, width, gated=True)
    got = matrix.multiply(x.float(), norm=norm, eps=1e-5)
    assert float((got - want).norm() / want.norm()) < (1e-6 if dtype == torch.float32 else 2e-3)
    matrix = Matrix(quantize(weight, gated=True), 64, width, gated=True)
    gate, up = (rows @ matrix.unpacked().double().T).chunk(2, 1)
    want = torch.nn.functional.silu(gate) * up
    got = matrix.multiply(x.float(), norm=norm, eps=1e-5)
    assert float((got - want).norm() / want.norm()) < 2e-4


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gated", [False, True])
def test_packing_loses_nothing(dtype: torch.dtype, gated: bool) -> None:
    weight, _ = made(54, 10, dtype)
    matrix = Matrix(pack(weight, gated=gated), 10, 27 if gated else 54, gated)
    assert torch.equal(matrix.unpacked(), weight)


def test_rows_may_be_parts_of_longer_ones_of_any_type() -> None:
    weight, _ = made(32, 16, torch.float32)
    matrix = Matrix(pack(weight), 16, 32)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        wide = torch.randn(5, 40).to(dtype)
        part = wide[::2, 7:23]
        close(matrix.multiply(part), part.double() @ weight.double().T)
    assert matrix.multiply(torch.empty(0, 16)).shape == (0, 32)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_of_eight_bits_no_number_is_further_away_than_half_a_step(
    sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    weight, x = made(*sizes, dtype)
    weight[1:2] = 0
    matrix = Matrix(quantize(weight), sizes[1], sizes[0])
    got = matrix.unpacked()
    parts = torch.nn.functional.pad(weight.float(), (0, -sizes[1] % GROUP)).split(GROUP, 1)
    steps = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in parts], 1)
    most = steps[:, : sizes[1]] * (1 + 2**-7) / 127
    assert bool(((got - weight.float()).abs() <= 0.5001 * most).all())
    want = x.double() @ got.double().T
    product = matrix.multiply(x)
    assert float((product - want).norm() / want.norm()) < 1e-4
    # Rows are rounded to 16 bits as often up as down.
    assert abs(float((product * want).sum() / want.square().sum()) - 1) < 1e-5
    bias = torch.randn(sizes[0])
    matrix = Matrix(quantize(weight), sizes[1], sizes[0], bias=in_panels(bias).flatten())
    want += bias
    assert float((matrix.multiply(x) - want).norm() / want.norm()) < 1e-4


def test_of_eight_bits_the_largest_numbers_do_not_overflow() -> None:
    signs = torch.where(torch.arange(GROUP * 3) % 2 == 0, 1.0, -1.0)
    weight = (signs * 3e20).repeat(16, 1)
    matrix = Matrix(quantize(weight), GROUP * 3, 16)
    want = 3 * GROUP * matrix.unpacked()[0, 0].double()
    for x in (signs, signs * 1e-30, -signs * 1e7):
        got = matrix.multiply(x[None])[0].double() / x[0].double()
        assert bool(((got / want - 1).abs() < 1e-4).all())
    least = matrix.multiply(signs[None] * 1e-38)
    assert bool(least.isfinite().all())
    codes = torch.full_like(matrix.data, -128)  # not of `quantize`; of a file that was forged
    assert Matrix(codes, GROUP * 3, 16).multiply(signs[None]).shape == (1, 16)


def test_weights_without_eight_bits_are_refused() -> None:
    for number in (float("inf"), float("nan")):
        weight = torch.zeros(16, 64)
        weight[3, 5] = number
        with pytest.raises(Unsupported, match="not finite"):
            quantize(weight)
    for weight in (torch.zeros(4, 3), torch.zeros(4, 4, dtype=torch.int8), torch.zeros(4)):
        with pytest.raises(Unsupported, match="not packed"):
            quantize(weight)
    right = quantize(torch.ones(16, 66))
    assert Matrix(right, 66, 16).multiply(torch.ones(1, 66)).shape == (1, 16)
    for data, inputs, columns in ((right[:-1], 66, 16), (right, 64, 16), (right, 66, 17)):
        with pytest.raises(InvalidRequest, match="of eight bits"):
            Matrix(data, inputs, columns)


def test_no_product_looks_for_the_library_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """To hash its sources takes longer than a product."""
    matrix = Matrix(pack(torch.ones(16, 2)), 2, 16)

    def looked(*_: object) -> str:
        raise AssertionError

    monkeypatch.setattr(library_module, "_fingerprint", looked)
    assert matrix.multiply(torch.ones(1, 2)).tolist() == [[2.0] * 16]


def test_what_is_not_a_number_stays_in_its_row() -> None:
    weight, clean = made(48, 32, torch.float32)
    others = [row for row in range(40) if row != 3]
    for data in (pack(weight), quantize(weight)):
        matrix = Matrix(data, 32, 48)
        want = matrix.multiply(clean)
        for number in (float("nan"), float("inf"), -float("inf")):
            x = clean.clone()
            x[3, 5] = number
            got = matrix.multiply(x)
            assert not got[3].isfinite().any()
            assert torch.equal(got[others], want[others])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inputs": 0}, "inputs"),
        ({"inputs": 33}, "inputs"),
        ({"columns": 0}, "columns"),
        ({"columns": 64}, "columns"),
        ({"columns": 17.0}, "columns"),
        ({"gated": True}, "columns"),
        ({"gated": 1}, "gated"),
        ({"data": torch.zeros(48, 32)}, "one row"),
        ({"data": torch.zeros(48 * 32, dtype=torch.float64)}, "one row"),
        ({"data": torch.zeros(2 * 48 * 32)[::2]}, "even"),
        ({"data": torch.zeros(48 * 32, device="meta")}, "data"),
        ({"data": [0.0] * 48 * 32}, "data"),
        ({"bias": torch.zeros(47)}, "bias"),
        ({"bias": torch.zeros(48, dtype=torch.float64)}, "bias"),
    ],
)
def test_weights_that_do_not_fit_are_refused(change: dict[str, Any], message: str) -> None:
    right: dict[str, Any] = {"data": torch.zeros(48 * 32), "inputs": 32, "columns": 48}
    Matrix(**right)
    with pytest.raises(InvalidRequest, match=message):
        Matrix(**(right | change))


@pytest.mark.parametrize(
    "x",
    [
        torch.zeros(2, 31),
        torch.zeros(32),
        torch.zeros(2, 32, dtype=torch.float64),
        torch.zeros(2, 32, dtype=torch.int64),
        torch.zeros(32, 2).T,
        torch.zeros(1, 32).expand(2, 32),
        torch.zeros(2, 32, device="meta"),
        torch.zeros(2, 32).to_sparse(),
    ],
)
def test_rows_that_do_not_fit_are_refused(x: Tensor) -> None:
    matrix = Matrix(torch.zeros(48 * 32), 32, 48)
    with pytest.raises(InvalidRequest, match="x "):
        matrix.multiply(x)
    with pytest.raises(InvalidRequest, match="norm"):
        matrix.multiply(torch.zeros(2, 32), norm=torch.zeros(31))


def test_what_cannot_be_packed_says_so() -> None:
    for weight in (torch.zeros(4, 3), torch.zeros(4, 4, dtype=torch.float16), torch.zeros(4)):
        with pytest.raises(Unsupported, match="not packed"):
            pack(weight)


@pytest.mark.parametrize("way", [pack, quantize])
def test_only_plain_weights_of_two_halves_are_packed_as_gated(way: Any) -> None:
    weight = torch.randn(48, 32)
    for kind in NOT_PLAIN:
        if (strange := made_of(kind, weight)) is not None:
            with pytest.raises((InvalidRequest, Unsupported), match="weight"):
                way(strange)
    with pytest.raises(InvalidRequest, match="two of the same size"):
        way(weight[:47], gated=True)
    with pytest.raises(InvalidRequest, match="gated is"):
        way(weight, gated="no")
    for empty in (weight[:0], weight[:, :0]):
        with pytest.raises(Unsupported, match="not packed"):
            way(empty)
    scattered = torch.stack([weight, weight], 2)[..., 0]
    assert torch.equal(way(scattered, gated=True), way(weight, gated=True))


@pytest.mark.parametrize("eps", [-1e-9, math.nan, math.inf, 10**400, True, "0", None, [0.0]])
def test_what_is_added_to_a_mean_square_is_a_number_from_nought(eps: Any) -> None:
    matrix = Matrix(torch.zeros(48 * 32), 32, 48)
    with pytest.raises(InvalidRequest, match="eps is"):
        matrix.multiply(torch.zeros(2, 32), norm=torch.ones(32), eps=eps)


def test_weights_that_let_go_of_their_memory_are_refused_where_they_are_used() -> None:
    matrix = Matrix(torch.zeros(48 * 32), 32, 48)
    matrix.data.untyped_storage().resize_(0)
    with pytest.raises(InvalidRequest, match="data"):
        matrix.multiply(torch.zeros(2, 32))
