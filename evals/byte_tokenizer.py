"""A fast tokenizer without merges: a byte is its own token id, then BOS = 256, EOS = 257, PAD = 258."""

import json
from pathlib import Path

from recall_model import BOS, EOS, PAD
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = {"<bos>": BOS, "<eos>": EOS, "<pad>": PAD}


def byte_characters() -> list[str]:
    """The character by which the byte-level pre-tokenizer writes each byte (GPT-2's alphabet)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {character: byte for byte, character in enumerate(byte_characters())} | SPECIAL_TOKENS
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )


def save_byte_tokenizer(folder: Path) -> None:
    byte_tokenizer().save_pretrained(folder)
    # transformers 5 writes its own class name, which older versions do not know; both know this one.
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2) + "\n")
