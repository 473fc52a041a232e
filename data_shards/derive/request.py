"""What a captioner or encoder is asked to make of shards, or a model to draw, and where that stands in OUT; imports no torch."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal, final

from data_shards.config import INDEX_NAME
from data_shards.files import json_text, read_json_object, replace_file
from data_shards.index import ShardIndex

WORK_NAME = ".derive"  # in OUT until it is whole: what is made, finished batches and finished shards
RUN_NAME = "run"  # in OUT: logs, heartbeats, exit.json and lease of the job, as a run's folder has them
REQUEST_NAME = "derive.json"

Kind = Literal["caption", "encode", "draw"]
Precision = Literal["bf16", "fp32"]
StoredType = Literal["fp16", "fp32"]
BadPolicy = Literal["stop", "skip"]


@final
@dataclass(frozen=True)
class CaptionRequest:
    """`halfstep shards caption`: which model, asked how.

    model, tokenizer: a local folder or a Hub id; revision: of the Hub's model, None for its main branch; prompt: what every caption
    begins with (for chat models: the question), "" for none; tokenizer: counts tokens, "" takes the model's own."""

    model: str
    revision: str | None = None
    prompt: str = ""
    batch_size: int = 16
    max_new_tokens: int = 40
    num_beams: int = 1
    precision: Precision = "bf16"
    tokenizer: str = ""
    on_bad_sample: BadPolicy = "stop"

    def __post_init__(self) -> None:
        _at_least_one(batch_size=self.batch_size, max_new_tokens=self.max_new_tokens, num_beams=self.num_beams)


@final
@dataclass(frozen=True)
class EncodeRequest:
    """`halfstep shards encode`: which frozen encoders, on images of which size.

    vae, text_encoder, image_encoder: a local folder or a Hub id, with @REVISION behind it where it is not the main branch; "" for
    none. size: side of the square that images are cropped and scaled to, in pixels; text_layer: last (with its final norm), or
    penultimate as SDXL takes it; text_tokens: 0 for
    the encoder's own number; text_mask: padding is masked, and the mask stored."""

    vae: str = ""
    text_encoder: str = ""
    image_encoder: str = ""
    size: int = 512
    batch_size: int = 16
    precision: Precision = "bf16"
    dtype: StoredType = "fp16"
    text_layer: Literal["last", "penultimate"] = "last"
    text_tokens: int = 0
    pooled: bool = False
    text_mask: bool = False
    keep_images: bool = False
    on_bad_sample: BadPolicy = "stop"

    def __post_init__(self) -> None:
        _at_least_one(batch_size=self.batch_size, size=self.size)
        if not (self.vae or self.text_encoder or self.image_encoder):
            raise ValueError("nothing to encode with; give --vae MODEL, --text-encoder MODEL or --image-encoder MODEL")
        if not self.text_encoder and (self.pooled or self.text_mask):
            raise ValueError("--pooled and --text-mask are of a text encoder; give --text-encoder MODEL")


@final
@dataclass(frozen=True)
class DrawRequest:
    """`halfstep shards draw`: how many images a finished model draws, and how.

    source: RUN_DIR, chain or export; steps, sampler: None for the model's own; seed: image i starts from the noise of seed + i;
    batch_size, samples_per_shard: the same whoever draws, since sums in a model may depend on what else is in the batch."""

    on_bad_sample: ClassVar[BadPolicy] = "stop"  # nothing is read

    source: str
    count: int
    steps: int | None = None
    sampler: Literal["ddim", "ancestral"] | None = None
    seed: int = 0
    batch_size: int = 64
    samples_per_shard: int = 256
    precision: Precision = "fp32"
    licence: str = "not stated"

    def __post_init__(self) -> None:
        _at_least_one(count=self.count, batch_size=self.batch_size, samples_per_shard=self.samples_per_shard)

    @property
    def shards(self) -> tuple[int, ...]:
        """Samples of each shard."""
        whole, rest = divmod(self.count, self.samples_per_shard)
        return (*[self.samples_per_shard] * whole, *([rest] if rest else []))


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"--{name.replace('_', '-')} {number} must be at least 1")


Request = CaptionRequest | EncodeRequest | DrawRequest
_REQUESTS: Mapping[Kind, type[Request]] = {"caption": CaptionRequest, "encode": EncodeRequest, "draw": DrawRequest}


