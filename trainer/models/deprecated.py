"""Where diffusers keeps the classes of Wuerstchen and Kandinsky 2.2: the one place that knows.

diffusers 0.42 moved Wuerstchen's to `deprecated` (its last supported version was 0.33.1); Kandinsky's are not marked yet."""

from diffusers.models.autoencoders.vq_model import VQModel
from diffusers.models.transformers.prior_transformer import PriorTransformer
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_diffnext import WuerstchenDiffNeXt
from diffusers.pipelines.deprecated.wuerstchen.modeling_wuerstchen_prior import WuerstchenPrior
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen import WuerstchenDecoderPipeline
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen_combined import WuerstchenCombinedPipeline
from diffusers.pipelines.deprecated.wuerstchen.pipeline_wuerstchen_prior import WuerstchenPriorPipeline
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2 import KandinskyV22Pipeline
from diffusers.pipelines.kandinsky2_2.pipeline_kandinsky2_2_prior import KandinskyV22PriorPipeline
from diffusers.schedulers.scheduling_ddpm_wuerstchen import DDPMWuerstchenScheduler

__all__ = [
    "DDPMWuerstchenScheduler",
    "KandinskyV22Pipeline",
    "KandinskyV22PriorPipeline",
    "PaellaVQModel",
    "PriorTransformer",
    "VQModel",
    "WuerstchenCombinedPipeline",
    "WuerstchenDecoderPipeline",
    "WuerstchenDiffNeXt",
    "WuerstchenPrior",
    "WuerstchenPriorPipeline",
]
