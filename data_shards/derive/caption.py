"""`halfstep shards caption`: a frozen image-to-text model writes a caption for every sample, on all ranks."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast, final

import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, PreTrainedTokenizerBase

from data_shards import ranks
from data_shards.config import CAPTION_EXTENSION, ORIGINAL_CAPTION_EXTENSION
from data_shards.derive.derive import DONE, Asked, Beat, derive
from data_shards.derive.members import MemberReader
from data_shards.derive.request import CaptionRequest, DeriveJob, is_finished
from data_shards.encoders.files import ModelFiles, find_model, find_tokenizer
from data_shards.encoders.precision import autocast
from data_shards.index import Json

CLIP_TOKENS = 77  # what CLIP's text encoder reads, with its start and end
_QUESTION = "Describe this image in one sentence."


def caption_job(run_dir: Path, options: Mapping[str, object], stop: Asked, beat: Beat) -> int:
    """What each rank does: caption the shards that OUT/run/derive.json names. Collective."""
    job = DeriveJob.read(run_dir)
    assert isinstance(job.request, CaptionRequest), "a caption job has a caption request"
    if is_finished(run_dir.parent):
        return DONE
    beat.phase("import", 0)  # may last: gigabytes are downloaded and loaded
    captioner = Captioner(job.request, device=ranks.device())
    return derive(job, run_dir.parent, captioner, stop=stop, beat=beat)


class _Processor(Protocol):
    """What transformers' processors of images and text have in common."""

    tokenizer: PreTrainedTokenizerBase

    def __call__(
        self, *, images: list[Image.Image], text: list[str] | None, padding: bool, return_tensors: str
    ) -> transformers.BatchFeature: ...

    def batch_decode(self, rows: Tensor, *, skip_special_tokens: bool) -> list[str]: ...

    def apply_chat_template(self, conversation: list[dict[str, object]], *, add_generation_prompt: bool) -> str: ...


class _Model(Protocol):
    """What transformers' models that describe images have in common."""

    config: transformers.PretrainedConfig
    generation_config: transformers.GenerationConfig | None

    def to(self, device: torch.device) -> "_Model": ...

    def eval(self) -> "_Model": ...

    def generate(self, **inputs: object) -> Tensor: ...


@final
@dataclass(frozen=True)
class Picture:
    """What a captioner needs of a sample. caption: what stands in .txt; has_original: whether a captioner wrote that."""

    image: Image.Image
    caption: bytes | None
    has_original: bool


