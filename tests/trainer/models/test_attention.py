"""Attention kernels: xformers only where it really runs, the same numbers whichever is chosen."""

import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from types import ModuleType

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor2_0
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.transformers.prior_transformer import PriorTransformer
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.deprecated.wuerstchen import WuerstchenPrior
from torch import Tensor
from torch._ops import OpOverload
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.config import TinyUNetConfig
from trainer.models import attention
from trainer.models.attention import XFormersUnlessMasked, first_failure, use_attention
from trainer.models.tiny_unet import build_tiny_unet

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
TINY = TinyUNetConfig(channels=(16, 32), attention=(False, True), attention_heads=2, norm_groups=4)

Model = tuple[ModelMixin, Callable[[ModelMixin], Tensor]]


def tiny_unet() -> Model:
    images, timesteps = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0])
    return build_tiny_unet(TINY, 8), lambda model: model(images, timesteps).sample


def text_unet() -> Model:
    model = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=2,
    )
    images, words = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    return model, lambda model: model(images, 5, encoder_hidden_states=words).sample


def kandinsky_unet() -> Model:
    """Keys and values of the image embedding are added to the layer's own."""
    model = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"),
        up_block_types=("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        norm_num_groups=4,
        cross_attention_dim=8,
        attention_head_dim=8,
    )
    images, words = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    return model, lambda model: model(images, 5, encoder_hidden_states=words).sample


def prior() -> Model:
    """Its causal mask spans 9 tokens: rows that are not aligned."""
    model = PriorTransformer(num_attention_heads=2, attention_head_dim=8, num_layers=2, embedding_dim=12, num_embeddings=5)
    x_t, embedding, words = torch.randn(2, 12), torch.randn(2, 12), torch.randn(2, 5, 12)
    return model, lambda model: model(x_t, 5, proj_embedding=embedding, encoder_hidden_states=words).predicted_image_embedding


def vae() -> Model:
    images = torch.randn(1, 3, 8, 8)
    return AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, sample_size=8), lambda model: model(images).sample


def wuerstchen() -> Model:
    model = WuerstchenPrior(c_in=4, c=16, c_cond=8, c_r=8, depth=2, nhead=2)
    latents, times, words = torch.randn(2, 4, 4, 4), torch.tensor([0.2, 0.9]), torch.randn(2, 5, 8)
    return model, lambda model: model(latents, times, words)


MODELS = (tiny_unet, text_unet, kandinsky_unet, prior, vae, wuerstchen)


@pytest.fixture
def fake_xformers(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """A package that attends as xformers does: inputs of (batch times heads, tokens, width), no unaligned mask."""

    def attend(query: Tensor, key: Tensor, value: Tensor, attn_bias: Tensor | None = None, **rest: float | None) -> Tensor:
        assert attn_bias is None or attn_bias.shape[-1] % 8 == 0, "attn_bias.stride(-2) % 8 != 0"
        assert query.ndim == 3
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=attn_bias, scale=rest.get("scale"))

    ops = ModuleType("xformers.ops")
    setattr(ops, "memory_efficient_attention", attend)  # noqa: B010
    package = ModuleType("xformers")
    setattr(package, "ops", ops)  # noqa: B010
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    monkeypatch.setattr("diffusers.models.attention_processor.xformers", package)
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    first_failure.cache_clear()
    yield ops
    first_failure.cache_clear()


@pytest.mark.parametrize("build", MODELS)
def test_auto_is_sdpa_on_cpu_and_touches_no_xformers(build: Callable[[], Model]) -> None:
    torch.manual_seed(0)
    model, run = build()
    assert use_attention(model, "auto", CPU) == "sdpa"
    layers = [module for module in model.modules() if isinstance(module, Attention)]
    assert layers and all(isinstance(layer.processor, AttnProcessor2_0 | AttnAddedKVProcessor2_0) for layer in layers)
    run(model).square().mean().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.parameters() if parameter.grad is not None)
    assert "xformers" not in sys.modules or find_spec("xformers") is not None


