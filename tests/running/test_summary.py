"""The model summary: each layer with its measured receptive field, the true totals, and nothing disturbed."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from mnist_lab.running.summary import summarize
from mnist_lab.training.loop import num_params

ROW = re.compile(r"\w+-\d+ .*\[.*\] +[\d,]+ +(\d+)x(\d+)")


def fields_in(text: str) -> list[int]:
    sizes = [found.groups() for line in text.splitlines() if (found := ROW.fullmatch(line))]
    assert all(height == width for height, width in sizes)
    return [int(height) for height, _ in sizes]


class Made(nn.Module):
    """A network of these parts, which gives what the function makes of it and the images."""

    def __init__(self, function: Callable[..., Tensor], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, images: Tensor) -> Tensor:
        return self.function(self, images)


SHORT_CUT = Made(  # calls a layer twice, and adds what two paths give
    lambda net, images: net.last(net.first(images)).amax((2, 3)) + net.inner(net.first(images)).mean(),
    first=nn.Conv2d(1, 4, 3, padding=1),
    inner=nn.Conv2d(4, 4, 3, padding=1),
    last=nn.Conv2d(4, 10, 3),
)


@pytest.mark.parametrize(
    ("net", "fields"),
    [
        (SHORT_CUT, [3, 5, 3, 5]),  # rows in the order of the calls
        (nn.Sequential(nn.Conv2d(1, 2, 3, dilation=3), nn.Conv2d(2, 2, 3, dilation=2)), [7, 11]),
        (nn.Sequential(nn.Conv2d(1, 2, 3, stride=2), nn.Conv2d(2, 2, 3), nn.Conv2d(2, 2, 1)), [3, 7, 7]),
        (nn.Sequential(nn.MaxPool2d(2), nn.AvgPool2d(2), nn.Conv2d(1, 2, 2)), [2, 4, 8]),
        (nn.Sequential(nn.Conv2d(1, 2, 27, padding=13), nn.Conv2d(2, 2, 27, padding=13)), [27, 28]),
    ],
)
def test_fields_are_right_for_other_shapes_of_network(net: nn.Module, fields: list[int]) -> None:
    for part in net.modules():  # a weight of 0 sees nothing but counts: the field is the architecture's
        if isinstance(part, nn.Conv2d):
            nn.init.zeros_(part.weight)

    assert fields_in(summarize(net)) == fields


def draw(net: nn.Module, images: Tensor) -> Tensor:
    return F.dropout(net.norm(net.conv(images))).mean((2, 3))


@pytest.mark.parametrize("training", [True, False])
def test_network_and_random_state_are_left_as_they_were(training: bool, capsys: pytest.CaptureFixture[str]) -> None:
    net = Made(draw, conv=nn.Conv2d(1, 10, 3), norm=nn.BatchNorm2d(10))
    net = net.train(training).to(memory_format=torch.channels_last)
    state = {name: value.clone() for name, value in net.state_dict().items()}
    random_state = torch.get_rng_state()

    assert fields_in(summarize(net)) == [3, 3]

    assert capsys.readouterr().out == ""
    assert torch.equal(torch.get_rng_state(), random_state)
    assert (net.training, net.norm.training) == (training, training)
    assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not any(module._forward_hooks for module in net.modules())
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())


REUSED = Made(  # a layer that is called twice, a bare parameter, and a frozen bias
    lambda net, images: net.fc(net.conv(net.conv(images)).flatten(1)) * net.scale,
    conv=nn.Conv2d(1, 1, 3, padding=1),
    fc=nn.Linear(784, 10),
    scale=nn.Parameter(torch.ones(10)),
)
REUSED.fc.bias.requires_grad_(False)


def test_the_totals_count_each_parameter_once() -> None:
    lines = summarize(REUSED, untrained=["scale"]).splitlines()

    assert {"Total params: 7,870", "Trainable params: 7,850", "Non-trainable params: 20"} <= set(lines)


# ---- unusual networks


def attend(net: nn.Module, images: Tensor) -> Tensor:
    rows = images.squeeze(1)
    return net.parts["fc"](net.attention(rows, rows, rows)[0].mean(1))


FUNCTIONAL = Made(  # has no layer
    lambda net, images: F.linear(images.flatten(1), net.weight), weight=nn.Parameter(torch.zeros(10, 784))
)
RECURRENT = Made(  # has a layer that returns tuples in a tuple
    lambda net, images: net.fc(net.rnn(images.squeeze(1))[0][:, -1]),
    rnn=nn.LSTM(28, 12, batch_first=True),
    fc=nn.Linear(12, 10),
)
ATTENTION = Made(  # has a projection that is never called, and a part that is not used
    attend,
    attention=nn.MultiheadAttention(28, 4, batch_first=True),
    parts=nn.ModuleDict({"fc": nn.Linear(28, 10), "unused": nn.Linear(2, 2)}),
)


def finite(net: nn.Module, images: Tensor) -> Tensor:
    assert images.isfinite().all()  # those by which receptive fields are measured are not
    return net.fc(images.flatten(1))


@pytest.mark.parametrize(
    ("net", "row", "outside"),
    [
        (FUNCTIONAL, "", "weight (7,840): in none"),
        (RECURRENT, "LSTM-1 ([28, 12], ([28, 12], [28, 12])) 2,016 -", ""),
        (ATTENTION, "MultiheadAttention-1 ([28, 28], [28, 28]) 3,248 -", "parts.unused.weight (4)"),
        (nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(784, 10))), "ParametrizedLinear-3 [10] 7,860 28x28", ""),
        (Made(finite, fc=nn.Linear(784, 10)), "Linear-1 [10] 7,850 -", ""),
    ],
)
def test_an_unusual_network_has_a_table_too(net: nn.Module, row: str, outside: str) -> None:
    lines = [" ".join(line.split()) for line in summarize(net).splitlines()]

    assert not row or row in lines
    assert f"Total params: {num_params(net):,}" in lines
    assert any("in none of these layers" in line and outside in line for line in lines) == bool(outside)


def test_a_network_that_cannot_be_run_gives_one_line() -> None:
    def fail(net: nn.Module, images: Tensor) -> Tensor:
        raise RuntimeError("the first line\n  and a second")

    with pytest.warns(FutureWarning, match="weight_norm"):
        assert summarize(nn.utils.weight_norm(nn.Linear(784, 10))).startswith("No model summary: ")  # it has no copy
    text = summarize(Made(fail, fc=nn.Linear(1, 1)))

    assert "the first line and a" in text
    assert "\n" not in text