@final
class Captioner:
    """BLIP, BLIP-2 or another image-to-text model: greedy or beam search, without any random number."""

    extensions = (CAPTION_EXTENSION, ORIGINAL_CAPTION_EXTENSION)
    keeps_images = True

    def __init__(self, request: CaptionRequest, *, device: torch.device) -> None:
        """Load the model. Raises: ValueError if there is none of that name, or it is none that describes images."""
        self._request, self._device = request, device
        self._files = find_model(request.model, revision=request.revision)
        self._processor, self._model = _load(self._files)
        self._model.to(device).eval()
        own = self._processor.tokenizer
        self._counter, self._counted_by = _counter(request.tokenizer, own, self._files.name)
        self._ends = _end_tokens(self._model.config, self._model.generation_config)
        self._is_chat = bool(getattr(self._processor, "chat_template", None))
        if self._is_chat:
            own.padding_side = "left"  # what is generated follows the padding

    @property
    def models(self) -> Json:
        """The captioner by name and sha256."""
        return {"captioner": self._files.to_json()}

    def read(self, reader: MemberReader, shard: int, position: int) -> Picture:
        """The image and the caption it has. Raises: DecodeError if either is damaged, or there is no image."""
        caption = reader.content(shard, position, CAPTION_EXTENSION)
        original = reader.content(shard, position, ORIGINAL_CAPTION_EXTENSION)
        return Picture(reader.image(shard, position), caption, original is not None)

    def make(self, samples: Sequence[Picture]) -> list[tuple[Mapping[str, bytes], object]]:
        """The new caption, and the old one beside it; one that was the original already stays it."""
        made: list[tuple[Mapping[str, bytes], object]] = []
        for sample, (caption, is_cut) in zip(samples, self.captions([sample.image for sample in samples]), strict=True):
            members = {CAPTION_EXTENSION: caption.encode()}
            if sample.caption is not None and not sample.has_original:
                members[ORIGINAL_CAPTION_EXTENSION] = sample.caption
            tokens = len(self._counter(caption).input_ids)
            made.append((members, [tokens, int(is_cut), hashlib.sha256(caption.encode()).hexdigest()[:16]]))
        return made

    def captions(self, images: Sequence[Image.Image]) -> list[tuple[str, bool]]:
        """Of each image a caption, and whether it was cut at max_new_tokens."""
        request = self._request
        inputs = self._processor(images=list(images), text=self._texts(len(images)), padding=self._is_chat, return_tensors="pt")
        inputs = inputs.to(self._device)
        with torch.inference_mode(), autocast(self._device, request.precision):
            rows = self._model.generate(**inputs, do_sample=False, num_beams=request.num_beams, max_new_tokens=request.max_new_tokens)
        prompt = _prompt_tokens(rows, inputs.get("input_ids"))
        new = rows[:, prompt:]
        has_end = torch.isin(new, torch.tensor(self._ends, device=new.device)).any(dim=1) | (new.shape[1] < request.max_new_tokens)
        texts = self._processor.batch_decode(new if self._is_chat else rows, skip_special_tokens=True)
        return [(text.strip(), not ended) for text, ended in zip(texts, has_end.tolist(), strict=True)]

    def facts(self, notes: Sequence[object]) -> Json:
        """How captions were made, and what is wrong with how many of them."""
        request, tokens, cut, seen = self._request, [], 0, Counter[str]()
        empty = hashlib.sha256(b"").hexdigest()[:16]
        for note in notes:
            match note:
                case [int(count), int(is_cut), str(digest)]:
                    tokens.append(count)
                    cut += is_cut
                    seen[digest] += 1
                case _:
                    raise AssertionError(f"a caption's note is {note!r}")
        return {
            "model": self._files.name,
            "model_class": type(self._model).__name__,
            "processor": type(self._processor).__name__,
            "decoding": "greedy" if request.num_beams == 1 else f"beam search of {request.num_beams}",
            "device": self._device.type,
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "counts": {
                "captions": len(notes),
                "cut_at_max_new_tokens": cut,
                f"longer_than_{CLIP_TOKENS}_tokens": sum(count > CLIP_TOKENS for count in tokens),
                "tokens_counted_by": self._counted_by,
                "longest_tokens": max(tokens, default=0),
                "empty": seen[empty],
                "duplicates": len(notes) - len(seen),
                "duplicate_share": round(1 - len(seen) / max(1, len(notes)), 4),
            },
        }

    def _texts(self, count: int) -> list[str] | None:
        """The prompt for each image."""
        if not self._is_chat:
            return [self._request.prompt] * count if self._request.prompt else None
        content = [{"type": "image"}, {"type": "text", "text": self._request.prompt or _QUESTION}]
        question = self._processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return [question] * count


def _load(files: ModelFiles) -> tuple["_Processor", "_Model"]:
    """Processor and model. Raises: ValueError if the folder holds another kind of model."""
    try:
        processor = AutoProcessor.from_pretrained(files.folder, local_files_only=True, trust_remote_code=False)
        model = AutoModelForImageTextToText.from_pretrained(
            files.folder, local_files_only=True, trust_remote_code=False, use_safetensors=True, dtype=torch.float32
        )
    except (ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{files.name} is no model that describes images, or not whole ({str(error).splitlines()[0]}); "
            "give one such as Salesforce/blip-image-captioning-large, with its processor and tokenizer"
        ) from error
    return cast(_Processor, processor), cast(_Model, model)


def _counter(text: str, own: PreTrainedTokenizerBase, name: str) -> tuple[PreTrainedTokenizerBase, str]:
    """The tokenizer that counts, and its name."""
    if not text:
        return own, f"{name} (the captioner's own; --tokenizer gives the one of the model that is trained)"
    folder, found = find_tokenizer(text)
    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False), found


def _end_tokens(config: transformers.PretrainedConfig, generation: transformers.GenerationConfig | None) -> list[int]:
    """Ids after which nothing follows; BLIP has its own."""
    text = config.get_text_config(decoder=True)
    found = [generation.eos_token_id if generation else None, text.eos_token_id, getattr(text, "sep_token_id", None)]
    return sorted({number for one in found for number in (one if isinstance(one, list) else [one]) if isinstance(number, int)})


def _prompt_tokens(rows: Tensor, prompt: Tensor | None) -> int:
    """How many of the first tokens the model was given; BLIP drops the prompt's last one, and others do not give it back."""
    if prompt is None:
        return 1
    for length in (prompt.shape[1], prompt.shape[1] - 1):
        if rows.shape[1] >= length > 0 and torch.equal(rows[:, :length], prompt[:, :length]):
            return length
    return 1