@pytest.mark.parametrize("build", MODELS)
def test_models_give_the_same_numbers_by_way_of_either(
    build: Callable[[], Model], fake_xformers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, run = build()
    model.eval()  # an autoencoder's sample is its mode's: no noise between the two
    use_attention(model, "sdpa")
    expected = run_and_gradients(model, run)
    monkeypatch.setattr(attention, "xformers_trouble", lambda *_, **__: None)
    assert use_attention(model, "auto") == "xformers"
    assert any(isinstance(getattr(layer, "processor", None), XFormersUnlessMasked) for layer in model.modules())
    assert_close(run_and_gradients(model, run), expected, tolerance=1e-4)
    assert use_attention(model, "sdpa") == "sdpa"
    for found, wanted in zip(run_and_gradients(model, run), expected, strict=True):
        assert torch.equal(found, wanted)


class Attended(TorchDispatchMode):
    """Notes the type that attention's kernels are given, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.types: dict[str, set[torch.dtype]] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: object, args: tuple[Tensor, ...] = (), kwargs: dict[str, object] | None = None
    ) -> object:
        if "attention" in func.name():
            self.types.setdefault("backward" if "backward" in func.name() else "forward", set()).add(args[0].dtype)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("build", MODELS)
def test_below_fp32_a_cpu_attends_in_fp32_and_comes_as_near_to_it(build: Callable[[], Model]) -> None:
    torch.manual_seed(0)
    model, run = build()
    model.eval()
    use_attention(model, "sdpa", CPU)
    exact = run_and_gradients(model, run)
    results = []
    for dtype, seen in ((torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)):
        use_attention(model, "sdpa", CPU, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16), Attended() as attended:
            results.append(run_and_gradients(model, run))
        assert attended.types == {"forward": {seen}, "backward": {seen}}
    in_bf16, in_fp32 = (torch.cat([(one - other).flatten() for one, other in zip(found, exact, strict=True)]) for found in results)
    assert torch.linalg.vector_norm(in_fp32) <= 1.1 * torch.linalg.vector_norm(in_bf16)  # of what other layers round, too
    assert {tensor.dtype for tensor in results[1]} == {tensor.dtype for tensor in results[0]}
    use_attention(model, "sdpa", CPU)
    for found, wanted in zip(run_and_gradients(model, run), exact, strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize(("tokens", "seen"), [(512, torch.float32), (513, torch.bfloat16)])
def test_over_many_tokens_a_cpu_attends_in_the_activations_type(tokens: int, seen: torch.dtype) -> None:
    layer = Attention(8, heads=1, dim_head=8)
    attention._switch(layer, "sdpa", in_fp32=True)
    with torch.autocast("cpu", torch.bfloat16), Attended() as attended:
        layer(torch.zeros(1, tokens, 8)).sum().backward()
    assert attended.types == {"forward": {seen}, "backward": {seen}}


def run_and_gradients(model: ModelMixin, run: Callable[[ModelMixin], Tensor]) -> list[Tensor]:
    model.zero_grad()
    out = run(model)
    out.square().mean().backward()
    return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]


def test_xformers_without_a_cuda_device_is_refused() -> None:
    with pytest.raises(ValueError, match=r"engine\.attention=xformers: its kernels need a CUDA device, and this rank has cpu; .*=auto$"):
        use_attention(build_tiny_unet(TINY, 8), "xformers", CPU)


def test_xformers_that_is_not_installed_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed; pip install 'halfstep\[xformers\]'; or set engine\.attention=auto"):
        use_attention(build_tiny_unet(TINY, 8), "xformers", CUDA)
    assert use_attention(build_tiny_unet(TINY, 8), "auto", CUDA) == "sdpa"


def test_xformers_whose_kernels_do_not_run_says_their_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    monkeypatch.setattr(attention, "first_failure", lambda device, dtype, width: f"No operator found for {width}")
    with pytest.raises(
        ValueError, match=r"its kernels do not run on cuda:0 \(torch\.bfloat16, heads of 16 channels\): No operator found for 16"
    ):
        use_attention(build_tiny_unet(TINY, 8), "xformers", CUDA, dtype=torch.bfloat16)
    assert use_attention(build_tiny_unet(TINY, 8), "auto", CUDA) == "sdpa"


def test_xformers_and_deterministic_kernels_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "find_spec", lambda name: object())
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    with pytest.raises(ValueError, match=r"same bits every time; set engine\.deterministic=false"):
        use_attention(build_tiny_unet(TINY, 8), "xformers", CUDA)


def test_the_probe_runs_once_and_reports_one_line(fake_xformers: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    state = torch.get_rng_state()
    assert first_failure(CPU, torch.float32, 16) is None
    assert torch.equal(torch.get_rng_state(), state)
    calls: list[int] = []

    def fail(*_: Tensor) -> Tensor:
        calls.append(1)
        raise NotImplementedError("No operator found for `memory_efficient_attention_forward`\n`fa3F@0.0.0` is not supported because:\n")

    monkeypatch.setattr(fake_xformers, "memory_efficient_attention", fail)
    for _ in range(2):
        assert first_failure(CPU, torch.float32, 24) == "No operator found for `memory_efficient_attention_forward`"
    assert len(calls) == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or find_spec("xformers") is None, reason="no CUDA device, or no xformers")
def test_sdpa_and_xformers_agree_on_a_gpu() -> None:
    for build in MODELS:
        torch.manual_seed(0)
        with torch.device(CUDA):
            model, run = build()
        model.eval()
        for dtype, tolerance in ((torch.float32, 1e-3), (torch.bfloat16, 3e-2)):
            results = []
            for kernels in ("sdpa", "xformers"):
                assert use_attention(model, kernels, CUDA, dtype=dtype) == kernels
                with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
                    results.append(run_and_gradients(model, run))
            assert_close(*results, tolerance=tolerance)


def assert_close(found: list[Tensor], wanted: list[Tensor], *, tolerance: float) -> None:
    """The output's and the whole gradient's error over their norms: a key's bias alone has a gradient of rounding errors."""
    for part in (slice(0, 1), slice(1, None)):
        one, other = (torch.cat([tensor.float().flatten() for tensor in tensors[part]]) for tensors in (found, wanted))
        assert torch.linalg.vector_norm(one - other) <= tolerance * torch.linalg.vector_norm(other)