@final
@dataclass(frozen=True)
class DeriveJob:
    """All that the ranks need to know; stands in OUT/run/derive.json.

    shards: the folder that is read, of a model that draws the model; shards_sha256: "" there, the ranks find what its weights are;
    samples, batches: how many there are in it, or will be."""

    kind: Kind
    shards: str
    shards_sha256: str
    samples: int
    batches: int
    request: Request

    @classmethod
    def of(cls, index: ShardIndex, request: CaptionRequest | EncodeRequest) -> "DeriveJob":
        """The job of a request on shards."""
        kind: Kind = "caption" if isinstance(request, CaptionRequest) else "encode"
        batches = sum(-(-samples // request.batch_size) for samples in index.samples_per_shard)
        return cls(kind, str(index.root.absolute()), index.sha256, index.samples, batches, request)

    @classmethod
    def drawing(cls, request: DrawRequest) -> "DeriveJob":
        """The job of drawing."""
        batches = sum(-(-samples // request.batch_size) for samples in request.shards)
        return cls("draw", request.source, "", request.count, batches, request)

    @classmethod
    def read(cls, run_dir: Path) -> "DeriveJob":
        """From OUT/run. Raises: ValueError if it is missing or not what `write` writes."""
        path = run_dir / REQUEST_NAME
        try:
            match read_json_object(path):
                case {
                    "kind": str(name),
                    "shards": str(shards),
                    "shards_sha256": str(sha256),
                    "samples": int(samples),
                    "batches": int(batches),
                    "request": dict(fields),
                }:
                    for kind, request in _REQUESTS.items():
                        if kind == name:
                            return cls(kind, shards, sha256, samples, batches, request(**fields))
            raise TypeError("an entry is missing or of another type")
        except TypeError as error:
            raise ValueError(f"{path}: not written by this halfstep ({error}); remove {run_dir} and give the command again") from None

    def write(self, run_dir: Path) -> None:
        """Into OUT/run."""
        replace_file(run_dir / REQUEST_NAME, json_text(asdict(self)))

    def wanted(self) -> dict[str, object]:
        """What makes two jobs the same, without the paths of this machine: a local model goes by its folder's name."""
        texts = {key: public_name(value) if isinstance(value, str) else value for key, value in asdict(self.request).items()}
        read = {"from_sha256": self.shards_sha256} if self.shards_sha256 else {}
        return {"kind": self.kind, **read, "request": texts}


def public_name(text: str) -> str:
    """A local folder by its last name, anything else as it is: an index tells nobody how its maker's disk looks."""
    return Path(text).name if text.startswith("/") else text


def is_derive(run_dir: Path) -> bool:
    """Whether a folder is the run folder of a captioner, an encoder or a model that draws."""
    return (run_dir / REQUEST_NAME).exists()


def is_finished(out: Path) -> bool:
    """Whether OUT is whole: its index is written last."""
    return (out / INDEX_NAME).exists()


def finished_batches(run_dir: Path) -> int:
    """Batches that any attempt has finished, as the ranks' ledgers in OUT/run list them."""
    return sum(path.read_bytes().count(b"\n") for path in (run_dir / "ledger").glob("rank_*.jsonl"))


def check_same(out: Path, wanted: Mapping[str, object]) -> None:
    """Compare with what OUT holds or has begun.

    Raises: ValueError with the difference if that is something else, or if OUT holds other things."""
    note = out / WORK_NAME / "wanted.json"
    if is_finished(out):
        index = ShardIndex.load(out)
        found = index.derived[-1] if index.derived else {}
        text = f"{out} holds other shards"
    elif note.exists():
        found, text = read_json_object(note), f"{out} holds the beginning of something else"
    else:
        strangers = sorted(path.name for path in out.iterdir() if path.name not in (WORK_NAME, RUN_NAME)) if out.is_dir() else []
        if strangers:
            raise ValueError(f"{out} is not empty (it holds {strangers[0]}); give another --out")
        return
    differences = list(_differences({key: found.get(key) for key in wanted}, wanted))
    if differences:
        raise ValueError(f"{text} ({'; '.join(differences[:4])}); give another --out, or remove that folder")


def _differences(found: Mapping[str, object], wanted: Mapping[str, object]) -> list[str]:
    one, other = _flat(found), _flat(wanted)
    names = sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
    return [f"{name} is {_short(one.get(name))}, wanted {_short(other.get(name))}" for name in names]


def _flat(entries: Mapping[str, object], prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in entries.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
