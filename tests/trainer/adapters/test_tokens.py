"""New tokens: their rows alone are trained, and are part of a plain encoder after folding."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPTextModel

from tests.tiny_models import tiny_tokenizer
from tests.trainer.adapters.small import WIDTH, adapt, pipeline, small_text_encoder, small_unet
from trainer.adapters.lora import CLIP_TEXT_TARGETS, adapter_parameters
from trainer.adapters.lora_files import write_diffusers
from trainer.adapters.tokens import ExtendedEmbedding, add_token, fold, new_rows, write_token
from trainer.adapters.weights import adapter_weights


def table_of(text_encoder: CLIPTextModel) -> torch.Tensor:
    """The rows of a plain embedding."""
    return text_encoder.get_input_embeddings().get_parameter("weight")


def encoded(tokenizer: object, text_encoder: CLIPTextModel, prompt: str) -> torch.Tensor:
    """Hidden states of a prompt."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]  # pyright: ignore[reportCallIssue]
    with torch.no_grad():
        return text_encoder(ids).last_hidden_state


def test_a_token_gets_the_next_id_and_the_mean_row_of_its_initializer() -> None:
    tokenizer, text_encoder = tiny_tokenizer(), small_text_encoder()
    table, count = table_of(text_encoder).clone(), len(tokenizer)
    number = add_token(tokenizer, text_encoder, "<cmg>", initializer="red cartoon")
    assert number == count == tokenizer.convert_tokens_to_ids("<cmg>")
    ids = tokenizer("red cartoon", add_special_tokens=False)["input_ids"]
    rows = new_rows(text_encoder)
    assert rows is not None
    torch.testing.assert_close(rows[0], table[ids].mean(dim=0))
    assert tokenizer("a <cmg>cartoon cat", add_special_tokens=False)["input_ids"].count(number) == 1


def test_prompts_without_the_token_are_encoded_as_before_and_the_token_as_its_initializer() -> None:
    tokenizer, text_encoder = tiny_tokenizer(), small_text_encoder()
    before, with_word = encoded(tokenizer, text_encoder, "a red cat"), encoded(tokenizer, text_encoder, "a cartoon cat")
    add_token(tokenizer, text_encoder, "<cmg>", initializer="cartoon")
    assert torch.equal(encoded(tokenizer, text_encoder, "a red cat"), before)
    assert torch.equal(encoded(tokenizer, text_encoder, "a <cmg> cat"), with_word)


def test_two_tokens_train_and_all_other_rows_keep_their_bits() -> None:
    tokenizer, text_encoder = tiny_tokenizer(), small_text_encoder()
    table = table_of(text_encoder).clone()
    numbers = [add_token(tokenizer, text_encoder, token, initializer="cartoon") for token in ("<cmg>", "<cmh>")]
    trained = {name: parameter for name, parameter in text_encoder.named_parameters() if parameter.requires_grad}
    of_tokens = {name: tuple(parameter.shape) for name, parameter in trained.items() if "token_embedding" in name}
    assert of_tokens == {"embeddings.token_embedding.new_rows": (2, WIDTH)}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.1, weight_decay=0.1)  # the encoder trains too
    for _ in range(2):
        ids = tokenizer("a <cmg> cat", return_tensors="pt")["input_ids"]
        text_encoder(ids).last_hidden_state.square().mean().backward()
        optimizer.step()
    rows = new_rows(text_encoder)
    assert rows is not None
    fold(text_encoder)
    folded = table_of(text_encoder)
    assert torch.equal(folded[: len(table)], table)
    assert torch.equal(folded[numbers], rows)
    assert not torch.equal(rows[0], rows[1])


