"""What several test files share: the real data and the experiment scripts."""

import dataclasses
import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

import pytest

from mnist_lab.data import Mnist, load_mnist

EXPERIMENTS = Path(__file__).parent.parent / "experiments"


@pytest.fixture(scope="session")
def mnist() -> Mnist:
    """Return the real data, from the project's data folder or fetched into it."""
    return load_mnist()


@pytest.fixture(scope="session")
def small_mnist(mnist: Mnist) -> Mnist:
    """Return the first 500 training and 300 test images, for trainings that take no time."""
    return dataclasses.replace(
        mnist,
        train_images=mnist.train_images[:500],
        train_labels=mnist.train_labels[:500],
        test_images=mnist.test_images[:300],
        test_labels=mnist.test_labels[:300],
    )


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Return a function that imports experiments/<stem>.py as a module, by its path."""

    @cache
    def load(stem: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"experiments.{stem}", EXPERIMENTS / f"{stem}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load
