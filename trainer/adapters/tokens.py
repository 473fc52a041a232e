"""New tokens of a text encoder: only their own rows of the embedding are trained."""

import copy
from pathlib import Path
from typing import final

import torch
from jaxtyping import Float, Int
from safetensors.torch import save
from torch import Tensor, nn
from transformers import AddedToken, CLIPTextModel, PreTrainedModel, PreTrainedTokenizerBase

from data_shards.files import replace_file

_OLD_END_ID = 2
PROBE_PROMPTS = ("{token}", "a {token} car", "a {token}cartoon car", "car, {token}")


@final
class ExtendedEmbedding(nn.Module):
    """A frozen embedding followed by trainable rows of its own parameter.

    A parameter apart is what every engine can train: no mask on gradients, no weight decay or moment that reaches the other rows."""

    def __init__(self, base: nn.Embedding, new_rows: Float[Tensor, "n d"]) -> None:
        """new_rows: kept in fp32, whatever the precision of the base."""
        super().__init__()
        self.base = base.requires_grad_(False)
        self.new_rows = nn.Parameter(new_rows.detach().float().clone())

    def forward(self, ids: Int[Tensor, "b k"]) -> Float[Tensor, "b k d"]:
        """Rows of the base for ids below its size, new rows for those from there on; in the base's precision."""
        size = self.base.num_embeddings
        known = self.base(ids.clamp(max=size - 1))
        new = nn.functional.embedding((ids - size).clamp(min=0), self.new_rows)
        return torch.where((ids >= size).unsqueeze(-1), new.to(known.dtype), known)

    def plain(self) -> nn.Embedding:
        """One embedding with all rows, frozen, in the base's precision; the base's rows keep their bits."""
        rows = torch.cat([self.base.weight.detach(), self.new_rows.detach().to(self.base.weight.dtype)])
        return nn.Embedding.from_pretrained(rows, freeze=True, padding_idx=self.base.padding_idx)


def add_token(tokenizer: PreTrainedTokenizerBase, text_encoder: PreTrainedModel, token: str, *, initializer: str) -> int:
    """Add a token to a tokenizer and a trainable row for it to the encoder; returns its id. Call again for a further token.

    initializer: a word; the row starts as the mean of its tokens' rows. All of the embedding's other rows are frozen.
    To be called after add_lora, which freezes what it finds.
    Raises: ValueError if the token is known, is not kept whole in prompts, or the initializer is empty or unknown; nothing is changed."""
    if not token or token != token.strip() or len(token.split()) != 1:
        raise ValueError(f"new token {token!r}: wanted some characters without spaces, such as <cmg>")
    if token in tokenizer.get_vocab():
        raise ValueError(f"new token {token!r} is in the tokenizer already, as id {tokenizer.convert_tokens_to_ids(token)}; take another")
    embedding = text_encoder.get_input_embeddings()
    if isinstance(embedding, ExtendedEmbedding):
        base, old = embedding.base, embedding.new_rows.detach()
    else:
        assert isinstance(embedding, nn.Embedding), "a text encoder looks its tokens up in an embedding"
        base, old = embedding, embedding.weight.detach()[:0].float()
    rows = base.num_embeddings + len(old)
    if len(tokenizer) != rows:
        raise ValueError(f"the tokenizer has {len(tokenizer)} tokens, the text encoder {rows} rows; wanted a pair that belongs together")
    row = _initial_row(tokenizer, (base.weight.detach(), old), initializer)
    _check_kept_whole(tokenizer, token)
    _add(tokenizer, token)
    _pool_at_the_end(text_encoder, tokenizer)
    text_encoder.set_input_embeddings(ExtendedEmbedding(base, torch.cat([old, row])))
    return rows


def new_rows(text_encoder: PreTrainedModel) -> Float[Tensor, "n d"] | None:
    """The rows of the tokens that were added, in order, or None."""
    embedding = text_encoder.get_input_embeddings()
    return embedding.new_rows if isinstance(embedding, ExtendedEmbedding) else None


def fold(text_encoder: PreTrainedModel) -> None:
    """Put one plain embedding, of as many rows as the tokenizer has tokens, in the place of an extended one; for export.

    Does nothing to an encoder without new tokens."""
    embedding = text_encoder.get_input_embeddings()
    if isinstance(embedding, ExtendedEmbedding):
        plain = embedding.plain()
        text_encoder.set_input_embeddings(plain)
        text_encoder.config.get_text_config().vocab_size = plain.num_embeddings


def write_token(path: Path, token: str, row: Float[Tensor, " d"]) -> None:
    """Write a token and its row as the file that `pipeline.load_textual_inversion` takes; goes with a LoRA file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, save({token: row.detach().to("cpu", torch.float32).reshape(1, -1).contiguous()}, {"format": "pt"}))


def _pool_at_the_end(text_encoder: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """CLIP's old configurations (end token 2) pool at the prompt's highest id, which would be the new token's; the end token was it."""
    config, end = text_encoder.config.get_text_config(), tokenizer.eos_token_id
    if not isinstance(end, int) or config.eos_token_id != _OLD_END_ID:
        return
    config.eos_token_id = end
    for module in text_encoder.modules():
        if isinstance(module, CLIPTextModel):
            module.eos_token_id = end


def _add(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    tokenizer.add_tokens([AddedToken(token, normalized=False)])


def _initial_row(tokenizer: PreTrainedTokenizerBase, tables: tuple[Tensor, Tensor], initializer: str) -> Float[Tensor, "1 d"]:
    ids = tokenizer(initializer, add_special_tokens=False)["input_ids"]
    if not ids or (tokenizer.unk_token_id in ids and tokenizer.unk_token_id != tokenizer.eos_token_id):
        raise ValueError(f"initializer {initializer!r} has no tokens that the tokenizer knows; take a word that it knows, such as cartoon")
    base, new = tables
    rows = [base[number] if number < len(base) else new[number - len(base)] for number in ids]
    return torch.stack([row.float() for row in rows]).mean(dim=0, keepdim=True)


def _check_kept_whole(tokenizer: PreTrainedTokenizerBase, token: str) -> None:
    """On a copy, so that a token that is refused leaves no trace."""
    trial = copy.deepcopy(tokenizer)
    _add(trial, token)
    new = trial.convert_tokens_to_ids(token)
    for prompt in PROBE_PROMPTS:
        ids = trial(prompt.format(token=token), add_special_tokens=False)["input_ids"]
        if len(trial) != len(tokenizer) + 1 or new != len(tokenizer) or ids.count(new) != 1:
            raise ValueError(f"new token {token!r} is not kept whole in the prompt {prompt.format(token=token)!r}; take one such as <cmg>")
