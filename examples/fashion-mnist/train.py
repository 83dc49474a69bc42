"""Trains the example's network and writes model.onnx.

    python -m venv /tmp/train && /tmp/train/bin/pip install torch==2.13.0 onnx numpy
    /tmp/train/bin/python train.py [--source FOLDER] [--output model.onnx]

A residual network of six convolutions, 133,000 weights, trained on the 60,000 training images with
mirroring; about two minutes on one core. One thread and a fixed seed: the same versions on the same kind
of processor give the same weights; another processor may end some hundredths of a point away. The
test images are looked at once, after the last epoch, so nothing is chosen by them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from data import CLASSES, read_split, source_folder
from torch import Tensor, nn
from torch.nn import functional

EPOCHS = 6
BATCH = 128
PEAK_LEARNING_RATE = 0.2
OPSET = 17


class Residual(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)): He et al. 2015, arXiv:1512.03385, figure 2."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.first = conv_bn(channels_in, channels_out, 3, stride)
        self.second = conv_bn(channels_out, channels_out, 3, 1)
        same = channels_in == channels_out and stride == 1
        self.shortcut = nn.Identity() if same else conv_bn(channels_in, channels_out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.second(functional.relu(self.first(x))) + self.shortcut(x))


def conv_bn(channels_in: int, channels_out: int, size: int, stride: int) -> nn.Sequential:
    """A convolution without bias, `size` square, padded to keep the picture's size, and its normalisation."""
    convolution = nn.Conv2d(channels_in, channels_out, size, stride, padding=size // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out))


def make_network() -> nn.Module:
    """float32 [N, 1, 28, 28] in 0 to 1 -> logits [N, 10]."""
    return nn.Sequential(
        conv_bn(1, 32, 3, 2),
        nn.ReLU(),
        Residual(32, 64, 2),
        Residual(64, 64, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, CLASSES),
    )


def train(network: nn.Module, x: Tensor, labels: Tensor) -> None:
    """Nesterov SGD, a one-cycle schedule (Smith and Topin 2017, arXiv:1708.07120), pictures mirrored at random."""
    optimiser = torch.optim.SGD(network.parameters(), PEAK_LEARNING_RATE, 0.9, weight_decay=5e-4, nesterov=True)
    steps = EPOCHS * -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, PEAK_LEARNING_RATE, total_steps=steps)
    network.train()
    for epoch in range(EPOCHS):
        start, losses = time.perf_counter(), 0.0
        for index in torch.randperm(len(x)).split(BATCH):
            mirrored = torch.rand(len(index), 1, 1, 1) < 0.5
            batch = torch.where(mirrored, x[index].flip(3), x[index])
            loss = functional.cross_entropy(network(batch), labels[index])
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            losses += loss.item() * len(index)
        print(f"epoch {epoch + 1}: loss {losses / len(x):.4f}, {time.perf_counter() - start:.0f} s", flush=True)


def top1(network: nn.Module, x: Tensor, labels: np.ndarray) -> float:
    network.eval()
    with torch.no_grad():
        answers = torch.cat([network(batch).argmax(1) for batch in x.split(1000)])
    return float((answers.numpy() == labels).mean())


def as_input(images: np.ndarray) -> Tensor:
    return torch.from_numpy(images.astype(np.float32) / 255)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", type=Path, help="folder that holds the four .gz files of Fashion-MNIST")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "model.onnx")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    with source_folder(arguments.source) as folder:
        images, labels = read_split(folder, "train")
        test_images, test_labels = read_split(folder, "t10k")
    network = make_network()
    train(network, as_input(images), torch.from_numpy(labels))
    print(f"top-1 on the test images: {top1(network, as_input(test_images), test_labels):.4f}")
    torch.onnx.export(
        network,
        (torch.zeros(1, 1, 28, 28),),
        str(arguments.output),
        opset_version=OPSET,
        dynamo=False,
        input_names=["x"],
        output_names=["y"],
        dynamic_axes={"x": {0: "N"}, "y": {0: "N"}},
    )


if __name__ == "__main__":
    main()
