"""The model summary: torchsummary's rows, each with its measured receptive field, and nothing disturbed."""

import contextlib
import io
import re
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
import torchsummary
from torch import Tensor, nn

from mnist_lab.running.summary import receptive_fields, summarize

ROW = re.compile(r" *\w+-\d+ .*\[")


def fields_in(text: str) -> list[int]:
    rows = [line for line in text.splitlines() if ROW.match(line)]
    sizes = [re.fullmatch(r".*\] +[\d,]+ +(\d+)x(\d+)", row) for row in rows]
    assert rows
    assert all(size is not None and size[1] == size[2] for size in sizes), text
    return [int(size[1]) for size in sizes if size is not None]


STEP_4 = [3] * 4 + [5] * 4 + [7] * 4 + [8] + [12] * 4 + [16] * 8 + [20] * 8 + [28] * 2
FOUR_CONV = [3, 5, 10, 14, 28, 28]  # its pools are functional: they have no row, and widen the rows after them


@pytest.mark.parametrize(("stem", "fields"), [("step4_augment_steplr", STEP_4), ("four_conv", FOUR_CONV)])
def test_each_layer_has_its_receptive_field(
    stem: str, fields: list[int], load_script: Callable[[str], ModuleType]
) -> None:
    net = load_script(stem).Net()

    assert fields_in(summarize(net)) == fields
    assert receptive_fields(net) == fields


def test_the_rest_is_torchsummarys_own_text(load_script: Callable[[str], ModuleType]) -> None:
    net = load_script("step1_baseline").Net()
    own = io.StringIO()
    with contextlib.redirect_stdout(own):
        torchsummary.summary(net, (1, 28, 28), device="cpu")

    lines, own_lines = summarize(net).splitlines(), own.getvalue().splitlines()

    assert len(lines) == len(own_lines)
    for line, own_line in zip(lines, own_lines, strict=True):
        assert line.startswith(own_line.rstrip())
    assert lines[1].endswith("Receptive field")
    assert "Total params: 10,970" in lines


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.inner = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 10, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = self.first(images)
        x = x + self.inner(x)
        return self.last(F.relu(x)).amax((2, 3))


class ShortCut(Residual):
    def forward(self, images: Tensor) -> Tensor:
        return self.last(self.first(images)).amax((2, 3)) + self.inner(self.first(images)).mean()


@pytest.mark.parametrize(
    ("net", "fields"),
    [
        (Residual(), [3, 5, 7]),
        (ShortCut(), [3, 5, 3, 5]),  # rows in the order of the calls, a layer that is called twice has two
        (nn.Sequential(nn.Conv2d(1, 2, 3, dilation=2), nn.Conv2d(2, 2, 3)), [5, 7]),
        (nn.Sequential(nn.Conv2d(1, 2, 3, dilation=3), nn.Conv2d(2, 2, 3, dilation=2)), [7, 11]),
        (nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1)), [3, 7, 7]),
        (nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(1, 2, 2)), [2, 4, 8]),
        (nn.Sequential(nn.Conv2d(1, 2, 5, padding=2), nn.BatchNorm2d(2), nn.Sigmoid()), [5, 5, 5]),
        (nn.Sequential(nn.Conv2d(1, 2, 27, padding=13), nn.Conv2d(2, 2, 27, padding=13)), [27, 28]),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(1352, 10)), [3, 28, 28]),
        (nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(2)), [3, 28, 28]),
    ],
)
def test_fields_are_right_for_other_shapes_of_network(net: nn.Module, fields: list[int]) -> None:
    for part in net.modules():  # a weight of 0 sees nothing but counts: the field is the architecture's
        if isinstance(part, nn.Conv2d):
            nn.init.zeros_(part.weight)

    assert receptive_fields(net) == fields


class AlwaysDropout(nn.Module):
    """Draws random numbers in evaluation mode too: `F.dropout` without `self.training`, a common slip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 10, 3)
        self.norm = nn.BatchNorm2d(10)

    def forward(self, images: Tensor) -> Tensor:
        return F.dropout(self.norm(self.conv(images))).mean((2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_network_and_random_state_are_left_as_they_were(training: bool) -> None:
    torch.manual_seed(0)
    net = AlwaysDropout().train(training).to(memory_format=torch.channels_last)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state()

    assert fields_in(summarize(net)) == [3, 3]
    assert receptive_fields(net) == [3, 3]

    assert torch.equal(torch.get_rng_state(), random_state)
    assert net.training is training
    assert net.norm.training is training
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(module._forward_hooks for module in net.modules())
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name


def test_nothing_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    summarize(Residual())

    assert capsys.readouterr().out == ""


class Functional(nn.Module):
    """Has parameters but no layer: torchsummary stops at it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10, 784))

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(images.flatten(1), self.weight)


class Recurrent(nn.Module):
    """Has a layer that returns a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(28, 10, batch_first=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.rnn(images.squeeze(1))[0][:, -1]


class Unfitting(nn.Module):
    """Fails, with an error of several lines."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("the first line\n  and a second")


@pytest.mark.parametrize("net", [Functional(), Recurrent(), Unfitting()])
def test_a_network_that_cannot_be_drawn_gives_one_line(net: nn.Module, capsys: pytest.CaptureFixture[str]) -> None:
    random_state = torch.get_rng_state()
    text = summarize(net)

    assert text.startswith("No model summary: torchsummary can't draw this network (")
    assert "\n" not in text
    assert torch.equal(torch.get_rng_state(), random_state)
    assert capsys.readouterr().out == ""
