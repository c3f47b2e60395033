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
from mnist_lab.training.loop import num_params

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


# ---- the true count


class Reused(nn.Module):
    """A layer that is called twice, a bare parameter, and a buffer called bias."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)
        self.fc = nn.Linear(784, 10)
        self.scale = nn.Parameter(torch.ones(10))
        self.norm = nn.Identity()
        self.norm.register_buffer("bias", torch.zeros(7))

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm(self.conv(self.conv(images)))
        return self.fc(x.flatten(1)) * self.scale


class Tied(nn.Module):
    """One layer with two parents."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Linear(784, 784)
        self.first, self.second = nn.Sequential(shared), nn.Sequential(shared, nn.Linear(784, 10))

    def forward(self, images: Tensor) -> Tensor:
        return self.second(self.first(images.flatten(1)))


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(784, 10)
        self.fc.bias.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(images.flatten(1))


@pytest.mark.parametrize(
    ("net", "total", "note"),
    [
        (
            Reused(),
            10 + 7850 + 10,
            "torchsummary's own count is 7,877 in all and 7,870 trainable: it counts conv.weight, conv.bias 2 times "
            "and counts norm.bias, not a parameter, and leaves out scale.",
        ),
        (Tied(), 784 * 785 + 7850, "it counts first.0.weight, first.0.bias 4 times."),
    ],
)
def test_the_totals_count_each_parameter_once_and_a_line_says_where_torchsummary_differs(
    net: nn.Module, total: int, note: str
) -> None:
    assert num_params(net) == total

    lines = summarize(net).splitlines()

    assert f"Total params: {total:,}" in lines
    assert f"Trainable params: {total:,}" in lines
    assert f"Params size (MB): {4 * total / 2**20:.2f}" in lines
    assert lines[-1].startswith("torchsummary's own count is ")
    assert lines[-1].endswith(note)
    assert fields_in("\n".join(lines))


def test_a_frozen_part_of_a_layer_is_not_trainable() -> None:
    lines = summarize(Frozen()).splitlines()

    assert {"Total params: 7,850", "Trainable params: 7,840", "Non-trainable params: 10"} <= set(lines)
    assert lines[-1].startswith("torchsummary's own count is 7,850 in all and 7,850 trainable: it takes each layer as")


# ---- what torchsummary can't draw


class Functional(nn.Module):
    """Has parameters but no layer: torchsummary stops at it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10, 784))

    def forward(self, images: Tensor) -> Tensor:
        return F.linear(images.flatten(1), self.weight)


class Recurrent(nn.Module):
    """Has a layer that returns tuples in a tuple."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(28, 12, batch_first=True)
        self.fc = nn.Linear(12, 10)

    def forward(self, images: Tensor) -> Tensor:
        return self.fc(self.rnn(images.squeeze(1))[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(28, 4, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(28, 2, 16, batch_first=True)
        self.fc = nn.Linear(28, 10)

    def forward(self, images: Tensor) -> Tensor:
        rows = images.squeeze(1)
        attended, _ = self.attention(rows, rows, rows)
        return self.fc(self.encoder(attended).mean(1))


class Branches(nn.Module):
    """Layers in a ModuleDict, one of which returns a dict."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(784, 10), nn.Linear(784, 10)

        def forward(self, x: Tensor) -> dict[str, object]:
            return {"a": self.a(x), "rest": [self.b(x), None]}

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"both": self.Both(), "unused": nn.Linear(2, 2)})

    def forward(self, images: Tensor) -> Tensor:
        both = self.parts["both"](images.flatten(1))
        return both["a"] + both["rest"][0]


@pytest.mark.parametrize(
    ("net", "rows"),
    [
        (Functional(), []),
        (
            Recurrent(),
            ["LSTM-1 ([2, 28, 12], ([1, 2, 12], [1, 2, 12])) 2,016", "Linear-2 [2, 10] 130"],
        ),
        (Attention(), ["MultiheadAttention-1 ([2, 28, 28], [2, 28, 28]) 3,248", "Linear-11 [2, 10] 290"]),
        (
            nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(784, 10))),
            ["ParametrizedLinear-3 [2, 10] 7,860"],
        ),
        (Branches(), ["Linear-1 [2, 10] 7,850", "Both-3 {a: [2, 10], rest: ([2, 10], None)} 0"]),
    ],
)
def test_a_network_that_torchsummary_cant_draw_has_a_table_of_its_layers(
    net: nn.Module, rows: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    random_state = torch.get_rng_state()

    lines = [" ".join(line.split()) for line in summarize(net).splitlines()]

    assert set(rows) <= set(lines)
    assert f"Total params: {num_params(net):,}" in lines
    assert lines[-1].startswith("No receptive fields: torchsummary can't draw this network (")
    in_rows = sum(
        int(found[1].replace(",", "")) for line in lines if (found := re.match(r"\w+-\d+ .* ([\d,]+)$", line))
    )
    outside = {Functional: 7840, Branches: 6}.get(type(net), 0)
    assert in_rows + outside == num_params(net)
    assert any("in none of these layers: weight (7,840)" in line for line in lines) == isinstance(net, Functional)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert not any(module._forward_hooks for module in net.modules())
    assert capsys.readouterr().out == ""


class Unfitting(nn.Module):
    """Fails, with an error of several lines."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(784, 10)

    def forward(self, images: Tensor) -> Tensor:
        raise RuntimeError("the first line\n  and a second")


def test_a_network_that_cannot_be_run_gives_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    net, random_state = Unfitting(), torch.get_rng_state()
    text = summarize(net)

    assert text.startswith("No model summary: torchsummary can't draw this network (RuntimeError: the first line and a")
    assert "\n" not in text
    assert torch.equal(torch.get_rng_state(), random_state)
    assert capsys.readouterr().out == ""
