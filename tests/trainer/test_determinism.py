"""Deterministic kernels are switched on whole or not at all."""

import os
from collections.abc import Iterator

import pytest
import torch

from trainer.determinism import use_deterministic_kernels


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process as it was, whatever a test switches."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    benchmark = torch.backends.cudnn.benchmark
    yield
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = benchmark


def test_all_switches_are_set() -> None:
    torch.backends.cudnn.benchmark = True
    use_deterministic_kernels()
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    use_deterministic_kernels()  # again, as a chain's next stage does


def test_a_workspace_that_is_set_already_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    use_deterministic_kernels()
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_another_workspace_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":0:0")
    with pytest.raises(ValueError, match=r"CUBLAS_WORKSPACE_CONFIG=:0:0 in the environment, .* wants :4096:8 or :16:8; unset it"):
        use_deterministic_kernels()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(("allocated_bytes", "late"), [(0, False), (512, True)])
def test_a_device_that_was_only_chosen_is_not_too_late(allocated_bytes: int, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: allocated_bytes * device)
    if late:
        with pytest.raises(
            RuntimeError, match=r"comes too late: CUDA has been used .* start the process with CUBLAS_WORKSPACE_CONFIG=:4096:8"
        ):
            use_deterministic_kernels()
    else:
        use_deterministic_kernels()
    assert torch.are_deterministic_algorithms_enabled() == (not late)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_two_backward_passes_on_a_gpu_give_the_same_bits() -> None:
    """In a process of its own: this one may have used CUDA."""
    import subprocess
    import sys

    code = (
        "import torch\n"
        "from trainer.config import TinyUNetConfig\n"
        "from trainer.determinism import use_deterministic_kernels\n"
        "from trainer.models.tiny_unet import build_tiny_unet\n"
        "torch.cuda.set_device(0)\n"
        "use_deterministic_kernels()\n"
        "torch.manual_seed(0)\n"
        "model, images = build_tiny_unet(TinyUNetConfig(), 32).cuda(), torch.randn(32, 3, 32, 32).cuda()\n"
        "def gradients():\n"
        "    model.zero_grad()\n"
        "    model(images, torch.arange(32.0).cuda()).sample.square().mean().backward()\n"
        "    return [p.grad.clone() for p in model.parameters()]\n"
        "first = gradients()\n"
        "assert all(torch.equal(a, b) for _ in range(5) for a, b in zip(gradients(), first, strict=True))\n"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
