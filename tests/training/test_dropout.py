"""Dropout by gaps: the same distribution as torch's own, and nothing else is touched."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mnist_lab.training.dropout import MAX_P, SparseDropout, draw_zeros


@pytest.mark.parametrize("p", [0.007, 0.1, 0.25])
def test_each_place_is_zero_with_probability_p_independently_of_the_others(p: float) -> None:
    torch.manual_seed(0)
    total, rounds = 500, 8000
    drawn = torch.zeros(rounds, total)
    for row in drawn:
        row[draw_zeros(total, p)] = 1

    spread = (p * (1 - p) / rounds) ** 0.5
    assert (drawn.mean(dim=0) - p).abs().max() < 5 * spread  # of each place, the first and the last included
    counts = drawn.sum(dim=1)
    assert counts.mean() == pytest.approx(total * p, abs=5 * (total * p * (1 - p) / rounds) ** 0.5)
    assert counts.var() == pytest.approx(total * p * (1 - p), rel=0.1)  # binomial: the draws are independent
    neighbours = (drawn[:, 1:] * drawn[:, :-1]).mean()
    assert neighbours == pytest.approx(p * p, rel=0.15)


def test_drawing_goes_on_where_the_first_gaps_do_not_reach_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    monkeypatch.setattr("mnist_lab.training.dropout.math.sqrt", lambda _: -100.0)  # far too few at once
    assert len(draw_zeros(100_000, 0.1)) == pytest.approx(10_000, rel=0.05)


@pytest.mark.parametrize("shape", [(16, 8, 12, 12), (64, 50)])
def test_output_and_gradient_are_those_of_one_mask_in_both_layouts(shape: tuple[int, ...]) -> None:
    values, upstream = torch.rand(shape).add_(1), torch.rand(shape)
    masks = []
    for memory_format in (torch.contiguous_format, torch.channels_last)[: len(shape) // 2]:
        images = values.clone(memory_format=memory_format).requires_grad_()
        torch.manual_seed(3)
        with SparseDropout():
            dropped = F.dropout(images, 0.1)
        dropped.backward(upstream)

        mask = (dropped != 0).float()
        assert dropped.is_contiguous(memory_format=memory_format)
        assert 0 < (1 - mask).mean() < 0.2
        torch.testing.assert_close(dropped, images * mask / 0.9)
        assert images.grad is not None
        torch.testing.assert_close(images.grad, upstream * mask / 0.9)
        masks.append(mask)
    assert torch.equal(masks[0], masks[-1])


def test_modules_and_functions_are_covered_and_draw_anew() -> None:
    images = torch.ones(4, 8, 10, 10)
    torch.manual_seed(4)
    with SparseDropout():
        dropped = [F.dropout(images, 0.2), nn.Dropout(0.2)(images), F.dropout(images, p=0.2, training=True)]
    torch.manual_seed(4)
    dropped.append(F.dropout(images, 0.2))  # torch's own, by other random numbers
    assert len(torch.stack(dropped).unique(dim=0)) == 4


@pytest.mark.parametrize(
    "drop",
    [
        lambda images: F.dropout(images, 0.5 + MAX_P),
        lambda images: F.dropout(images, 0.1, training=False),
        lambda images: F.dropout(images.clone(), 0.1, inplace=True),
    ],
)
def test_everything_else_is_as_it_was(drop) -> None:  # type: ignore[no-untyped-def]
    images = torch.rand(4, 8, 10, 10)
    torch.manual_seed(5)
    expected = drop(images)
    torch.manual_seed(5)
    with SparseDropout():
        assert torch.equal(drop(images), expected)