def test_a_folded_encoder_is_saved_and_loaded_as_a_plain_one(tmp_path: Path) -> None:
    tokenizer, text_encoder = tiny_tokenizer(), small_text_encoder()
    plain_names = list(text_encoder.state_dict())
    add_token(tokenizer, text_encoder, "<cmg>", initializer="cartoon")
    with torch.no_grad():
        rows = new_rows(text_encoder)
        assert rows is not None
        rows.add_(0.5)
    before = encoded(tokenizer, text_encoder, "a <cmg> cat")
    fold(text_encoder)
    assert list(text_encoder.state_dict()) == plain_names
    text_encoder.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = CLIPTextModel.from_pretrained(tmp_path / "text_encoder", local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer", local_files_only=True)
    assert loaded.config.vocab_size == len(tokenizer)
    assert torch.equal(encoded(tokenizer, loaded, "a <cmg> cat"), before)


def test_new_rows_are_fp32_beside_a_bf16_encoder() -> None:
    tokenizer, text_encoder = tiny_tokenizer(), small_text_encoder().bfloat16()
    add_token(tokenizer, text_encoder, "<cmg>", initializer="cartoon")
    rows = new_rows(text_encoder)
    assert rows is not None and rows.dtype == torch.float32
    assert encoded(tokenizer, text_encoder, "a <cmg> cat").dtype == torch.bfloat16
    fold(text_encoder)
    assert table_of(text_encoder).dtype == torch.bfloat16


def test_a_token_beside_an_adapter_is_trained_with_it() -> None:
    tokenizer, text_encoder = tiny_tokenizer(), small_text_encoder()
    adapt(text_encoder, targets=CLIP_TEXT_TARGETS)
    add_token(tokenizer, text_encoder, "<cmg>", initializer="cartoon")
    trained = {name for name, parameter in text_encoder.named_parameters() if parameter.requires_grad}
    assert trained - set(adapter_parameters(text_encoder)) == {"embeddings.token_embedding.new_rows"}


def test_prompts_are_still_pooled_at_their_end_by_an_encoder_with_clips_old_configuration() -> None:
    tokenizer, text_encoder = tiny_tokenizer(), small_text_encoder()
    tokenizer.eos_token = "[SEP]"
    text_encoder.config.eos_token_id = text_encoder.eos_token_id = 2
    add_token(tokenizer, text_encoder, "<cmg>", initializer="cartoon")
    ids = tokenizer("a <cmg> cat", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        states = text_encoder(ids)
    assert torch.equal(states.pooler_output, states.last_hidden_state[:, -1])
    assert text_encoder.config.eos_token_id == tokenizer.eos_token_id


def test_a_stock_pipeline_takes_the_token_beside_the_adapter(tmp_path: Path) -> None:
    tokenizer, text_encoder = tiny_tokenizer(), small_text_encoder()
    adapt(text_encoder, targets=CLIP_TEXT_TARGETS)
    number = add_token(tokenizer, text_encoder, "<cmg>", initializer="cartoon")
    rows = new_rows(text_encoder)
    assert rows is not None
    write_token(tmp_path / "<cmg>.safetensors", "<cmg>", rows[0] + 0.5)
    write_diffusers(tmp_path / "lora", {"text_encoder": adapter_weights(text_encoder)})
    with torch.no_grad():
        rows.add_(0.5)
    stock = pipeline(small_unet(), small_text_encoder())
    stock.load_textual_inversion(str(tmp_path / "<cmg>.safetensors"))
    stock.load_lora_weights(str(tmp_path / "lora"))
    assert stock.tokenizer.convert_tokens_to_ids("<cmg>") == number
    wanted = encoded(tokenizer, text_encoder, "a <cmg> cat")
    torch.testing.assert_close(encoded(stock.tokenizer, stock.text_encoder, "a <cmg> cat"), wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("token", "initializer", "message"),
    [
        ("cartoon", "cat", "'cartoon' is in the tokenizer already"),
        ("a b", "cat", "wanted some characters without spaces"),
        ("", "cat", "wanted some characters without spaces"),
        ("<cmg>", "", "has no tokens that the tokenizer knows"),
        ("<cmg>", "\u4e2d", "has no tokens that the tokenizer knows"),
        ("car", "cat", "'car' is not kept whole in the prompt"),
    ],
)
def test_tokens_that_cannot_be_are_refused_and_nothing_changes(token: str, initializer: str, message: str) -> None:
    tokenizer, text_encoder = tiny_tokenizer(), small_text_encoder()
    count, embedding = len(tokenizer), text_encoder.get_input_embeddings()
    with pytest.raises(ValueError, match=message):
        add_token(tokenizer, text_encoder, token, initializer=initializer)
    assert len(tokenizer) == count
    assert text_encoder.get_input_embeddings() is embedding
    assert not isinstance(embedding, ExtendedEmbedding) and table_of(text_encoder).requires_grad


def test_a_tokenizer_of_another_encoder_is_refused() -> None:
    tokenizer, text_encoder = tiny_tokenizer(), small_text_encoder()
    tokenizer.add_tokens(["<other>"])
    with pytest.raises(ValueError, match="wanted a pair that belongs together"):
        add_token(tokenizer, text_encoder, "<cmg>", initializer="cartoon")
